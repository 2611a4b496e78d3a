"""Batches: what a trainer does between a loader and the loss, without a trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tda_lightning.gradients.layers import find_tensors


def with_progress(
    batches: Iterable[Any], name: str, progress: bool, unit: str = "batch"
) -> Iterable[Any]:
    """Return the batches, with a progress bar while they are gone through."""
    bar: Iterable[Any] = tqdm(batches, desc=name, unit=unit, leave=False, disable=not progress)
    return bar


def require_loader(loader: Any, argument: str) -> None:
    """Raise if what should yield batches is a dataset, which yields samples.

    Raises:
        ValueError: Saying so.
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
    """The batches of a loader, kept: every pass over them is the same."""

    def __iter__(self) -> Iterator[Any]:
        """Yield copies: a step may write into its batch."""
        return map(copy.deepcopy, super().__iter__())


def kept_batches(queries: Any) -> Any:
    """Return queries that can be gone through again: a shuffled loader has another order then.

    Args:
        queries: A batch, or a loader of batches.
    """
    return Batches(queries) if isinstance(queries, DataLoader) else queries


def batches_of(queries: Any) -> Iterable[Any]:
    """Return the batches of a loader, or the one batch."""
    return queries if isinstance(queries, DataLoader | Batches) else [queries]


def batch_size(batch: Any, argument: str) -> int:
    """Return the number of samples in a batch.

    Raises:
        ValueError: If it holds no tensor that tells.
    """
    first = next(find_tensors(batch), None)
    if first is None or first.ndim == 0:
        raise ValueError(
            f"`{argument}` holds no tensor with samples along its first axis: got "
            f"{describe(batch)}; expected a batch such as the training loader yields, or a "
            "`DataLoader` of such."
        )
    return len(first)


def describe(value: Any) -> str:
    """Say in a few words what something is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(describe(one) for one in value) + ")"
    return f"a {type(value).__name__}" if value is not None else "nothing"
