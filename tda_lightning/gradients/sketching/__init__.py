"""Sketching: random projections of gradients to rows of a fixed length."""
