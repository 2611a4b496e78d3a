"""Find what a person should look at first."""

from __future__ import annotations

from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.copies import copies
from tda_lightning.report.findings.data_order import order_of_data
from tda_lightning.report.findings.errors import repeated_opponents, wrong_answers
from tda_lightning.report.findings.finding import Finding
from tda_lightning.report.findings.labels import suspicious_labels


def find(evidence: Evidence) -> list[Finding]:
    """Return the findings of a run, in the order of a report; those that need attention first."""
    findings = [
        wrong_answers(evidence),
        suspicious_labels(evidence),
        repeated_opponents(evidence),
        copies(evidence),
        order_of_data(evidence),
    ]
    present = [finding for finding in findings if finding is not None]
    return sorted(present, key=lambda finding: finding.weight != "attention")
