"""Rules for embeddings: gradient factors with indices in place of one-hot vectors.

An embedding's rows correspond to indices, so here the one-hot side spans the weight's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_lightning.gradients.factors import Dense, GradientFactors, OneHot
from tda_lightning.gradients.nodes.rule import (
    Contribution,
    NodeCall,
    all_but_last,
    first_axis,
    node_rule,
    per_sample_vjp,
)

_NO_PADDING = (-1, 2**64 - 1, None)


@node_rule("EmbeddingBackward0", axes=all_but_last)
def _embedding(call: NodeCall) -> Contribution:
    grads = call.rows(call.grad)
    indices = call.samples_first(call.saved("indices")).reshape(call.n, -1)
    return _lookup(call, indices, grads)


def _lookup(call: NodeCall, indices: Tensor, grads: Dense) -> Contribution:
    rows, padding = grads.rows, call.saved("padding_idx")
    if call.saved("scale_grad_by_freq"):
        counts = torch.bincount(call.saved("indices").flatten(), minlength=call.shape[0])
        rows = rows / counts[indices].reshape(-1, 1).clamp_min(1)
    if padding not in _NO_PADDING:
        rows = rows.masked_fill((indices == padding).reshape(-1, 1), 0.0)
    return GradientFactors(inputs=Dense(rows, call.n), grad_outputs=OneHot(indices, call.shape[0]))


def _index_axes(output: Sequence[int], parameter: Sequence[int], position: int) -> Sequence[int]:
    return range(max(1, len(output) - len(parameter) + 1))


@node_rule("IndexBackward0", axes=_index_axes)
def _index(call: NodeCall) -> Contribution:
    indices = call.saved("indices")
    is_plain = len(indices) == 1 and indices[0].dtype == torch.int64 and len(call.shape) == 2
    if not is_plain:
        return per_sample_vjp(call)
    indices = call.samples_first(indices[0]).reshape(call.n, -1) % call.shape[0]
    return GradientFactors(inputs=call.rows(call.grad), grad_outputs=OneHot(indices, call.shape[0]))


@node_rule("EmbeddingBagBackward0", axes=first_axis)
def _embedding_bag(call: NodeCall) -> Contribution:
    indices, shares = _bags(call)
    padding, mode = call.saved("padding_idx"), call.saved("mode")
    if padding not in _NO_PADDING:
        shares = shares.masked_fill(indices == padding, 0.0)
    if mode == 1:  # The mean of a bag.
        shares = shares / (shares != 0).sum(dim=1, keepdim=True).clamp_min(1)
    grads = shares[..., None] * call.samples_first(call.grad).reshape(call.n, 1, -1)
    if mode == 2:  # The maximum of a bag: the gradient is that of the first entry which has it.
        is_again = (indices[:, :, None] == indices[:, None]).tril(-1).any(dim=2)
        highest = call.samples_first(call.saved("result3")).reshape(call.n, 1, -1)
        grads = grads * ((indices[..., None] == highest) & ~is_again[..., None])
    rows = Dense(grads.flatten(0, 1), call.n)
    return GradientFactors(inputs=rows, grad_outputs=OneHot(indices, call.shape[0]))


def _bags(call: NodeCall) -> tuple[Tensor, Tensor]:
    """Return each sample's indices and their weights, padded with weight zero, ``(n, s)``."""
    indices, starts = call.saved("indices"), call.saved("offsets")
    weights = call.saved("per_sample_weights")
    if weights is None:
        weights = torch.ones_like(indices, dtype=call.grad.dtype)
    stops = torch.cat([starts[1:], starts.new_tensor([len(indices)])])
    starts, stops = starts[: len(call.grad)], stops[: len(call.grad)]
    # (n, s): entry s of each bag, clamped to the last index where the bag is shorter.
    entries = starts[:, None] + torch.arange(int((stops - starts).max()), device=starts.device)
    is_inside = entries < stops[:, None]
    entries = entries.clamp_max(max(len(indices) - 1, 0))
    return indices[entries], weights[entries] * is_inside
