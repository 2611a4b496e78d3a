"""Plots for papers and notebooks, by matplotlib (extra ``plots``)."""

from tda_lightning.report.plots.curves import plot_lds, plot_removal, plot_self_influence
from tda_lightning.report.plots.grid import plot_proponents
from tda_lightning.report.plots.logging import log_figure

__all__ = ["log_figure", "plot_lds", "plot_proponents", "plot_removal", "plot_self_influence"]
