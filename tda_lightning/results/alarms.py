"""Alarms: signs in a recorded run that some of its training data or their order are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores.data_order import data_order
from tda_lightning.stores.opening import open_store
from tda_lightning.stores.store import Store

# A label is suspicious if the model contradicts it at this many visits in a row, the last ones.
SUSPICIOUS_VISITS = 3
# And it must have fitted half of the samples, with at most this error.
FITTED_ERROR = 0.25
# A contribution is large if it exceeds the largest of all earlier epochs by this factor.
LARGE_FACTOR = 10.0


@dataclass(frozen=True)
class Alarm:
    """One kind of alarm.

    Attributes:
        name: Name of the alarm, also of its curve in a logger.
        ids: Ids of the training samples concerned, sorted, shape ``(n,)``.
        reason: What was found.
    """

    name: str
    ids: Int[Tensor, " n"]
    reason: str

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.ids[:5].tolist())) + (", ..." if len(self.ids) > 5 else "")
        ids = f": {shown}" if len(self.ids) else ""
        return f"{self.name}, {len(self.ids)} samples: {self.reason}{ids}"


@dataclass(frozen=True)
class Alarms(ShownInNotebooks):
    """All alarms of a run.

    Attributes:
        raised: The alarms, at most one of each kind.
        not_checked: What could not have been found, with the reason.
    """

    raised: tuple[Alarm, ...]
    not_checked: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of samples for each kind of alarm, 0 for none."""
        raised = {alarm.name: len(alarm.ids) for alarm in self.raised}
        return {name: raised.get(name, 0) for name in _NAMES}

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per alarm and sample.

        Its columns are ``alarm``, ``train_id`` and ``reason``.
        """
        rows = [(alarm, sample) for alarm in self.raised for sample in alarm.ids.tolist()]
        columns = {
            "alarm": [alarm.name for alarm, _ in rows],
            "train_id": [sample for _, sample in rows],
            "reason": [alarm.reason for alarm, _ in rows],
        }
        pd = import_pandas()
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        alarms = [f"  {alarm!r}" for alarm in self.raised] or ["  none raised"]
        return "\n".join(["Alarms", *alarms, *(f"  not checked: {n}" for n in self.not_checked)])


_NAMES = ("suspected_mislabels", "large_contributions", "never_seen", "order_faults")


def find_alarms(run: str | Path | Store) -> Alarms:
    """Look for suspicious labels, large contributions, unseen samples and faults of the order.

    Args:
        run: The recorded training, also one that is still running: its folder or a store.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If ``run`` is neither the folder of a run nor a store.
    """
    store = open_store(run, "run")
    not_checked = []
    if len(store) == 0:
        return Alarms((), ("anything: the run has no steps yet",))
    if store.recipe.every_n_steps > 1:
        not_checked.append(
            f"order and unseen samples: only one of every {store.recipe.every_n_steps} steps is "
            "recorded"
        )
    has_rows = store.recipe.projector.get("name") != "none"
    if not has_rows:
        not_checked.append("large contributions: the run holds no rows")
    elif store.facts[0].epoch == store.facts[-1].epoch:
        not_checked.append("large contributions: there is only one epoch to compare with")
    errors = _label_errors(store)
    if (reason := _reason_without_labels(errors)) is not None:
        not_checked.append(f"labels: {reason}")
        errors = {}
    contributions = _large_contributions(store) if has_rows else ()
    return Alarms((*_mislabels(errors), *contributions, *_order(store)), tuple(not_checked))


def _label_errors(run: Store) -> dict[int, list[float]]:
    """Return one minus the probability of each sample's label at its visits; empty if unknown."""
    visits: dict[int, list[float]] = {}
    for step in run.facts:
        is_one_label = step.terms is None or bool(((step.terms - 1).abs() < 1e-3).all())
        if step.curvature is None or step.loss == "squared error" or not is_one_label:
            return {}
        errors = 1 / (1 + step.curvature)  # one minus the probability of the label
        # Samples that the step dropped from its loss have no margin, and a curvature of zero.
        is_dropped = torch.zeros(len(errors), dtype=torch.bool)
        if step.margins is not None:
            is_dropped = step.margins.isnan() & (step.curvature == 0)
        ids, errors = step.sample_ids[~is_dropped], errors[~is_dropped]
        for sample_id, error in zip(ids.tolist(), errors.tolist(), strict=True):
            visits.setdefault(sample_id, []).append(error)
    return visits


def _reason_without_labels(errors: dict[int, list[float]]) -> str | None:
    if not errors:
        return "the loss is not a known cross-entropy with one label per sample"
    if max(map(len, errors.values())) < SUSPICIOUS_VISITS:
        return f"no sample came {SUSPICIOUS_VISITS} times yet"
    last = torch.tensor([values[-1] for values in errors.values()])
    if not float(last.median()) <= FITTED_ERROR:  # NaN after a divergence.
        return "the model does not fit half of the labels yet"
    return None


def _mislabels(visits: dict[int, list[float]]) -> Iterator[Alarm]:
    suspicious = [
        sample_id
        for sample_id, errors in visits.items()
        if len(errors) >= SUSPICIOUS_VISITS and min(errors[-SUSPICIOUS_VISITS:]) > 0.5
    ]
    if suspicious:
        reason = f"the model contradicted the label at the last {SUSPICIOUS_VISITS} visits"
        yield Alarm("suspected_mislabels", torch.tensor(sorted(suspicious)), reason)


def _large_contributions(run: Store) -> Iterator[Alarm]:
    largest, limit, epoch = 0.0, float("inf"), run.facts[0].epoch
    large_ids: set[int] = set()
    for step in run:
        if step.epoch != epoch:
            limit, epoch = LARGE_FACTOR * largest, step.epoch
        norms: Tensor = step.sketch.norm(dim=1) / step.weights.clamp_min(1e-30)
        large_ids.update(step.sample_ids[~(norms <= limit)].tolist())  # NaN is large, too.
        largest = max([largest, *norms[norms.isfinite()].tolist()])
    if large_ids:
        reason = f"a gradient exceeded the largest of all earlier epochs {LARGE_FACTOR:g} times"
        yield Alarm("large_contributions", torch.tensor(sorted(large_ids)), reason)


def _order(run: Store) -> Iterator[Alarm]:
    if run.recipe.every_n_steps > 1:
        return
    order = data_order(run)
    if len(order.never):
        yield Alarm("never_seen", order.never, "in no recorded step")
    faults = [
        ("samples repeated within an epoch", bool(order.repeated)),
        ("batches replayed", bool(order.replayed)),
        ("epochs in the same order", bool(order.same_order)),
    ]
    reasons = [reason for reason, is_true in faults if is_true]
    if reasons:
        repeated = torch.cat([torch.empty(0, dtype=torch.int64), *order.repeated.values()])
        yield Alarm("order_faults", torch.unique(repeated), " and ".join(reasons))
