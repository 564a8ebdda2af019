"""Encoders on disk: checkpoints, released weights in and out."""
