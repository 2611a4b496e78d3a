"""Retrainings: the results of a plan, one small file per finished training."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tda_lightning.applications.retraining.plan import Plan
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import needs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Retrainings(ShownInNotebooks):
    """The plan and what was measured after each training.

    Attributes:
        plan: Which samples each training used.
        values: Measurements after each training, shape ``(n_trainings, n_values)``.
    """

    plan: Plan
    values: Float[Tensor, "n_trainings n_values"]

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with a row per training: seed, samples kept, measurements."""
        with needs("pandas"):
            import pandas as pd

        frame = pd.DataFrame(self.values.numpy()).add_prefix("value_")
        frame.insert(0, "kept", self.plan.kept.sum(dim=1).numpy())
        frame.insert(0, "seed", self.plan.seeds.numpy())
        return frame.rename_axis("training")

    def __repr__(self) -> str:
        """Show the sizes."""
        trainings, values = self.values.shape
        kept = self.plan.kept.sum(dim=1)
        sizes = f"{int(kept.min()):,} to {int(kept.max()):,} of {self.plan.weights.shape[1]:,}"
        return f"Retrainings: {trainings:,} on {sizes} samples, {values:,} measurements each"


class ResultFolder:
    """A folder that holds the result of each finished training of one plan.

    Args:
        path: The folder; it is created.
        plan: The plan whose results it holds.

    Raises:
        FileExistsError: If the folder holds the results of another plan.
    """

    def __init__(self, path: str | Path, plan: Plan) -> None:
        self.path, self._plan = Path(path), plan
        self.path.mkdir(parents=True, exist_ok=True)
        header = self.path / "plan.json"
        expected = {"plan": plan.fingerprint(), "trainings": len(plan)}
        if header.exists():
            found = json.loads(header.read_text())
            if found != expected:
                raise FileExistsError(
                    f"`{self.path}` holds {found['trainings']} trainings of another plan; expected "
                    "the same plan, to continue it. Choose another folder, or delete this one."
                )
        else:
            _write(header, json.dumps(expected).encode())

    def missing(self) -> list[int]:
        """Return the numbers of the trainings without a result."""
        return [number for number in range(len(self._plan)) if not self._file(number).exists()]

    def add(self, number: int, values: Float[Tensor, " n_values"]) -> None:
        """Store the result of a training; a process that is killed leaves no half file."""
        temporary = self._file(number).with_suffix(".partial.npy")
        np.save(temporary, values.numpy())
        os.replace(temporary, self._file(number))

    def load(self) -> Retrainings:
        """Return all results.

        Raises:
            ValueError: If trainings returned different numbers of values.
        """
        rows = [torch.from_numpy(np.load(self._file(n))) for n in range(len(self._plan))]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ValueError(
                f"`measure` returned from {lengths[0]} to {lengths[-1]} values; expected the same "
                "number after every training."
            )
        return Retrainings(self._plan, torch.stack(rows))

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.npy"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
