"""The embed stage: images to unit rows, and readers of rows."""
