"""Gradients of any layout: those of embeddings with ``sparse=True``, and of complex parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tda_lightning.stores.precision import widest_format

# Entries that are converted to double precision at a time: copies of large gradients take memory.
_MAX_CONVERTED = 2**18


def entries_of(gradient: Tensor) -> Tensor:
    """Return the entries of a gradient as real numbers, without those that a sparse one lacks."""
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(entries.resolve_conj()) if entries.is_complex() else entries


def to_dense(gradient: Tensor) -> Tensor:
    """Return a gradient that may be sparse as a dense tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def squared_norm(parameters: Iterable[Tensor]) -> float:
    """Return the squared norm of the parameters' gradients, in double precision."""
    squares = [
        part.to(widest_format(part.device)).square().sum()
        for parameter in parameters
        if parameter.grad is not None
        for part in torch.split(entries_of(parameter.grad).flatten(), _MAX_CONVERTED)
    ]
    return float(torch.stack(squares).sum()) if squares else 0.0
