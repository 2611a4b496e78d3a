"""Rules for embeddings: gradient factors with indices in place of one-hot vectors.

An embedding's weight is the transpose of a linear map's: its rows correspond to indices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tda_lightning.gradients.factors import Dense, GradientFactors, OneHot
from tda_lightning.gradients.layers.linear import flat_positions
from tda_lightning.gradients.layers.rule import LayerCall, layer_rule


def _obstacle(module: nn.Embedding | nn.EmbeddingBag) -> str:
    # The reasons are part of the stored recipe: a resumed run must give the same ones.
    if module.max_norm is not None:
        return "`max_norm` changes the weight during the forward pass"
    if module.scale_grad_by_freq:
        return "`scale_grad_by_freq` mixes the samples of a batch"
    if getattr(module, "mode", "") == "max":
        return "which token wins under `mode='max'` cannot be seen from outside"
    return ""


def _are_positions(indices: Tensor, n: int) -> bool:
    """Return whether indices are positions, looked up once for all samples.

    With as many positions as samples, ``0, 1, 2, ...`` would look like one index per sample.
    """
    if indices.ndim == 0 or len(indices) != n:
        return True
    positions = torch.arange(n, device=indices.device, dtype=indices.dtype)
    return n > 1 and indices.ndim == 1 and torch.equal(indices, positions)


@layer_rule(nn.Embedding, obstacle=_obstacle, is_shared=_are_positions)
def _embedding(call: LayerCall) -> GradientFactors:
    indices = call.input
    if _are_positions(indices, call.n):
        indices = indices.expand(call.n, *indices.shape)
    return _lookup_factors(call.module, indices.reshape(call.n, -1), flat_positions(call.grad))


@layer_rule(nn.EmbeddingBag, obstacle=_obstacle)
def _embedding_bag(call: LayerCall) -> GradientFactors:
    indices, shares = _bags(call)
    if call.module.padding_idx is not None:
        shares = shares.masked_fill(indices == call.module.padding_idx, 0.0)
    if call.module.mode == "mean":
        shares = shares / (shares != 0).sum(dim=1, keepdim=True).clamp_min(1)
    return _lookup_factors(call.module, indices, shares[..., None] * call.grad[:, None])


def _lookup_factors(
    module: nn.Embedding | nn.EmbeddingBag, indices: Tensor, grads: Tensor
) -> GradientFactors:
    if module.padding_idx is not None:
        grads = grads.masked_fill((indices == module.padding_idx)[..., None], 0.0)
    return GradientFactors(Dense(grads), OneHot(indices, module.num_embeddings))


def _bags(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Return each sample's indices and their weights, padded with weight zero, ``(n, s)``."""
    arguments = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False))
    arguments.update(call.kwargs)
    indices, weights = arguments["input"], arguments.get("per_sample_weights")
    weights = torch.ones_like(indices, dtype=call.grad.dtype) if weights is None else weights
    if indices.ndim == 2:
        return indices, weights
    starts = arguments["offsets"]
    stops = torch.cat([starts[1:], starts.new_tensor([len(indices)])])
    if call.module.include_last_offset:
        starts, stops = starts[:-1], starts[1:]
    # (n, s): entry s of each bag, clamped to the last index where the bag is shorter.
    entries = starts[:, None] + torch.arange(int((stops - starts).max()), device=starts.device)
    is_inside = entries < stops[:, None]
    entries = entries.clamp_max(max(len(indices) - 1, 0))
    return indices[entries], weights[entries] * is_inside
