"""The command line ``tda-lightning``: inspect, query and export recorded runs."""

from tda_lightning.cli.main import main

__all__ = ["main"]
