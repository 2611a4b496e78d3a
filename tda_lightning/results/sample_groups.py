"""Look samples up by their ids, and sum their scores over groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tda_lightning.results.ranking import Ranking, SampleRanking
from tda_lightning.stores.arguments import describe


def positions_of(
    train_ids: Int[Tensor, " n_train"], wanted: Int[Tensor, " k"] | Sequence[int] | SampleRanking
) -> Int[Tensor, " k"]:
    """Return the positions of some ids among the training samples, in the order of these ids.

    Raises:
        ValueError: If they are not ids, or if one is not among the training samples.
    """
    ids = whole_ids(wanted)
    in_order, order = train_ids.sort()
    positions = torch.searchsorted(in_order, ids).clamp_max_(len(in_order) - 1)
    is_unknown = in_order[positions] != ids
    if is_unknown.any():
        raise ValueError(
            f"Sample {int(ids[is_unknown][0])} is not among the {len(train_ids):,} training "
            "samples; expected ids from `train_ids`, which are indices into the dataset below any "
            "`Subset`."
        )
    in_given_order: Tensor = order[positions]
    return in_given_order


def whole_ids(train_ids: object, argument: str = "train_ids") -> Int[Tensor, " k"]:
    """Return ids of training samples, from a list or a ranking of them.

    Raises:
        ValueError: If they are not whole numbers.
    """
    if isinstance(train_ids, SampleRanking):
        return train_ids.ids
    if isinstance(train_ids, Ranking):
        raise ValueError(
            f"`{argument}` is a ranking for {len(train_ids)} queries; expected one list of ids. "
            "Pass those of one query, `ranking[0]`, or all of them, `ranking.ids.unique()`."
        )
    try:
        ids = torch.as_tensor(train_ids)
    except (TypeError, ValueError, RuntimeError):  # Such as a set, or texts.
        ids = torch.empty(0, 0)
    is_whole = ids.numel() == 0 or not (ids.is_floating_point() or ids.dtype == torch.bool)
    if ids.ndim != 1 or not is_whole:
        is_array = isinstance(train_ids, Tensor) or ids.ndim > 1
        shown = describe(ids) if is_array else repr(train_ids)
        raise ValueError(
            f"`{argument}` is {shown}; expected a list of whole numbers, ids of training samples, "
            "such as `scores.proponents(3).ids[0]`. Turn a mask into ids: `train_ids[mask]`."
        )
    return ids.to(torch.int64)


def sum_over_groups(
    values: Float[Tensor, "n m"], labels: Tensor | Sequence[int], argument: str, of: str
) -> tuple[Int[Tensor, " groups"], Float[Tensor, "groups m"]]:
    """Return labels, sorted, and the sum of the rows with each label.

    A row is ``of`` a query or a training sample.

    Raises:
        ValueError: If there is not one label per row in the argument.
    """
    try:
        groups = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` are not numbers: {error}; expected one whole number per {of}, the same "
            "for those that belong together."
        ) from error
    if groups.shape != values.shape[:1]:
        hint = " Take those of `scores.train_ids`." if of == "training sample" else ""
        raise ValueError(
            f"`{argument}` has the shape {tuple(groups.shape)}; expected ({len(values)},), one "
            f"label per {of}. Give those that belong together the same number.{hint}"
        )
    ids, rows = torch.unique(groups, return_inverse=True)
    sums = values.new_zeros(len(ids), values.shape[1])
    return ids, sums.index_add_(0, rows, values)
