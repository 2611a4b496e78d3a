"""One page that shows which training samples made the model do that."""

from tda_lightning.applications.retraining.removal import RemovalCurve
from tda_lightning.report.api import report
from tda_lightning.report.findings.finding import Case, Finding
from tda_lightning.report.samples.shown import ShowItem, Shown

__all__ = ["Case", "Finding", "RemovalCurve", "ShowItem", "Shown", "report"]
