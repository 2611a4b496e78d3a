r"""Trajectory: when in the training did a sample help or hurt?

A score is a sum over steps. Here are its terms, for some samples, per step or per epoch,

.. math:: s(q, i) = \sum_t c_{q, i, t}, \qquad
   c_{q, i, t} = \langle d_q^{(t)}, g_i^{(t)} \rangle \; [i \in B_t]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tda_lightning.arguments import require_choice
from tda_lightning.attribution.attributor import Attributor
from tda_lightning.attribution.device_view import DeviceView
from tda_lightning.results.provenance import provenance_of
from tda_lightning.results.trajectory import Period, Trajectory
from tda_lightning.stores import Store

if TYPE_CHECKING:
    pass


_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def contributions(
    run: Store,
    queries: Float[Tensor, "n_query k"],
    train_ids: Int[Tensor, " n_selected"] | Sequence[int],
    method: Attributor,
    *,
    per: Period = "step",
    progress: bool = True,
) -> Trajectory:
    """Say what some samples did for each query at each time of the training.

    Args:
        run: The recorded training.
        queries: Gradient sketches of the queries' losses, shape ``(n_query, k)``.
        train_ids: Which samples.
        method: How to attribute.
        per: Whether to add up steps to epochs.
        progress: Show a progress bar.

    Raises:
        ValueError: If one of the samples is not in the training set.
    """
    require_choice("per", per, Period)
    method.require(run)
    chosen = chosen_ids(run, train_ids)
    terms: dict[int, Tensor] = {}
    visits = queries.new_zeros(len(chosen), 1)
    pairs: Any = method.visit_scores(DeviceView(run, queries), queries)
    for step, scores in tqdm(
        pairs, total=len(run), desc="trajectory", unit="step", leave=False, disable=not progress
    ):
        selected = (step.sample_ids[None, :] == chosen[:, None]).to(queries)  # (n_selected, n)
        visits += selected.sum(dim=1, keepdim=True)
        time = step.index if per == "step" else step.epoch
        term = selected @ scores  # (n_selected, n_query)
        terms[time] = terms[time] + term if time in terms else term
    times = sorted(terms)
    values = torch.stack([method.combine(terms[time], visits).mT for time in times], dim=2)
    return Trajectory(
        values=values.cpu(),
        times=torch.tensor(times),
        train_ids=chosen,
        query_ids=torch.arange(len(queries)),
        per=per,
        method=repr(method),
        provenance=provenance_of(run),
    )


def chosen_ids(
    run: Store, train_ids: Int[Tensor, " n_selected"] | Sequence[int]
) -> Int[Tensor, " n_selected"]:
    """Return ids of training samples as a tensor.

    Raises:
        ValueError: If they are no whole numbers, or one is not in the training set.
    """
    given, known = torch.as_tensor(train_ids), run.train_ids()
    if given.ndim != 1 or given.dtype not in _WHOLE:
        raise ValueError(
            f"`train_ids` is {train_ids!r}; expected a list of whole numbers, ids of training "
            "samples, such as `scores.proponents(3).ids[0]`."
        )
    chosen = given.to(torch.int64)
    strangers = chosen[~torch.isin(chosen, known)]
    if len(strangers):
        raise ValueError(
            f"Sample {int(strangers[0])} is not in the training set of the run; expected some of "
            f"the {len(known)} ids of `run.train_ids()`."
        )
    return chosen
