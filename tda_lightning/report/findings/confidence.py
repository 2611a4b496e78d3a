"""Confidence: how far the answers can be trusted, and why a report may miss something."""

from __future__ import annotations

from dataclasses import dataclass

from tda_lightning.applications.retraining.removal import RANDOM, RemovalCurve
from tda_lightning.report.evidence.gathering import Evidence

# The least share of the gradient that counts as complete, and the least rank correlation of two
# methods that counts as agreement.
_COMPLETE, _AGREE = 0.99, 0.5
_FEW_QUERIES = 20


@dataclass(frozen=True)
class Check:
    """One reason to trust the answers, or not to.

    Attributes:
        title: A few words.
        figure: The measured number.
        sentence: What the number means.
        is_good: Whether it speaks for the answers; ``None`` if it is unknown.
    """

    title: str
    figure: str
    sentence: str
    is_good: bool | None


def checks(evidence: Evidence) -> list[Check]:
    """Return how far the answers can be trusted."""
    return [
        _recorded(evidence),
        _covered(evidence),
        _agreement(evidence),
        _retraining(evidence.removal),
    ]


def doubts(evidence: Evidence) -> list[str]:
    """Return why the report may be silent although something is wrong."""
    return [*_of_the_scores(evidence), *_of_the_recording(evidence), *_not_searched(evidence)]


def _of_the_scores(evidence: Evidence) -> list[str]:
    reasons = []
    if evidence.removal is None:
        reasons.append(
            "Scores estimate what retraining without a sample would change. Nothing was retrained "
            "for this page."
        )
    reasons.append(
        "Only the weights of this one training were examined. Another random seed shifts the ranks "
        "of samples that matter little."
    )
    if len(evidence.answers) < _FEW_QUERIES:
        reasons.append(
            f"There are only {len(evidence.answers)} queries. Errors of other kinds are not on "
            "this page."
        )
    return reasons


def _of_the_recording(evidence: Evidence) -> list[str]:
    recipe, reasons = evidence.store.recipe, []
    if recipe.every_n_steps > 1:
        reasons.append(
            f"One step in {recipe.every_n_steps} was recorded. A sample that was drawn in the "
            "other steps alone has the score 0."
        )
    if recipe.left_out:
        names = ", ".join(entry.name for entry in recipe.left_out[:3])
        reasons.append(f"Some parameters were not recorded: {names}.")
    return reasons


def _not_searched(evidence: Evidence) -> list[str]:
    notes = () if evidence.suspects is None else evidence.suspects.notes
    reasons = [note.reason for note in notes]  # Readers of the page cannot act on the remedies.
    if evidence.suspects is None:
        reasons.append(
            "The loss is no cross-entropy, so labels were examined by their self-influence alone."
        )
    if not evidence.train.was_read:
        reasons.append("The training set is too large to be searched for copies here.")
    elif evidence.duplicates is not None:
        reasons.append("Copies with different labels are found only if they are exact.")
    if evidence.shortcut is None:
        reasons.append("No attribute was tested as a shortcut, such as a watermark or a source.")
    else:
        reasons.append("A shortcut by an attribute that was not passed cannot be found.")
    return reasons


def _recorded(evidence: Evidence) -> Check:
    audits = evidence.store.audits()
    title = "Is the recording complete?"
    if not audits:
        sentence = "No step of this run was audited, so nothing is known about its completeness."
        return Check(title, "unknown", sentence, None)
    least = min(audit.explained_in_all() for audit in audits)
    sentence = (
        "This share of the gradient that trained the model is explained by the recorded samples. "
        + (
            "One step was audited."
            if len(audits) == 1
            else f"It is the least of {len(audits):,} audited steps."
        )
    )
    return Check(title, f"{least:.1%}".replace("%", " %"), sentence, least >= _COMPLETE)


def _covered(evidence: Evidence) -> Check:
    stride = evidence.store.recipe.every_n_steps
    sentence = (
        "Every step of the recorded training counts."
        if stride == 1
        else f"One step in {stride} was recorded and stands for its neighbours."
    )
    share = f"{1 / stride:.0%}".replace("%", " %")
    return Check("Was every step recorded?", share, sentence, stride == 1)


def _agreement(evidence: Evidence) -> Check:
    title = "Do two methods agree?"
    if evidence.agreement is None or evidence.agreement.isnan().all():
        return Check(title, "unknown", "Only one method was used.", None)
    mean = float(evidence.agreement.nanmean())
    verdict = "They agree on the whole" if mean >= _AGREE else "They often disagree"
    names = [scores.method.split("(")[0] for scores in evidence.parts]
    sentence = (
        f"Rank correlation of {names[0]} and {names[1]}, whose mean this page uses, averaged over "
        f"the queries. {verdict}: 1 is the same order, 0 is no relation."
    )
    return Check(title, f"{mean:.2f}", sentence, mean >= _AGREE)


def _retraining(curve: RemovalCurve | None) -> Check:
    title = "Does retraining confirm it?"
    if curve is None or curve.method is None:
        sentence = (
            "The strongest test is to remove the most helpful samples, to train again, and to see "
            "the loss rise. It was not made here."
        )
        return Check(title, "not tested", sentence, None)
    change, size = curve.changes[curve.method][-1], f"{curve.removed[-1]:,}"
    sentence = (
        f"Change of the mean loss of the queries after training without the {size} most helpful "
        f"training samples by {curve.method}"
    )
    if RANDOM not in curve.changes:
        return Check(title, f"{change:+.3g}", f"{sentence}.", change > 0)
    by_chance = curve.changes[RANDOM][-1]
    sentence += f"; without as many random ones it is {by_chance:+.3g}."
    return Check(title, f"{change:+.3g}", sentence, change > max(by_chance, 0))
