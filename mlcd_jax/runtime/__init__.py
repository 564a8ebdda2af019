"""The process and its files: errors, signals, other processes, storage."""
