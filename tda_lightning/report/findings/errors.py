"""Wrong answers, with the training samples and the attributes behind them."""

from __future__ import annotations

from collections import Counter

from tda_lightning.applications.shortcuts import SIGNIFICANT, Effect
from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Case, Finding

# Ranks that count where opponents of several queries are compared.
_NEAR = 5
# Opponents that are shown beside a wrong answer.
_BESIDE = 3
_MAX_EFFECTS = 5


def wrong_answers(evidence: Evidence) -> Finding | None:
    """Show the wrong answers and their opponents; ``None`` if answers are no classes."""
    if all(answer.prediction is None for answer in evidence.answers):
        return _unknown_answers(evidence)
    if not any(isinstance(answer.prediction, int) for answer in evidence.answers):
        return None
    total, wrong = len(evidence.answers), evidence.wrong
    are = "query is" if total == 1 else "queries are"
    if not wrong:
        text = f"All {total:,} queries are answered like their labels."
        return Finding("No wrong answers", (text,), "fine")
    k = min(_BESIDE, len(evidence.scores.train_ids))
    opponents = evidence.scores.opponents(k).ids.tolist()
    sentences = [
        f"{len(wrong):,} of {total:,} {are} answered wrong.",
        "Beside each: the training samples that pushed hardest toward the wrong answer, with their "
        "labels.",
        *_same_labels(evidence, opponents),
        *_suspicious_opponents(evidence, opponents),
    ]
    cases = [Case(query, tuple(opponents[query])) for query in wrong[:MAX_SHOWN]]
    return Finding("Wrong answers", tuple(sentences), "attention", cases=tuple(cases))


def _unknown_answers(evidence: Evidence) -> Finding:
    reason = evidence.missing_answers or "the queries have no classes as labels."
    sentences = (
        f"The report could not compare answers with labels: {reason.rstrip('.')}.",
        "Queries are sorted by their loss instead. Pass `outputs=`, a function of (module, batch) "
        "that returns the model's predictions.",
    )
    return Finding("The model's answers are unknown", sentences, "unknown")


def _same_labels(evidence: Evidence, opponents: list[list[int]]) -> list[str]:
    same = sum(
        evidence.label(opponents[query][0]) == evidence.answers[query].prediction
        for query in evidence.wrong
    )
    if not same:
        return []
    return [
        f"For {same:,} of them, the strongest one carries the very label that the model answered. "
        "It may be mislabelled, or the two classes may overlap there."
    ]


def _suspicious_opponents(evidence: Evidence, opponents: list[list[int]]) -> list[str]:
    flagged = evidence.flagged
    count = sum(not flagged.isdisjoint(opponents[query]) for query in evidence.wrong)
    if not count:
        return []
    return [
        f"{count:,} of these wrong answers rest on a training sample with a suspicious label. "
        "Check those labels first; they are framed."
    ]


def repeated_opponents(evidence: Evidence) -> Finding | None:
    """Find training samples that are opponents of several queries; ``None`` if there are none.

    Where all classes are answered right, there is nothing to repair, and opponents are no finding.
    """
    if not evidence.wrong and any(isinstance(a.prediction, int) for a in evidence.answers):
        return None
    k = min(_NEAR, len(evidence.scores.train_ids))
    queries = evidence.wrong or evidence.order
    ids = evidence.scores.opponents(k).ids[queries]
    counts = Counter(ids.flatten().tolist()).most_common(MAX_SHOWN)
    needed = max(3, round(len(queries) / 10))
    often = [(sample, count) for sample, count in counts if count >= needed]
    if not often:
        return None
    kind = "wrongly answered queries" if evidence.wrong else "queries"
    first, most = often[0]
    each = "samples each harm" if len(often) > 1 else "sample harms"
    sentences = (
        f"{len(often):,} training {each} at least {needed} {kind}.",
        f"Number {first} is among the {k} strongest opponents of {most} of them. One correction "
        "there may repair several answers.",
    )
    samples = tuple(sample for sample, _ in often)
    return Finding("The same samples harm again and again", sentences, "attention", samples)


def shortcuts(evidence: Evidence) -> Finding:
    """Report the attributes of training samples that drive the wrong answers, or all answers."""
    shortcut = evidence.shortcut
    if shortcut is None:
        return Finding(
            "Shortcuts were not searched", (_reason_without_shortcut(evidence),), "unknown"
        )
    behind = "wrong answers" if evidence.wrong else "answers"
    effects = [_describe(effect) for effect in shortcut.effects[:_MAX_EFFECTS]]
    strongest = shortcut.effects[0]
    if strongest.p_value > SIGNIFICANT:
        first = f"None of the {len(shortcut.effects)} attributes drives the {behind} significantly."
        if len(shortcut.effects) == 1:
            first = f"The attribute “{strongest.attribute}” does not drive the {behind}."
        return Finding("No shortcut was found", (first, *effects), "fine")
    first = f"The attribute “{strongest.attribute}” of training samples drives the {behind}."
    how = (
        "Samples with it push toward these answers more than samples of the same class without it. "
        "Effects are in standard deviations of chance:"
    )
    members = set(evidence.members_of(strongest.attribute))
    strong = [sample for sample in shortcut.ids.tolist() if sample in members]
    return Finding("A shortcut", (first, how, *effects), "attention", tuple(strong[:MAX_SHOWN]))


def _describe(effect: Effect) -> str:
    return (
        f"“{effect.attribute}”: {effect.effect:+.1f} (p = {effect.p_value:.2g}), "
        f"{effect.n_samples:,} training samples."
    )


def _reason_without_shortcut(evidence: Evidence) -> str:
    if evidence.attributes:
        return "The model's answers are unknown, so nothing could be tested."
    return (
        "Name suspected attributes of the training samples, such as a watermark or a hospital. The "
        "report then tests whether they drive the wrong answers (argument: attributes)."
    )
