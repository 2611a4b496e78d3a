"""Gradients of any layout: those of embeddings with ``sparse=True``, and of complex parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def entries_of(gradient: Tensor) -> Tensor:
    """Return the entries of a gradient as real numbers, without those that a sparse one lacks."""
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(entries.resolve_conj()) if entries.is_complex() else entries


def to_dense(gradient: Tensor) -> Tensor:
    """Return a gradient that may be sparse as a dense tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient
