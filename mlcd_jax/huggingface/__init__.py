"""Folders as `transformers` writes them: configs, tensors, preprocessing."""
