"""Plots for papers and notebooks, by matplotlib (extra ``plots``)."""

from tda_lightning.report.plots.curves import plot_lds, plot_removal, plot_self_influence
from tda_lightning.report.plots.grid import plot_proponents

__all__ = ["plot_lds", "plot_proponents", "plot_removal", "plot_self_influence"]
