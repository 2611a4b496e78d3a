r"""Find mislabelled training samples, and estimate how many there are.

**Score.** The mean loss of a sample over its first visits. A wrong label resists the training for
some time, even if it is memorized in the end. So the last weights show less than the course of the
training (Pleiss et al. 2020, "Identifying Mislabeled Data Using the Area Under the Margin
Ranking"; Arazo et al. 2019, "Unsupervised Label Noise Modeling and Loss Correction"). Right labels
are learned first (Liu et al. 2020, "Early-Learning Regularization Prevents Memorization of Noisy
Labels"). So the visits up to the best separation of two groups count.

**Number.** See :mod:`tda_lightning.applications.mislabel_count`.

**Other witnesses** are shown beside the score, since they can find what the loss cannot: the
self-influence (Koh & Liang 2017, sec. 5.4; Pruthi et al. 2020, sec. 4.1), the predicted loss of a
sample that is left out, and the opposition to trusted queries,
:math:`\sum_q \max(-s(q, i), 0) / \lVert s(q, \cdot) \rVert`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.applications.loss_history import LossHistory, known_losses
from tda_lightning.applications.mislabel_count import (
    FEW,
    LEAST_SEPARATION,
    Count,
    can_count,
    decisive_part,
    estimate_number,
    has_several_terms,
)
from tda_lightning.applications.mislabel_results import Labelled, Mislabeled
from tda_lightning.applications.notes import Note
from tda_lightning.applications.predictions import of_classes, predict, warn_of_given_ids
from tda_lightning.applications.retraining import Retrain, check_removal
from tda_lightning.attribution import Attributor, InfluenceFunction, TracIn
from tda_lightning.attribution.attribute import attribute, self_influence
from tda_lightning.attribution.attributor import SelfAttributor
from tda_lightning.passes.batches import dataset_ids
from tda_lightning.passes.outputs import Labels, Outputs, labels_of, outputs_of
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.sample_groups import positions_of
from tda_lightning.stores import Store
from tda_lightning.stores.arguments import require_kind, require_whole
from tda_lightning.stores.opening import Run, open_run


def find_mislabeled(
    run: Run,
    model: nn.Module | None = None,
    loader: DataLoader[Any] | None = None,
    *,
    trusted: Any = None,
    method: Attributor = TracIn(),
    left_out: SelfAttributor = InfluenceFunction(),
    number: int | None = None,
    outputs: Outputs = outputs_of,
    labels: Labels = labels_of,
    sample_ids: IdSource | None = None,
    retrain: Retrain | None = None,
    progress: bool = True,
) -> Mislabeled:
    """Rank training samples by how suspicious their labels are, and flag the likely wrong ones.

    The run is enough. A model and a loader add the given and the predicted labels; trusted data
    add a witness.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule.
        loader: The training data, with the labels that the run was trained on.
        trusted: Data with correct labels: a batch, or a ``DataLoader`` of batches. Training samples
            that oppose them are suspicious. Requires ``model``.
        method: How opponents of the trusted data are found.
        left_out: How the loss of a sample that is left out is predicted.
        number: Number of samples to flag; by default it is estimated.
        outputs: Function of (module, batch) that returns the logits.
        labels: Function of the batch that returns the labels.
        sample_ids: Ids in the batches of the loader, as they were recorded: see
            :class:`~tda_lightning.GradientRecorder`.
        retrain: Retrains without the flagged samples, and without random ones, to check the answer:
            ``partial(retrain, model=..., loader=..., trainer=..., measure=...)``. It takes up to 21
            trainings; see :func:`check_removal`.
        progress: Show progress bars.

    Returns:
        Flagged ids, worst first, with a label score for every sample.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If an argument is missing or invalid, or the run holds neither losses nor rows.
    """
    store = open_run(run)
    if number is not None:
        require_whole("number", number, least=0)
    _require_complete(model, loader, trusted)
    history = known_losses(store)
    decisive = None if history is None else decisive_part(history)
    require_kind("left_out", left_out, SelfAttributor, "`InfluenceFunction()`")
    witnesses = _witnesses(store, history, decisive, left_out, progress)
    if trusted is not None:
        assert model is not None
        scores = attribute(store, model, trusted, method=method, progress=progress)
        witnesses["opposition"] = _opposition(scores.values.double())
    suspicion = next(iter(witnesses.values()))
    count = estimate_number(suspicion, history, decisive)
    labelled = None
    if model is not None and loader is not None:
        outputs, labels = of_classes(store, outputs, labels)
        if sample_ids is None:
            warn_of_given_ids(store, "loader", remedy="Pass `sample_ids=` here, too.")
        named = predict(model, loader, outputs, labels, progress, sample_ids)
        rows = named.of(store.train_ids())
        labelled = Labelled(rows.labels, rows.predicted())
    mislabeled = Mislabeled(
        train_ids=store.train_ids(),
        label_scores=_label_scores(suspicion, history),
        witnesses=witnesses,
        estimated_number=count.number,
        is_clear=can_count(store, history) and count.is_clear,
        flagged_number=count.number if number is None else min(number, len(suspicion)),
        labelled=labelled,
        notes=tuple(_notes(store, history, suspicion, count)),
    )
    notes_on_classes = tuple(_notes_on_classes(labelled, history, mislabeled.is_flagged()))
    mislabeled = replace(
        mislabeled,
        is_clear=mislabeled.is_clear and (labelled is None or not notes_on_classes),
        notes=(*notes_on_classes, *mislabeled.notes),
    )
    if retrain is None or mislabeled.flagged_number == 0:
        return mislabeled
    all_ids = _ids_of_data(store, loader)
    positions = positions_of(all_ids, mislabeled.ids)
    removal = check_removal(positions, len(all_ids), retrain, name="flagged")
    return replace(mislabeled, removal=removal)


def _require_complete(model: Any, loader: Any, trusted: Any) -> None:
    if model is None and (loader is not None or trusted is not None):
        name = "loader" if loader is not None else "trusted"
        raise ValueError(
            f"`{name}` is passed without `model`; expected both. Pass the trained model, too."
        )


def _ids_of_data(store: Store, loader: DataLoader[Any] | None) -> Int64[Tensor, " n"]:
    """Return the id of the sample at each position of the training data."""
    if loader is not None:
        return dataset_ids(loader, "loader")
    ids = store.train_ids()
    if int(ids[-1]) != len(ids) - 1:
        raise ValueError(
            "`retrain` is passed, but the ids of the run are no positions in the training data: "
            "they lie below a `Subset`, or some samples were never drawn. Pass `loader` and "
            "`model`, too."
        )
    return ids


def _witnesses(
    store: Store,
    history: LossHistory | None,
    decisive: LossHistory | None,
    left_out: SelfAttributor,
    progress: bool,
) -> dict[str, Float[Tensor, " n_train"]]:
    """Return the suspicion of each sample by each witness; the first decides."""
    witnesses: dict[str, Tensor] = {}
    has_rows = store.recipe.projector.get("name") != "none"
    if decisive is not None:
        witnesses["loss"] = decisive.mean().values.nan_to_num(nan=-torch.inf)
    if has_rows:
        witnesses["self_influence"] = self_influence(store, progress=progress).values.double()
    if has_rows and history is not None:
        effects = self_influence(store, method=left_out, progress=progress)
        last = history.last().values.nan_to_num(nan=-torch.inf)
        witnesses["left_out_loss"] = last + effects.values.double()
    if not witnesses:
        raise ValueError(
            "The run holds neither losses of single labels nor rows; expected one of them. Record "
            "it with `GradientRecorder`."
        )
    return witnesses


def _opposition(scores: Float[Tensor, "n_query n_train"]) -> Float[Tensor, " n_train"]:
    """Return how strongly each sample opposes trusted queries, which all count alike.

    Only negative scores count. A wrong label harms the queries of two classes, and helps others;
    in the sum of all scores, these cancel.
    """
    scaled = scores / scores.norm(dim=1, keepdim=True).clamp_min(1e-30)
    opposition: Tensor = (-scaled).clamp_min(0).sum(dim=0)
    return opposition


def _label_scores(
    suspicion: Float[Tensor, " n_train"], history: LossHistory | None
) -> Float[Tensor, " n_train"]:
    """Return scores from 0 to 1, low for suspicious labels, as cleanlab's.

    For a cross-entropy, it is the geometric mean of the label's probability over the visits; else
    the share of samples that are at least as suspicious.
    """
    if history is not None and history.loss == "cross-entropy":
        return (-suspicion).exp().nan_to_num(posinf=1.0)
    ordered = suspicion.sort().values
    return 1 - torch.searchsorted(ordered, suspicion, right=True).double() / len(suspicion)


def _notes(
    store: Store, history: LossHistory | None, suspicion: Float[Tensor, " n"], count: Count
) -> Iterator[Note]:
    yield from _notes_on_losses(store, history)
    n = len(suspicion)
    if n < FEW:
        yield Note(f"{n} samples are too few to count wrong labels: their scores split by chance.")
    if count.separation == 0:
        yield Note(
            "All samples have the same score, as with a single class: no wrong label could have "
            "been found."
        )
    elif count.separation < LEAST_SEPARATION:
        yield Note(
            f"The scores do not fall into two groups (separation {count.separation:.3f}; with a "
            f"tenth of the labels flipped it was above {LEAST_SEPARATION}): the flagged samples "
            "may simply be hard, or the training too short."
        )
    elif count.doubt:
        yield Note(
            f"{count.doubt} Their labels may be right.", remedy="Train longer, or look at them."
        )
    if count.decisive_visits < count.visits:
        yield Note(
            f"Losses of the first {count.decisive_visits} of {count.visits} visits of each sample "
            "count, since they separate best: later, wrong labels may have been memorized."
        )
    never = store.n_train - len(store.visited_ids())
    if never:
        yield Note(f"{never:,} samples were never drawn; their labels were not examined.")
    yield Note(
        "Consistent errors, such as a whole class or a group with the same wrong label, are "
        "learned like correct labels and cannot be found this way."
    )


def _notes_on_classes(
    labelled: Labelled | None, history: LossHistory | None, is_flagged: Bool[Tensor, " n_train"]
) -> Iterator[Note]:
    """Yield a note for each class most of whose samples are flagged, or one if it is unknown."""
    if labelled is None and (history is None or history.loss == "cross-entropy"):
        yield Note(
            "Samples of a rare class are learned late, and may be flagged although their labels "
            "are right.",
            remedy="Pass `model` and `loader` to see whether it is so.",
        )
    if labelled is None:
        return
    for label in torch.unique(labelled.given).tolist():
        flagged = is_flagged[labelled.given == label]
        if 2 * int(flagged.sum()) > len(flagged):
            yield Note(
                f"{int(flagged.sum()):,} of the {len(flagged):,} samples with label {label} are "
                "flagged. Either most of these labels are wrong, or the class is rare and learned "
                "late, and most are right.",
                remedy="Look at them before you remove any.",
            )


def _notes_on_losses(store: Store, history: LossHistory | None) -> Iterator[Note]:
    if history is None:
        yield Note(
            "The run holds no losses, so self-influence ranks the samples. It also finds unusual "
            "samples with correct labels."
        )
    elif history.loss != "cross-entropy":
        yield Note(f"The loss is {history.loss}: the number was tested for classes only.")
    elif has_several_terms(store):
        yield Note(
            "The loss of a sample is the mean of several terms, such as tokens: a single wrong one "
            "may be hidden, and the number was tested for one label per sample only."
        )
