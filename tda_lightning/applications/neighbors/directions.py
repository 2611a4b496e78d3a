r"""Directions: one unit vector per training sample, whose cosines compare the samples.

.. math:: u_i \propto \sum_{t \,:\, i \in B_t} \frac{g_i^{(t)}}{\lVert g_i^{(t)} \rVert}

Every visit counts alike, so that the direction does not depend on how well the sample was fitted.
Copies of a sample with the same label have the same gradients at the same weights. The labels are
part of a gradient, so copies with different labels are not alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tda_lightning.applications.notes import Note
from tda_lightning.attribution.attributor import Totals
from tda_lightning.attribution.linalg import unit_rows
from tda_lightning.features.layer_features import LayerFeatures
from tda_lightning.stores import Store

# Cosines that are in memory at once.
_MAX_COSINES = 2**24


@dataclass(frozen=True)
class Directions:
    """A unit vector for each training sample that has one.

    Attributes:
        train_ids: Ids of all training samples, shape ``(n_train,)``.
        units: Unit vectors; zeros for samples without one, shape ``(n_train, k)``.
        origin: The compared vectors, in words.
    """

    train_ids: Int[Tensor, " n_train"]
    units: Float[Tensor, "n_train k"]
    origin: str

    def is_known(self) -> Bool[Tensor, " n_train"]:
        """Return which samples have a direction."""
        return self.units.any(dim=1)

    def cosines(self) -> Iterator[tuple[int, Float[Tensor, "n n_train"]]]:
        """Yield the cosines of some samples with all, and the position of the first of them."""
        n = len(self.train_ids)
        size = max(1, _MAX_COSINES // max(n, 1))
        for start in range(0, n, size):
            yield start, self.units[start : start + size] @ self.units.mT

    def notes(self) -> list[Note]:
        """Return which samples could not be compared."""
        n_unknown = int((~self.is_known()).sum())
        if not n_unknown:
            return []
        return [
            Note(
                f"{n_unknown:,} samples have no direction, since they were never drawn or their "
                "gradients are zero or not finite; they were not examined."
            )
        ]


def gradient_directions(run: Store) -> Directions:
    """Return the mean direction of each sample's gradients over its visits, if the run has rows."""
    if run.recipe.projector.get("name") == "none":
        raise ValueError(
            "The run holds losses and no rows; expected rows to compare. Record with "
            "`GradientRecorder` instead of `LossRecorder`, or pass `model` and `loader` to "
            "`find_duplicates`."
        )
    totals = Totals(run.train_ids(), run.recipe.dimension, torch.empty(0))
    for step in run:
        is_finite = torch.ones(len(step.sample_ids), dtype=torch.bool)
        is_finite[step.non_finite_visits()] = False
        units = unit_rows(step.sketch[is_finite].cpu().to(totals.values))
        totals.add_(step.sample_ids[is_finite], units)
    return Directions(totals.train_ids, unit_rows(totals.values), "gradients")


def feature_directions(features: LayerFeatures) -> Directions:
    """Return the direction of each sample's features from their mean."""
    centred = features.features.float() - features.features.float().mean(dim=0)
    return Directions(features.ids, unit_rows(centred), f"inputs of `{features.layer}`")
