"""Batches: check loaders, and iterate over their batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tda_lightning.arguments import describe
from tda_lightning.gradients.layers import find_tensors


def with_progress(
    batches: Iterable[Any], name: str, progress: bool, unit: str = "batch"
) -> Iterable[Any]:
    """Return an iterable over the batches that shows a progress bar."""
    bar: Iterable[Any] = tqdm(batches, desc=name, unit=unit, leave=False, disable=not progress)
    return bar


def require_loader(loader: Any, argument: str) -> None:
    """Check that an argument is a loader of batches, not a dataset of samples.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(loader, Dataset):
        raise ValueError(
            f"`{argument}` is a `{type(loader).__name__}`, which yields samples; expected a loader "
            f"of batches such as the model was trained on: `DataLoader({argument}, batch_size=50)`."
        )
    if not isinstance(loader, Iterable):
        raise ValueError(
            f"`{argument}` is {loader!r}; expected a loader of batches such as the model was "
            "trained on."
        )


class Batches(list[Any]):
    """The batches of a loader, held in memory so that every pass over them is the same."""

    def __iter__(self) -> Iterator[Any]:
        """Yield copies, because a step may modify its batch in place."""
        return map(copy.deepcopy, super().__iter__())


def batches_in_memory(queries: Any) -> Any:
    """Load the batches of a loader into memory: a shuffled loader changes its order every time.

    Args:
        queries: A batch, which is returned unchanged, or a loader of batches.
    """
    return Batches(queries) if isinstance(queries, DataLoader) else queries


def batches_of(queries: Any) -> Iterable[Any]:
    """Return the batches of a loader, or the single batch."""
    return queries if isinstance(queries, DataLoader | Batches) else [queries]


def batch_size(batch: Any, argument: str) -> int:
    """Return the number of samples in a batch.

    Raises:
        ValueError: If it holds no tensor with an axis of samples.
    """
    first = next(find_tensors(batch), None)
    if first is None or first.ndim == 0:
        raise ValueError(
            f"`{argument}` holds no tensor with samples along its first axis: got "
            f"{describe(batch)}; expected a batch as the training loader yields it, or a "
            "`DataLoader` of such batches."
        )
    return len(first)
