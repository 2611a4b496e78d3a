"""Recording without a line of code: an environment variable names the store.

Lightning calls this entry point when it creates a Trainer, wherever tda_lightning is installed.
Nothing is recorded unless the variable is set.
"""

from __future__ import annotations

import os

from tda_lightning.callbacks.gradient_recorder import GradientRecorder

VARIABLE = "TDA_LIGHTNING_STORE"


def recorders_from_environment() -> list[GradientRecorder]:
    """Return a recorder with its defaults into ``$TDA_LIGHTNING_STORE``, or none if it is unset."""
    path = os.environ.get(VARIABLE)
    return [GradientRecorder(path)] if path else []
