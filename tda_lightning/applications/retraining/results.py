"""Retrainings: the results of a plan, one small file per finished training."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.applications.retraining.plan import Plan
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores.hdf5.folder import is_run
from tda_lightning.stores.integrity.durable import atomic_write


@dataclass(frozen=True)
class Retrainings(ShownInNotebooks):
    """The plan and what was measured after each training.

    Attributes:
        plan: Which samples each training used.
        values: Measurements after each training, shape ``(n_trainings, n_values)``.
    """

    plan: Plan
    values: Float[Tensor, "n_trainings n_values"]

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per training: seed, samples kept, measurements."""
        pd = import_pandas()
        frame = pd.DataFrame(self.values.numpy()).add_prefix("value_")
        frame.insert(0, "kept", self.plan.kept.sum(dim=1).numpy())
        frame.insert(0, "seed", self.plan.seeds.numpy())
        return frame.rename_axis("training")

    def __repr__(self) -> str:
        trainings, values = self.values.shape
        kept = self.plan.kept.sum(dim=1)
        sizes = f"{int(kept.min()):,} to {int(kept.max()):,} of {self.plan.weights.shape[1]:,}"
        return f"Retrainings: {trainings:,} on {sizes} samples, {values:,} measurements each"


class ResultFolder:
    """A folder that holds the result of each finished training of one plan.

    Raises:
        FileExistsError: If it holds a recorded run, or the results of another plan or of other
            functions.
    """

    def __init__(
        self, path: str | Path, plan: Plan, functions: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.path, self._plan = Path(path), plan
        if is_run(self.path):
            raise FileExistsError(
                f"`{self.path}` holds a recorded run; expected a folder for the results of "
                "retrainings. Choose an empty or a new one."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        header = self.path / "plan.json"
        expected = {
            "plan": plan.fingerprint(),
            "trainings": len(plan),
            "functions": {name: _fingerprint(function) for name, function in functions.items()},
        }
        if header.exists():
            self._require_same(json.loads(header.read_text()), expected)
        else:
            with atomic_write(header) as temporary:
                temporary.write_text(json.dumps(expected))

    def _require_same(self, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        if stored["plan"] != expected["plan"]:
            raise FileExistsError(
                f"`{self.path}` holds {stored['trainings']} trainings of another plan; expected "
                "the same plan, to continue it. Choose another folder, or delete this one."
            )
        changed = [
            f"`{name}`"
            for name, fingerprint in expected["functions"].items()
            if stored["functions"].get(name) != fingerprint
        ]
        if changed:
            raise FileExistsError(
                f"`{self.path}` holds trainings with another {' and '.join(changed)}; expected the "
                "same code, so that all results are alike. Choose another folder, or delete this "
                "one."
            )

    def missing(self) -> list[int]:
        """Return the numbers of the trainings without a result."""
        return [number for number in range(len(self._plan)) if not self._file(number).exists()]

    def add(self, number: int, values: Float[Tensor, " n_values"]) -> None:
        """Store the result of a training; a process that is killed leaves no half file.

        All trainings must return the same number of values.
        """
        other = next(
            (path for n in range(len(self._plan)) if (path := self._file(n)).exists()), None
        )
        if other is not None and (length := len(np.load(other))) != len(values):
            raise ValueError(
                f"`measure` returned {len(values)} values after training {number}, and {length} "
                "after another one; expected the same number after every training."
            )
        with atomic_write(self._file(number)) as temporary, temporary.open("wb") as file:
            np.save(file, values.numpy())

    def load(self) -> Retrainings:
        """Return all results."""
        rows = [torch.from_numpy(np.load(self._file(n))) for n in range(len(self._plan))]
        return Retrainings(self._plan, torch.stack(rows))

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.npy"


def _fingerprint(function: Callable[..., Any]) -> str:
    """Return the name of a function, with a hash of its source where there is one."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = inspect.getsource(named)
    except (OSError, TypeError):
        source = ""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return f"{named.__module__}.{named.__qualname__} {digest}"
