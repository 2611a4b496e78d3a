"""Objective: the mean loss over some data, as a function of some of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.gradients.layers import LayerSelection
from tda_lightning.passes.batches import batch_size, with_progress
from tda_lightning.passes.model_state import swapped_weights
from tda_lightning.passes.training_step import transfer

# Yields rows whose outer products sum to the Gauss-Newton matrix, of so many draws of labels.
SampledRows = Callable[[int], Generator[Float[Tensor, "n d"], None, None]]


@dataclass(frozen=True, eq=False)
class LinearizationPoint:
    """Where to differentiate: at which weights, and in which coordinates.

    Attributes:
        weights: As the model's ``state_dict`` has them; ``None`` for those that it has.
        scale: What gradients are multiplied by, shape ``(d,)``; ``None`` for ones.
    """

    weights: Mapping[str, Tensor] | None = None
    scale: Float[Tensor, " d"] | None = None

    def of(self, model: nn.Module) -> AbstractContextManager[None]:
        """Give the model these weights, and its own back afterwards."""
        return nullcontext() if self.weights is None else swapped_weights(model, self.weights)


CURRENT_WEIGHTS = LinearizationPoint()


@dataclass(frozen=True)
class Objective:
    """The mean loss over some data, as a function of some of a model's parameters.

    A vector of it holds the parameters one after the other, each flattened.

    Attributes:
        model: The LightningModule.
        parameters: What is differentiated by.
        batches: The data, where the model is.
        sizes: Number of samples in each batch.
        reduction: Whether the loss of a batch is the mean or the sum of its samples' losses.
        linearization_points: Where its curvature is taken: it is the mean of theirs.
        sampled: Draws labels from the model's predictions; ``None`` where nobody said how.
        damping: What the training itself suggests, if it is known.
        argument: What the data are called where the user has passed them.
    """

    model: nn.Module
    parameters: tuple[nn.Parameter, ...]
    batches: tuple[Any, ...]
    sizes: tuple[int, ...]
    reduction: Literal["mean", "sum"] = "mean"
    linearization_points: tuple[LinearizationPoint, ...] = (CURRENT_WEIGHTS,)
    sampled: SampledRows | None = None
    damping: float | None = None
    argument: str = "train_loader"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        loader: DataLoader[Any],
        *,
        reduction: Literal["mean", "sum"] = "mean",
        argument: str = "train_loader",
        progress: bool = True,
    ) -> Objective:
        """Take the data from a loader, once, so that every product sees the very same.

        Raises:
            ValueError: If there are none.
        """
        batches = list(with_progress(loader, "curvature data", progress))
        if not batches:
            raise ValueError(f"`{argument}` is an empty loader; expected at least one batch.")
        sizes = tuple(batch_size(batch, argument) for batch in batches)
        moved = tuple(transfer(model, batch) for batch in batches)
        return cls(model, tuple(parameters), moved, sizes, reduction, argument=argument)

    @property
    def n(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    @property
    def d(self) -> int:
        """Number of parameters."""
        return sum(one.numel() for one in self.parameters)

    @property
    def share(self) -> float:
        """What makes a mean over samples of what the losses of batches make together."""
        return 1.0 if self.reduction == "mean" else 1 / self.n

    def of_samples(self, losses: Sequence[float]) -> list[float]:
        """Return what the losses of the batches are per sample."""
        if self.reduction == "mean":
            return list(losses)
        return [loss / size for loss, size in zip(losses, self.sizes, strict=True)]


def parameters_of(selection: LayerSelection) -> list[nn.Parameter]:
    """Return the parameters of all blocks, in the order of the blocks."""
    return [one for block_sources in selection.sources for one in block_sources[0].parameters()]


def columns_of(selection: LayerSelection) -> Int[Tensor, " d"]:
    """Return where each column of an unprojected row stands in a vector of the parameters.

    Raises:
        ValueError: If a layer's layout does more than put its parameters into an order.
    """
    start, places = 0, []
    for block_sources, block in zip(selection.sources, selection.blocks, strict=True):
        source = block_sources[0]
        sizes = [one.numel() for one in source.parameters()]
        # Layouts are of gradients, so they take floats: in double precision, whole numbers.
        numbers = torch.arange(start, start + sum(sizes), dtype=torch.float64)
        parts = zip(torch.split(numbers, sizes), source.parameters(), strict=True)
        laid_out = source.rule.layout([part.view(one.shape) for part, one in parts]).flatten()
        if not torch.equal(laid_out.sort().values, numbers):
            raise ValueError(
                f"The layout of `{block.name}`, a {block.layer}, does not hold each of its "
                "parameters once; expected an order of them. Correct the `layout` of its layer "
                "rule, or leave the layer out with `layers=[...]`."
            )
        places.append(laid_out.long())
        start += len(numbers)
    return torch.cat(places)
