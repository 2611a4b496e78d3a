"""Gradients: turn a backward pass into sketch rows, one per sample."""
