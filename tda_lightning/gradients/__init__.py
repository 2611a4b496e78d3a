"""Gradients: from a backward pass to sketch rows, one per sample."""
