"""Findings: what a person should look at first, in plain sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.report.evidence import Evidence

Weight = Literal["attention", "fine", "unknown"]
MAX_SHOWN = 12
# Ranks that count where opponents of several queries are compared.
_NEAR = 5


@dataclass(frozen=True)
class Finding:
    """One finding of a report.

    Attributes:
        title: A few words.
        sentences: What was found, what it may mean, and what to do.
        weight: Whether it needs attention, is fine, or could not be examined.
        samples: Ids of the training samples that it is about, most important first.
    """

    title: str
    sentences: tuple[str, ...]
    weight: Weight
    samples: tuple[int, ...] = ()


def find(evidence: Evidence) -> list[Finding]:
    """Return the findings of a run, in the order of a report; those that need attention first."""
    findings = [
        _wrong_answers(evidence),
        _suspected_labels(evidence),
        _repeated_opponents(evidence),
        _copies(evidence),
        _order_of_data(evidence),
    ]
    present = [finding for finding in findings if finding is not None]
    return sorted(present, key=lambda finding: finding.weight != "attention")


# A second peak must rise above the valley before it by this factor, and hold at most this share.
_RISE, _LARGEST_SHARE = 1.5, 0.4
_BINS = 40


def number_set_apart(values: Float[Tensor, " n_train"]) -> int:
    """Return how many self-influences are set apart from the rest, on a logarithmic axis.

    These are the values above Tukey's outer fence (the upper quartile plus three times the distance
    of the quartiles), or those of a second peak of the smoothed histogram, if there is one.

    Args:
        values: Self-influence of each training sample, shape ``(n_train,)``.
    """
    positive = values[values > 0].double()
    if len(positive) < 2:
        return 0
    logs = positive.log()
    low, high = logs.quantile(0.25), logs.quantile(0.75)
    return max(int((logs > high + 3 * (high - low)).sum()), _in_second_peak(logs))


def _in_second_peak(logs: Float[Tensor, " n"]) -> int:
    low, high = float(logs.min()), float(logs.max())
    if high <= low:
        return 0
    counts = torch.histc(logs, _BINS, low, high)
    kernel = torch.tensor([1.0, 2, 3, 4, 3, 2, 1], dtype=logs.dtype)
    smooth = torch.nn.functional.conv1d(counts[None, None], kernel[None, None] / 16, padding=3)[
        0, 0
    ]
    rises = [
        float(min(smooth[:valley].max(), smooth[valley + 1 :].max()) / (smooth[valley] + 1))
        for valley in range(1, _BINS - 1)
    ]
    valley = max(range(len(rises)), key=rises.__getitem__) + 1
    above = int((logs > low + (valley + 0.5) * (high - low) / _BINS).sum())
    is_apart = rises[valley - 1] >= _RISE and above <= _LARGEST_SHARE * len(logs)
    return above if is_apart else 0


def _wrong_answers(evidence: Evidence) -> Finding | None:
    if all(answer.prediction is None for answer in evidence.answers):
        return Finding(
            "The model's answers are unknown",
            (
                "The report could not compare answers with labels: "
                + (evidence.missing_answers or "the queries have no classes as labels."),
                "Queries are sorted by their loss instead. Pass `outputs=`, a function of (module, "
                "batch) that returns the model's predictions.",
            ),
            "unknown",
        )
    if not any(isinstance(answer.prediction, int) for answer in evidence.answers):
        return None
    total, wrong = len(evidence.answers), evidence.wrong
    if not wrong:
        text = f"All {total:,} queries are answered like their labels."
        return Finding("No wrong answers", (text,), "fine")
    top = evidence.scores.opponents(1).ids[:, 0].tolist()
    same = [q for q in wrong if evidence.label(top[q]) == evidence.answers[q].prediction]
    sentences = [f"{len(wrong):,} of {total:,} queries are answered unlike their labels."]
    if same:
        sentences.append(
            f"For {len(same):,} of them, the training sample that pushed hardest toward the error "
            "carries the very label that the model answered. Compare it with the query: it may be "
            "mislabelled, or the two classes may overlap there."
        )
    samples = tuple(dict.fromkeys(top[q] for q in [*same, *wrong]))
    return Finding("Wrong answers", tuple(sentences), "attention", samples[:MAX_SHOWN])


def _suspected_labels(evidence: Evidence) -> Finding:
    count, n_train = number_set_apart(evidence.influence.values), len(evidence.influence.values)
    highest = tuple(evidence.influence.highest(min(MAX_SHOWN, n_train)).ids.tolist())
    meaning = (
        "Such samples fit badly with the others, so the model had to learn them one by one. A "
        "wrong label is the commonest reason; a rare but correct sample is another. Check them "
        "from the top of the ranking, and stop after a stretch of correct ones."
    )
    if count and evidence.suspects is not None and evidence.suspects.flagged_number:
        suspects = evidence.suspects
        first = (
            f"About {suspects.estimated_number:,} of {n_train:,} labels are probably wrong, by "
            "their losses during the training and their self-influence."
        )
        worst = tuple(suspects.ids[:MAX_SHOWN].tolist())
        return Finding("Suspicious labels", (first, meaning), "attention", worst)
    if count:
        first = (
            f"{count:,} of {n_train:,} training samples stand apart from the rest: their own "
            "effect on the model is far larger."
        )
        return Finding("Suspicious training samples", (first, meaning), "attention", highest)
    first = (
        "No group of training samples stands apart from the rest. Single mistakes may still be "
        "among the most unusual samples, shown here."
    )
    return Finding("Unusual training samples", (first, meaning), "fine", highest)


def _repeated_opponents(evidence: Evidence) -> Finding | None:
    k = min(_NEAR, len(evidence.scores.train_ids))
    queries = evidence.wrong or evidence.order
    ids = evidence.scores.opponents(k).ids[queries]
    counts = Counter(ids.flatten().tolist()).most_common(MAX_SHOWN)
    needed = max(3, round(len(queries) / 10))
    often = [(sample, count) for sample, count in counts if count >= needed]
    if not often:
        return None
    kind = "wrongly answered queries" if evidence.wrong else "queries"
    first = (
        f"{len(often):,} training samples are among the {k} most harmful of at least {needed} "
        f"{kind}; number {often[0][0]} is so for {often[0][1]} of them."
    )
    second = "One correction there may repair several answers."
    return Finding(
        "The same samples harm again and again",
        (first, second),
        "attention",
        tuple(sample for sample, _ in often),
    )


def _copies(evidence: Evidence) -> Finding:
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


def _order_of_data(evidence: Evidence) -> Finding:
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
