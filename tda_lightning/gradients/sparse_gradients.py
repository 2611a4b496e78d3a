"""Sparse gradients, as those of embeddings with ``sparse=True``: as numbers, or made dense."""

from __future__ import annotations

from torch import Tensor


def entries_of(gradient: Tensor) -> Tensor:
    """Return the entries of a gradient that may be sparse; those it does not hold are zero."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def to_dense(gradient: Tensor) -> Tensor:
    """Return a gradient that may be sparse as a dense tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient
