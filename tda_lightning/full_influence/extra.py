"""The extra: what this room needs besides, and asks for only when it is used."""

from __future__ import annotations

import importlib


def require_operators() -> None:
    """Load the room that knows curvlinops and SciPy.

    Raises:
        ImportError: If they are not installed, naming what to do.
    """
    importlib.import_module("tda_lightning.full_influence.curvlinops_bindings")
