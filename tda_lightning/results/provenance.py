"""Provenance: where an answer comes from, in a few words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from tda_lightning.stores.store import Store


def provenance_of(run: Store) -> Mapping[str, str]:
    """Say in a few words where scores come from: which steps, of which training, sketched how."""
    if len(run) == 0:
        return {}
    first, last, recipe = run.facts[0], run.facts[-1], run.recipe
    stride = "" if recipe.every_n_steps == 1 else f", one in {recipe.every_n_steps}"
    return {
        "model": recipe.model,
        "optimizer": last.optimizer,
        "steps": f"{len(run)}, index {first.index} to {last.index}{stride}",
        "projector": ", ".join(f"{key}={value}" for key, value in recipe.projector.items()),
        "rows": f"{recipe.dimension} x {recipe.dtype}, coordinates of {recipe.preconditioner}",
    }


def fingerprint(model: nn.Module) -> str:
    """Return a short name for the weights of a model."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        found.update(raw.numpy().tobytes())
    return found.hexdigest()[:12]
