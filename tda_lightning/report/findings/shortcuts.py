"""Shortcuts: attributes of the training samples that drive the model's answers."""

from __future__ import annotations

from tda_lightning.applications.shortcuts import Effect
from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Finding

# The largest p-value, for all attributes together, of a shortcut.
_SIGNIFICANT = 0.05
_MAX_EFFECTS = 5


def shortcuts(evidence: Evidence) -> Finding:
    """Report the attributes of training samples that drive the wrong answers, or all answers."""
    shortcut = evidence.shortcut
    if shortcut is None:
        return Finding("Shortcuts were not searched", (_reason(evidence),), "unknown")
    behind = "wrong answers" if evidence.wrong else "answers"
    effects = [_sentence(effect) for effect in shortcut.effects[:_MAX_EFFECTS]]
    strongest = shortcut.effects[0]
    if strongest.p_value > _SIGNIFICANT:
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


def _sentence(effect: Effect) -> str:
    return (
        f"“{effect.attribute}”: {effect.effect:+.1f} (p = {effect.p_value:.2g}), "
        f"{effect.n_samples:,} training samples."
    )


def _reason(evidence: Evidence) -> str:
    if evidence.attributes:
        return "The model's answers are unknown, so nothing could be tested."
    return (
        "Name suspected attributes of the training samples, such as a watermark or a hospital. The "
        "report then tests whether they drive the wrong answers (argument: attributes)."
    )
