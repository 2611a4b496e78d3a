"""MemoryStore: a run in memory, for tests and exploration."""

from __future__ import annotations

import uuid

from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import Step
from tda_lightning.stores.store import Weights, require_snapshot
from tda_lightning.stores.writable_store import WritableStore


class MemoryStore(WritableStore):
    """A run in memory, lost when the process ends.

    ``GradientRecorder(MemoryStore())`` records into it.
    """

    def __init__(self) -> None:
        self._recipe: Recipe | None = None
        self._run_id: str | None = None
        self._steps: list[Step] = []
        self._weights: dict[int, Weights] = {}
        self._fingerprint: str | None = None

    @property
    def recipe(self) -> Recipe:
        """How the sketches were made."""
        if self._recipe is None:
            raise ValueError(
                "This `MemoryStore` is empty; expected a recorded run. Record into it first, with "
                "`GradientRecorder(store)`."
            )
        return self._recipe

    @property
    def run_id(self) -> str | None:
        """Unique id of the stored run."""
        return self._run_id

    def __len__(self) -> int:
        return len(self._steps)

    def read(self, position: int) -> Step:
        """Return the step at a position."""
        return self._steps[position]

    def begin(self, recipe: Recipe) -> None:
        """Start a new run."""
        if self._recipe is not None:
            raise FileExistsError(
                f"This `MemoryStore` already holds a run of {len(self)} steps; expected an empty "
                "store. Create a new one, or record with `existing='replace'`."
            )
        self._recipe = recipe
        self._run_id = uuid.uuid4().hex

    def amend(self, recipe: Recipe) -> None:
        """Replace the recipe of a run; once it has steps, ids and names may be added."""
        self._recipe = recipe

    def resume(self, index: int) -> None:
        """Continue the stored run at the optimizer step ``index``."""
        self._steps = [step for step in self._steps if step.index < index]
        self._weights = {at: state for at, state in self._weights.items() if at <= index}
        self._fingerprint = None

    def clear(self) -> None:
        """Delete the run."""
        self._recipe = self._run_id = self._fingerprint = None
        self._steps.clear()
        self._weights.clear()

    def snapshots(self) -> list[int]:
        """Return the indices of the steps with a snapshot, in order."""
        return sorted(self._weights)

    def weights_at(self, index: int) -> Weights:
        """Return the stored model state before a step."""
        require_snapshot(self.snapshots(), index)
        return self._weights[index]

    def keep_weights(self, index: int, weights: Weights) -> None:
        """Store the model state before a step."""
        self._weights[index] = dict(weights)

    @property
    def final_fingerprint(self) -> str | None:
        """Fingerprint of the weights at the end of the training."""
        return self._fingerprint

    def keep_fingerprint(self, fingerprint: str) -> None:
        """Store the fingerprint of the weights at the end of the training."""
        self._fingerprint = fingerprint

    def append(self, step: Step) -> None:
        """Add a step."""
        self._steps.append(step)

    def seal(self) -> None:
        """Do nothing: steps in memory are readable at once."""
