"""Lookups: embeddings, known by their indices and never written out as one-hot vectors.

The weight of an embedding is the transpose of a linear map's: the looked-up index spans its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.gradients.factors import Dense, GradientFactors, OneHot
from tda_lightning.gradients.layers.linear import flat_positions
from tda_lightning.gradients.layers.rule import LayerCall, layer_rule


def _mixes_samples(module: nn.Embedding | nn.EmbeddingBag) -> str:
    if module.max_norm is not None:
        return "`max_norm` changes the weight during the forward pass"
    if module.scale_grad_by_freq:
        return "`scale_grad_by_freq` mixes the samples of a batch"
    if getattr(module, "mode", "") == "max":
        return "which token wins under `mode='max'` cannot be seen from outside"
    return ""


def _are_positions(indices: Tensor, n: int) -> bool:
    """Say whether indices are looked up once for all samples: 0, 1, 2, ... looks like samples."""
    if indices.ndim == 0 or len(indices) != n:
        return True
    positions = torch.arange(n, device=indices.device, dtype=indices.dtype)
    return n > 1 and indices.ndim == 1 and torch.equal(indices, positions)


@layer_rule(nn.Embedding, obstacle=_mixes_samples, is_shared=_are_positions)
def _embedding(call: LayerCall) -> GradientFactors:
    indices = call.input
    if _are_positions(indices, call.n):
        indices = indices.expand(call.n, *indices.shape)
    return _looked_up(call.module, indices.reshape(call.n, -1), flat_positions(call.grad))


@layer_rule(nn.EmbeddingBag, obstacle=_mixes_samples)
def _embedding_bag(call: LayerCall) -> GradientFactors:
    indices, shares = _bags(call)
    if call.module.padding_idx is not None:
        shares = shares.masked_fill(indices == call.module.padding_idx, 0.0)
    if call.module.mode == "mean":
        shares = shares / (shares != 0).sum(dim=1, keepdim=True).clamp_min(1)
    return _looked_up(call.module, indices, shares[..., None] * call.grad[:, None])


def _looked_up(
    module: nn.Embedding | nn.EmbeddingBag, indices: Tensor, grads: Tensor
) -> GradientFactors:
    if module.padding_idx is not None:
        grads = grads.masked_fill((indices == module.padding_idx)[..., None], 0.0)
    return GradientFactors(Dense(grads), OneHot(indices, module.num_embeddings))


def _bags(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Return each sample's indices and their weights, padded with weight zero, ``(n, s)``."""
    given = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False))
    given.update(call.kwargs)
    indices, weights = given["input"], given.get("per_sample_weights")
    weights = torch.ones_like(indices, dtype=call.grad.dtype) if weights is None else weights
    if indices.ndim == 2:
        return indices, weights
    starts = given["offsets"]
    stops = torch.cat([starts[1:], starts.new_tensor([len(indices)])])
    if call.module.include_last_offset:
        starts, stops = starts[:-1], starts[1:]
    # (n, s): position s of each bag, cut to the last index where the bag is shorter.
    places = starts[:, None] + torch.arange(int((stops - starts).max()), device=starts.device)
    inside = places < stops[:, None]
    places = places.clamp_max(max(len(indices) - 1, 0))
    return indices[places], weights[places] * inside
