"""Call functions with wrong arguments in a process without runtime type checks.

In the test process itself, beartype would refuse such arguments first.
"""

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
PRINT_ERRORS = """
for name, call in calls.items():
    try:
        call()
        print(name, "no error", sep=": ")
    except Exception as error:
        print(name, type(error).__name__, str(error).replace(chr(10), " "), sep=": ")
"""


@functools.cache
def errors_of(calls: str) -> dict[str, str]:
    """Make calls in a subprocess, and return the error of each, or ``"no error"``.

    Args:
        calls: Python that fills a dictionary ``calls`` of functions by name. It may use a recorded
            ``store`` with its ``model``, ``data``, ``batches`` (a loader), and ``queries``.
    """
    command = [sys.executable, "-W", "ignore", "-c", SETUP + calls + PRINT_ERRORS]
    process = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return dict(line.split(": ", 1) for line in process.stdout.splitlines() if ": " in line)


def require_error(calls: str, name: str, expected: str) -> None:
    """Assert that a call raises a ``ValueError`` whose message contains ``expected``."""
    error = errors_of(calls)[name]
    assert error.startswith("ValueError: ")
    assert expected in error
