"""Findings in the training data: copies, and faults of the order in which it was drawn."""

from __future__ import annotations

from tda_lightning.applications.neighbors.duplicates import MANY_GROUPED
from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Finding, Weight

# The least share of the training set that is worth a look.
_MANY = 0.01


def exact_copies(evidence: Evidence) -> Finding:
    """Compare the contents of the training samples."""
    train = evidence.train
    if not train.was_read:
        text = f"The training set has {len(train.ids):,} samples, too many to compare here."
        return Finding("Exact copies were not searched", (text,), "unknown")
    mixed = [group for group in train.copies if len({train.labels[i] for i in group}) > 1]
    if not train.copies:
        text = "No two training samples have exactly equal contents."
        return Finding("No exact copies", (text,), "fine")
    extra = sum(len(group) - 1 for group in train.copies)
    repeats = "sample repeats" if extra == 1 else "samples repeat"
    sentences = [f"{extra:,} training {repeats} the contents of another one."]
    if mixed:
        groups = "group" if len(mixed) == 1 else "groups"
        sentences.append(
            f"In {len(mixed):,} {groups} of copies the labels contradict each other, so at least "
            "one label in each is wrong."
        )
    samples = [i for group in [*mixed, *train.copies] for i in group]
    shown = tuple(dict.fromkeys(samples))[:MAX_SHOWN]
    return Finding("Exact copies", tuple(sentences), "attention" if mixed else "fine", shown)


def near_copies(evidence: Evidence) -> Finding:
    """Report training samples with the same label and nearly the same gradients."""
    duplicates = evidence.duplicates
    if duplicates is None:
        text = (
            f"The training set has {len(evidence.train.ids):,} samples, too many to compare in "
            "pairs here. `find_duplicates` does."
        )
        return Finding("Near copies were not searched", (text,), "unknown")
    exact = {sample for group in evidence.train.copies for sample in group}
    groups = [group for group in duplicates.groups if not exact.issuperset(group.tolist())]
    limit = f"the cosine of the gradients is at least {duplicates.threshold:g}"
    if not groups:
        text = (
            f"No two training samples with the same label act on the model alike: {limit} for none."
        )
        return Finding("No near copies", (text,), "fine")
    extra = sum(len(group) - 1 for group in groups)
    acts = "sample acts" if extra == 1 else "samples act"
    sentences = (
        f"{extra:,} training {acts} on the model like another one with the same label.",
        f"Of each of these {len(groups):,} groups ({limit}), one sample may be enough.",
    )
    samples = [sample for group in groups for sample in group.tolist()]
    n = len(duplicates.train_ids)
    if len(duplicates.ids) > MANY_GROUPED * n:
        text = (
            f"{len(duplicates.ids):,} of {n:,} training samples have nearly the same gradient as "
            f"another one ({limit}). So many are rarely copies: the model hardly tells its samples "
            "apart. `find_duplicates` with a model and a loader compares their features instead."
        )
        return Finding("Near copies are unknown", (text,), "unknown", tuple(samples[:MAX_SHOWN]))
    weight: Weight = "attention" if extra >= _MANY * n else "fine"
    return Finding("Near copies", sentences, weight, tuple(samples[:MAX_SHOWN]))


def order_of_data(evidence: Evidence) -> Finding:
    """Report missing and repeated samples, and steps and epochs that repeat others."""
    order = evidence.data_order
    faults = []
    if len(order.never):
        faults.append(f"{len(order.never):,} training samples were never drawn.")
    if order.repeated:
        faults.append(f"Samples were drawn twice within {len(order.repeated):,} epochs.")
    if order.replayed:
        faults.append(f"{len(order.replayed):,} steps repeated the batch of an earlier step.")
    if order.same_order:
        faults.append(
            f"{len(order.same_order):,} epochs drew the samples in the same order as an earlier "
            "one. Was shuffling switched off?"
        )
    if faults:
        samples = tuple(order.never[:MAX_SHOWN].tolist())
        return Finding("The order of the data", tuple(faults), "attention", samples)
    text = "Every recorded epoch drew every sample at most once, each time in another order."
    return Finding("The order of the data is sound", (text,), "fine")
