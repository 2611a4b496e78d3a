"""Wrong answers, and the training samples behind them."""

from __future__ import annotations

from collections import Counter

from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Finding

# Ranks that count where opponents of several queries are compared.
_NEAR = 5


def wrong_answers(evidence: Evidence) -> Finding | None:
    """Count the wrong answers; ``None`` if answers are numbers instead of classes."""
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


def repeated_opponents(evidence: Evidence) -> Finding | None:
    """Find training samples that are opponents of several queries; ``None`` if there are none."""
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
