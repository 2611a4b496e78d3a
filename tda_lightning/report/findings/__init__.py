"""Findings: what a person should look at first."""

from __future__ import annotations

from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.errors import repeated_opponents, shortcuts, wrong_answers
from tda_lightning.report.findings.finding import Finding
from tda_lightning.report.findings.labels import suspicious_labels
from tda_lightning.report.findings.training_data import exact_copies, near_copies, order_of_data

_ORDER = {"attention": 0, "unknown": 1, "fine": 2}


def find(evidence: Evidence) -> list[Finding]:
    """Return the findings of a run; those that need attention first."""
    findings = [
        wrong_answers(evidence),
        suspicious_labels(evidence),
        shortcuts(evidence),
        repeated_opponents(evidence),
        exact_copies(evidence),
        near_copies(evidence),
        order_of_data(evidence),
    ]
    present = [finding for finding in findings if finding is not None]
    return sorted(present, key=lambda finding: _ORDER[finding.weight])
