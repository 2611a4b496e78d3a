"""Faults in the order of the data."""

from __future__ import annotations

from tda_lightning.report.evidence.gathering import Evidence
from tda_lightning.report.findings.finding import MAX_SHOWN, Finding


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
