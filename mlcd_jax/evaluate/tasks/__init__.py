"""The tasks a frozen encoder is scored by, one a file."""
