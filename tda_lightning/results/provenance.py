"""Provenance of scores: the model, optimizer, steps and sketch behind them, as short texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from tda_lightning.stores.store import Store


def provenance_of(run: Store) -> Mapping[str, str]:
    """Describe a run in short texts: its model, optimizer, steps, and sketch."""
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
    """Return a short hash of a model's weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:12]
