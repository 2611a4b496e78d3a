"""Sketching: random projections from gradients to rows of a fixed length."""
