"""StoreContract: what every writable store must do. Test a new store with three lines.

.. code-block:: python

    class TestMyStore(StoreContract):
        def make(self, folder):
            return MyStore(folder / "run")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tda_lightning.recipe import Block, Recipe
from tda_lightning.step import Audit, ParameterGroup, Step
from tda_lightning.stores.store import WritableStore

RECIPE = Recipe(
    blocks=(Block("net", "Linear", ("net",), ("net.weight", "net.bias"), 3, 5),),
    left_out=(),
    projector={"name": "Identity"},
    dimension=15,
    train_ids=((0, 7), (11, 13)),
)


def make_steps(count: int, *, groups: int = 1) -> list[Step]:
    """Return steps of 1, 2, ... visits with recognisable contents."""
    return [
        Step(
            index=2 * number,
            epoch=number // 3,
            optimizer="SGD",
            groups=tuple(
                ParameterGroup(lr=0.1 / (number + 1 + g), beta2=0.5) for g in range(groups)
            ),
            sample_ids=torch.arange(number + 1) + number,
            weights=torch.full((number + 1,), 1 / (number + 1)),
            sketch=torch.arange(15.0 * (number + 1)).reshape(number + 1, 15) + number,
        )
        for number in range(count)
    ]


def same(one: Step, other: Step) -> bool:
    """Say whether two steps hold the same."""
    tensors = ("sample_ids", "weights", "sketch")
    facts = ("index", "epoch", "optimizer", "groups")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors) and all(
        getattr(one, name) == getattr(other, name) for name in facts
    )


def filled(store: WritableStore, steps: Sequence[Step]) -> WritableStore:
    """Return the store after it has recorded and sealed the steps, two at a time."""
    store.begin(RECIPE)
    for number, step in enumerate(steps):
        store.append(step)
        if number % 2:
            store.seal()
    store.seal()
    return store


class StoreContract(ABC):
    """Tests that a store in ``tmp_path``, made by :meth:`make`, must pass."""

    @abstractmethod
    def make(self, folder: Path) -> WritableStore:
        """Return a store that holds nothing yet; the same place for the same folder."""

    def test_what_was_appended_comes_back(self, tmp_path: Path) -> None:
        """Every step, bit for bit, in order."""
        steps = make_steps(7)
        store = filled(self.make(tmp_path), steps)
        assert len(store) == 7
        assert all(same(a, b) for a, b in zip(store, steps, strict=True))
        assert store.recipe == RECIPE

    def test_it_is_a_sequence(self, tmp_path: Path) -> None:
        """Negative indices, slices of slices, and reading backwards."""
        steps = make_steps(7)
        store = filled(self.make(tmp_path), steps)
        assert same(store[-2], steps[5])
        assert [step.index for step in store[1:6][::2]] == [2, 6, 10]
        assert [step.index for step in reversed(store)] == [12, 10, 8, 6, 4, 2, 0]
        assert store[2:4].recipe == RECIPE
        with pytest.raises(IndexError):
            store[7]

    def test_the_number_of_parameter_groups_may_change(self, tmp_path: Path) -> None:
        """As it does when layers are unfrozen during training."""
        steps = [*make_steps(3), *make_steps(3, groups=2)]
        store = filled(self.make(tmp_path), steps)
        assert [len(step.groups) for step in store] == [1, 1, 1, 2, 2, 2]

    def test_audits_come_back_with_their_steps(self, tmp_path: Path) -> None:
        """Some steps have one, most have none."""
        audit = Audit(torch.tensor([4.0]).double(), torch.tensor([1.0]).double(), 2.0, 0.5)
        steps = make_steps(5)
        steps[0], steps[3] = replace(steps[0], audit=audit), replace(steps[3], audit=audit)
        store = filled(self.make(tmp_path), steps)
        assert [step.audit is not None for step in store] == [True, False, False, True, False]
        found = store.audits()
        assert [one.left_out for one in found] == [2.0, 2.0]
        assert torch.equal(found[1].explained(), audit.explained())

    def test_ids_are_those_of_the_recipe_and_those_visited(self, tmp_path: Path) -> None:
        """Never-drawn samples are known from the recipe."""
        store = filled(self.make(tmp_path), make_steps(3))
        assert store.train_ids().tolist() == [0, 1, 2, 3, 4, 5, 6, 11, 12]
        assert store.visited_ids().tolist() == [0, 1, 2, 3, 4]

    def test_a_second_run_is_refused_until_the_first_is_cleared(self, tmp_path: Path) -> None:
        """Nothing is overwritten by accident."""
        store = filled(self.make(tmp_path), make_steps(3))
        with pytest.raises(FileExistsError, match="already"):
            store.begin(RECIPE)
        store.clear()
        assert len(filled(store, make_steps(2))) == 2
