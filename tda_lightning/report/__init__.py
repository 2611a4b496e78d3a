"""One page that shows which training samples made the model do that."""

from tda_lightning.report.api import report
from tda_lightning.report.findings.finding import Finding
from tda_lightning.report.samples.shown import ShowItem, Shown

__all__ = ["Finding", "ShowItem", "Shown", "report"]
