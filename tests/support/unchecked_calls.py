"""Calls with wrong arguments, made where nothing checks types, as these tests do otherwise."""

import functools
import subprocess
import sys
from pathlib import Path

SETUP = """
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import DataLoader
from tda_lightning import *
from tda_lightning.features import *
from tda_lightning.full_influence import *
from tda_lightning.passes.targets import Loss
from tda_lightning.results import *
from tda_lightning.stores import *

data, store, model = vectors(), MemoryStore(), Plain(mlp())
quiet_trainer(GradientRecorder(store, snapshots=1)).fit(model, loader(data))
queries, batches = data[:3], loader(data)
"""
SAY = """
for name, call in calls.items():
    try:
        call()
        print(name, "nothing was said", sep=": ")
    except Exception as error:
        print(name, type(error).__name__, str(error).replace(chr(10), " "), sep=": ")
"""


@functools.cache
def what_is_said(calls: str) -> dict[str, str]:
    """Make calls in a process of their own, and return what each of them raises.

    Args:
        calls: Python that fills a dictionary ``calls`` of functions by name. It finds a recorded
            ``store`` with its ``model``, ``data``, ``batches`` (a loader), and ``queries``.
    """
    command = [sys.executable, "-W", "ignore", "-c", SETUP + calls + SAY]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return dict(line.split(": ", 1) for line in found.stdout.splitlines() if ": " in line)


def require_said(calls: str, name: str, expected: str) -> None:
    """Make sure that a call is refused with what was expected in one sentence."""
    said = what_is_said(calls)[name]
    assert said.startswith("ValueError: ")
    assert expected in said
