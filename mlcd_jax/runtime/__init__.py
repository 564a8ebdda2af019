"""Processes and files: errors, signals, distribution, storage, the terminal."""
