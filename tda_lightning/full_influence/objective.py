"""The objective: the mean loss over some data, as a function of some of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.gradients.parameter_selection import ParameterSelection
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.passes.batch_contents import batch_size, require_batches
from tda_lightning.passes.batches import transfer
from tda_lightning.passes.model_state import swapped_weights
from tda_lightning.results.progress import progress_bar

# Takes the number of labels to draw per prediction, and yields rows whose outer products sum to the
# Gauss-Newton matrix.
SampledRows = Callable[[int], Generator[Float[Tensor, "n d"], None, None]]


@dataclass(frozen=True, eq=False)
class LinearizationPoint:
    """Weights and coordinates at which a model is linearized.

    Attributes:
        weights: Weights by their names in the model's ``state_dict``; ``None`` for its current
            weights.
        scale: Factors of the gradient's entries, shape ``(d,)``; ``None`` for ones.
    """

    weights: Mapping[str, Tensor] | None = None
    scale: Float[Tensor, " d"] | None = None

    def loaded_into(self, model: nn.Module) -> AbstractContextManager[None]:
        """Load these weights into the model, and restore its own weights afterwards."""
        return nullcontext() if self.weights is None else swapped_weights(model, self.weights)


CURRENT_WEIGHTS = LinearizationPoint()


@dataclass(frozen=True)
class Objective:
    """The mean loss over some data, as a function of some of a model's parameters.

    Vectors, such as gradients, hold the parameters one after the other, each flattened.

    Attributes:
        model: The LightningModule.
        parameters: The parameters to differentiate by.
        batches: The data, on the model's device.
        sizes: Number of samples in each batch.
        reduction: Whether the loss of a batch is the mean or the sum of its samples' losses.
        linearization_points: The curvature is the mean over these points.
        sampled: Draws labels from the model's predictions and yields their rows; ``None`` if that
            is not possible.
        damping: The damping that the training suggests, if it is known.
        argument: Name of the user's argument with the data, for error messages.
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
        """Read the data from a loader once, so that every product uses the same batches.

        Raises:
            ValueError: If the loader is empty.
        """
        batches = list(progress_bar(loader, "curvature data", "batch", shown=progress))
        require_batches(batches, argument)
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
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def shares(self) -> list[float]:
        """Factor of each batch's loss in the mean loss over samples."""
        return [(size if self.reduction == "mean" else 1) / self.n for size in self.sizes]

    def mean_losses(self, losses: Sequence[float]) -> list[float]:
        """Return the mean loss over samples of each batch, from the batches' losses."""
        if self.reduction == "mean":
            return list(losses)
        return [loss / size for loss, size in zip(losses, self.sizes, strict=True)]


def columns_of(selection: ParameterSelection) -> Int[Tensor, " d"]:
    """Return the index in a vector of the parameters for each column of an unprojected row."""
    start, indices = 0, []
    for block, parameters in zip(selection.blocks, selection.parameters, strict=True):
        sizes = [parameter.numel() for parameter in parameters]
        numbers = torch.arange(start, start + sum(sizes))
        parts = zip(torch.split(numbers, sizes), parameters, strict=True)
        shaped = [part.view(parameter.shape) for part, parameter in parts]
        indices.append(lay_out(block, shaped).flatten())
        start += len(numbers)
    return torch.cat(indices)
