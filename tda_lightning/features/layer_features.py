"""Points: what a layer saw of some samples, and what their losses asked of its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class HeadOutputs:
    """The linear layer behind the features, as it acted on them.

    Two gradients per sample tell what its loss is, however well the model fits.

    Attributes:
        outputs: What it returned, shape ``(n, c)``.
        gradients: Gradient of each sample's own loss with respect to that, shape ``(n, c)``.
        probes: Other outputs, drawn at random, shape ``(n, c)``.
        probe_gradients: Gradient of each sample's own loss had these come out, shape ``(n, c)``.
        weight: Its weight, with the bias as last column if it has one, shape ``(c, d)``.
        rounding: Relative error of the number format that the gradients came in.
    """

    outputs: Float[Tensor, "n c"]
    gradients: Float[Tensor, "n c"]
    probes: Float[Tensor, "n c"]
    probe_gradients: Float[Tensor, "n c"]
    weight: Float[Tensor, "c d"]
    rounding: float

    def at(self, places: Int[Tensor, " m"]) -> HeadOutputs:
        """Return the head as it acted on some of the samples."""
        own: dict[str, Any] = {name: getattr(self, name)[places] for name in _PER_SAMPLE}
        return replace(self, **own)

    def double(self) -> HeadOutputs:
        """Return the head in float64."""
        own: dict[str, Any] = {name: getattr(self, name).double() for name in _PER_SAMPLE}
        return replace(self, weight=self.weight.double(), **own)


_PER_SAMPLE = ("outputs", "gradients", "probes", "probe_gradients")


@dataclass(frozen=True)
class LayerFeatures:
    """Samples as a layer saw them.

    Attributes:
        features: Its inputs, flattened, shape ``(n, d)``; with a head that has a bias, the last
            feature is one.
        ids: Ids of the samples, shape ``(n,)``.
        layer: Name of the layer.
        head: The layer itself, where asked for.
    """

    features: Float[Tensor, "n d"]
    ids: Int[Tensor, " n"]
    layer: str
    head: HeadOutputs | None = None

    def sorted(self) -> LayerFeatures:
        """Return the same points, sorted by id."""
        order = self.ids.argsort()
        head = None if self.head is None else self.head.at(order)
        return replace(self, features=self.features[order], ids=self.ids[order], head=head)

    def not_finite(self) -> tuple[str, int] | None:
        """Say what holds NaN or infinity, in words, and the first sample with such; or nothing."""
        seen = {f"what `{self.layer}` saw": self.features}
        if self.head is not None:
            seen[f"what `{self.layer}` returned"] = self.head.outputs
            seen["the gradient of the loss"] = self.head.gradients
        for what, values in seen.items():
            strange = self.ids[~values.isfinite().all(dim=1)]
            if len(strange):
                return what, int(strange[0])
        return None


def concatenate(parts: Sequence[LayerFeatures], ids: Int[Tensor, " n"]) -> LayerFeatures:
    """Put the points of several batches together, under these ids."""
    heads = [part.head for part in parts if part.head is not None]
    head = None
    if heads:
        own: dict[str, Any] = {
            name: torch.cat([getattr(one, name) for one in heads]) for name in _PER_SAMPLE
        }
        head = replace(heads[0], **own)
    features = torch.cat([part.features for part in parts])
    return LayerFeatures(features, ids, parts[0].layer, head)
