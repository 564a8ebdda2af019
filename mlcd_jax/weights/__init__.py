"""Encoders on disk: checkpoints, imports, exports and released weights."""
