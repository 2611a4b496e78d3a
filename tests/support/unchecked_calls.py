"""Call functions with wrong arguments while runtime type checks are switched off.

With them, beartype would refuse such arguments before the package does.
"""

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jaxtyping

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


@contextlib.contextmanager
def type_checks_disabled() -> Iterator[None]:
    """Let the package check the arguments itself, as outside tests, and ignore warnings."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def inside_an_empty_folder() -> Iterator[None]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    return "no error"


@functools.cache
def errors_of(calls: str) -> dict[str, str]:
    """Return the error of each call, or ``"no error"``.

    Args:
        calls: Python that fills a dictionary ``calls`` of functions by name. It may use a recorded
            ``store`` with its ``model``, ``data``, ``batches`` (a loader), and ``queries``.
    """
    names: dict[str, Any] = {"__name__": "unchecked"}
    with inside_an_empty_folder(), type_checks_disabled():
        exec(SETUP + calls, names)
        return {name: error_of(call) for name, call in names["calls"].items()}


def require_error(calls: str, name: str, expected: str) -> None:
    """Assert that a call raises a ``ValueError`` whose message contains ``expected``."""
    error = errors_of(calls)[name]
    assert error.startswith("ValueError: ")
    assert expected in error
