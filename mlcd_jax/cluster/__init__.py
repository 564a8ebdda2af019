"""The cluster stage: rows to centers, and labels of every row."""
