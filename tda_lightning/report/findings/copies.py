"""Copies in the training set."""

from __future__ import annotations

from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Finding


def copies(evidence: Evidence) -> Finding:
    """Compare the contents of the training samples."""
    train = evidence.train
    if not train.was_read:
        text = f"The training set has {len(train.ids):,} samples, too many to compare here."
        return Finding("Copies were not searched", (text,), "unknown")
    mixed = [group for group in train.copies if len({train.labels[i] for i in group}) > 1]
    if not train.copies:
        text = "No two training samples have exactly equal contents. Near copies were not searched."
        return Finding("No exact copies", (text,), "fine")
    extra = sum(len(group) - 1 for group in train.copies)
    sentences = [f"{extra:,} training samples repeat the contents of another one."]
    if mixed:
        sentences.append(
            f"In {len(mixed):,} groups of copies the labels contradict each other, so at least one "
            "label in each is wrong."
        )
    samples = [i for group in [*mixed, *train.copies] for i in group]
    shown = tuple(dict.fromkeys(samples))[:MAX_SHOWN]
    return Finding("Exact copies", tuple(sentences), "attention" if mixed else "fine", shown)
