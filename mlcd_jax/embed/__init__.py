"""The embed stage, which turns images into unit rows, and readers of rows."""
