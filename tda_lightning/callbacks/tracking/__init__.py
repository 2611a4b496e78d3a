"""Internals of the contribution tracker: its probe set and its state in one training."""
