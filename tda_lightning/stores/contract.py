"""StoreContract: tests that every writable store must pass. Test a new store with three lines.

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
from torch import Tensor

from tda_lightning.stores.recipe import Block, Recipe
from tda_lightning.stores.step import (
    OPTIONAL_FACTS,
    Audit,
    ParameterGroup,
    Preconditioner,
    Step,
    StepFacts,
)
from tda_lightning.stores.writable_store import WritableStore

RECIPE = Recipe(
    blocks=(Block("net", "Linear", ("net",), ("net.weight", "net.bias"), 3, 5),),
    left_out=(),
    projector={"name": "Identity"},
    dimension=15,
    train_ids=((0, 7), (11, 13)),
    widths=(15,),
)


def make_steps(count: int, *, groups: int = 1) -> list[Step]:
    """Return steps of 1, 2, ... visits, each with different contents."""
    return [
        Step(
            index=2 * number,
            epoch=number // 3,
            optimizer="SGD",
            groups=tuple(
                ParameterGroup(
                    lr=0.1 / (number + 1 + g), beta2=0.5, share=0.2 + g / 10, owner=float(g)
                )
                for g in range(groups)
            ),
            sample_ids=torch.arange(number + 1) + number,
            weights=torch.full((number + 1,), 1 / (number + 1)),
            sketch=torch.arange(15.0 * (number + 1)).reshape(number + 1, 15) + number,
        )
        for number in range(count)
    ]


def same(a: Step, b: Step) -> bool:
    """Return whether two steps are equal."""
    rows = ("sketch", "curvature_rows")
    return same_facts(a, b) and all(_equal(getattr(a, name), getattr(b, name)) for name in rows)


def same_facts(a: StepFacts, b: StepFacts) -> bool:
    """Return whether two steps are equal apart from their rows."""
    tensors = ("sample_ids", "weights", *OPTIONAL_FACTS)
    facts = ("index", "epoch", "optimizer", "groups", "loss")
    return all(_equal(getattr(a, name), getattr(b, name)) for name in tensors) and all(
        getattr(a, name) == getattr(b, name) for name in facts
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def filled(store: WritableStore, steps: Sequence[Step]) -> WritableStore:
    """Begin a run, append the steps, seal after every second one, and return the store."""
    store.begin(RECIPE)
    for number, step in enumerate(steps):
        store.append(step)
        if number % 2:
            store.seal()
    store.seal()
    return store


class StoreContract(ABC):
    """Tests of a writable store; subclasses implement :meth:`make`."""

    @abstractmethod
    def make(self, folder: Path) -> WritableStore:
        """Return an empty store in ``folder``; the same folder gives the same location."""

    def test_appended_steps_are_read_back(self, tmp_path: Path) -> None:
        """Every step is returned bit for bit, in order."""
        steps = make_steps(7)
        store = filled(self.make(tmp_path), steps)
        assert len(store) == 7
        assert all(same(a, b) for a, b in zip(store, steps, strict=True))
        assert store.recipe == RECIPE

    def test_facts_are_those_of_the_steps(self, tmp_path: Path) -> None:
        """``facts`` returns everything but the rows, also for a slice."""
        steps = make_steps(5, groups=2)
        values = torch.tensor([1.0, 3.0])
        steps[1] = replace(
            steps[1], terms=values, curvature=values / 2, losses=-values, loss="Huber"
        )
        steps[2] = replace(
            steps[2], errors=torch.arange(3.0), margins=-torch.arange(3.0), loss="Huber"
        )
        store = filled(self.make(tmp_path), steps)
        for view, expected in ((store, steps), (store[1:4][::2], steps[1:4:2])):
            assert all(map(same_facts, view.facts, expected))
            assert len(view.facts) == len(expected)
            assert same_facts(view.facts[-1], expected[-1])
        assert same_facts(store.facts[1:3][0], steps[1])
        with pytest.raises(IndexError):
            store.facts[5]

    def test_the_recipe_of_a_run_that_has_just_begun_can_be_amended(self, tmp_path: Path) -> None:
        """The run id stays; the new recipe replaces the old one."""
        store = self.make(tmp_path)
        store.begin(RECIPE)
        run_id = store.run_id
        store.amend(replace(RECIPE, every_n_steps=3))
        for step in make_steps(2):
            store.append(step)
        store.seal()
        assert store.recipe == replace(RECIPE, every_n_steps=3)
        assert store.run_id == run_id
        assert len(store) == 2

    def test_training_ids_may_be_added_to_a_run_with_steps(self, tmp_path: Path) -> None:
        """The steps stay; the new ids are among the training ids."""
        steps = make_steps(3)
        store = filled(self.make(tmp_path), steps)
        store.amend(replace(RECIPE, train_ids=((0, 7), (11, 17))))
        assert store.train_ids().tolist() == [0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15, 16]
        assert all(map(same, store, steps))

    def test_it_is_a_sequence(self, tmp_path: Path) -> None:
        """Negative indices, slices of slices and reversed iteration work."""
        steps = make_steps(7)
        store = filled(self.make(tmp_path), steps)
        assert same(store[-2], steps[5])
        assert [step.index for step in store[1:6][::2]] == [2, 6, 10]
        assert [step.index for step in reversed(store)] == [12, 10, 8, 6, 4, 2, 0]
        assert store[2:4].recipe == RECIPE
        with pytest.raises(IndexError):
            store[7]

    def test_slices_with_a_negative_step_are_refused(self, tmp_path: Path) -> None:
        """A method would treat such a slice as a training that ran backwards."""
        store = filled(self.make(tmp_path), make_steps(5))
        for view, key in ((store, slice(None, None, -1)), (store[:4], slice(3, 1, -2))):
            with pytest.raises(ValueError, match=r"expected a positive one.*`reversed\(run\)`"):
                view[key]

    def test_the_number_of_parameter_groups_may_change(self, tmp_path: Path) -> None:
        """It changes when layers are unfrozen during training."""
        steps = [*make_steps(3), *make_steps(3, groups=2)]
        store = filled(self.make(tmp_path), steps)
        assert [len(step.groups) for step in store] == [1, 1, 1, 2, 2, 2]

    def test_curvature_is_read_back(self, tmp_path: Path) -> None:
        """Steps that were recorded with curvature have it, and no others."""
        steps = make_steps(5)
        rows = torch.arange(30.0).reshape(2, 15)
        steps[1] = replace(
            steps[1], terms=torch.tensor([1.0, 3.0]), curvature=torch.ones(2), loss="Huber"
        )
        steps[3] = replace(steps[3], curvature_rows=rows)
        steps[4] = replace(steps[4], curvature_rows=2 * rows[:1], terms=torch.ones(5))
        store = filled(self.make(tmp_path), steps)
        assert all(same(a, b) for a, b in zip(store, steps, strict=True))

    def test_steps_without_sampled_labels_have_no_rows(self, tmp_path: Path) -> None:
        """In a run that samples labels at some steps, the others differ from unknown ones."""
        steps = [replace(step, curvature_rows=step.sketch[:0]) for step in make_steps(5)]
        steps[3] = replace(steps[3], curvature_rows=3 * steps[3].sketch)
        store = self.make(tmp_path)
        store.begin(replace(RECIPE, curvature="fisher"))
        for step in steps:
            store.append(step)
        store.seal()
        assert all(same(a, b) for a, b in zip(store, steps, strict=True))

    def test_the_coordinates_of_a_step_are_the_last_ones_set(self, tmp_path: Path) -> None:
        """They may be set in an earlier segment, or before the slice."""
        first, second = (
            Preconditioner(torch.full((3,), value), torch.full((5,), value)) for value in (2.0, 3.0)
        )
        steps = make_steps(7)
        steps[1] = replace(steps[1], preconditioner=first)
        steps[5] = replace(steps[5], preconditioner=second)
        store = filled(self.make(tmp_path), steps)
        assert store.preconditioner(0) is None
        later = [store.preconditioner(position) for position in range(1, 7)]
        assert [float(p.rows[0]) for p in later if p] == [2.0] * 4 + [3.0] * 2
        assert [p.columns.shape for p in later if p] == [(5,)] * 6
        in_slice, at_end = store[2:4].preconditioner(), store.preconditioner()
        assert in_slice is not None
        assert torch.equal(in_slice.rows, first.rows)
        assert at_end is not None
        assert torch.equal(at_end.rows, second.rows)

    def test_audits_are_read_back_with_their_steps(self, tmp_path: Path) -> None:
        """Steps without an audit return none."""
        audit = Audit(torch.tensor([4.0]).double(), torch.tensor([1.0]).double(), 2.0, 0.5)
        steps = make_steps(5)
        steps[0], steps[3] = replace(steps[0], audit=audit), replace(steps[3], audit=audit)
        store = filled(self.make(tmp_path), steps)
        assert [step.audit is not None for step in store] == [True, False, False, True, False]
        audits = store.audits()
        assert [stored.left_out for stored in audits] == [2.0, 2.0]
        assert torch.equal(audits[1].explained(), audit.explained())

    def test_ids_are_those_of_the_recipe_and_those_visited(self, tmp_path: Path) -> None:
        """The recipe also lists samples that were never drawn."""
        store = filled(self.make(tmp_path), make_steps(3))
        assert store.train_ids().tolist() == [0, 1, 2, 3, 4, 5, 6, 11, 12]
        assert store.visited_ids().tolist() == [0, 1, 2, 3, 4]

    def test_a_second_run_is_refused_until_the_first_is_cleared(self, tmp_path: Path) -> None:
        """A run is never overwritten by accident."""
        store = filled(self.make(tmp_path), make_steps(3))
        with pytest.raises(FileExistsError, match="already"):
            store.begin(RECIPE)
        store.clear()
        assert len(filled(store, make_steps(2))) == 2

    @pytest.mark.parametrize("index", [0, 1, 5, 6, 7, 100])
    def test_a_resumed_run_keeps_the_steps_before_and_goes_on(
        self, tmp_path: Path, index: int
    ) -> None:
        """A run may be cut anywhere, even within a segment; no step is stored twice."""
        steps = make_steps(7)
        store = filled(self.make(tmp_path), steps)
        run_id = store.run_id
        store.resume(index)
        earlier = [step for step in steps if step.index < index]
        assert [step.index for step in store] == [step.index for step in earlier]
        for step in steps[len(earlier) :]:
            store.append(step)
        store.seal()
        assert all(same(a, b) for a, b in zip(store, steps, strict=True))
        assert store.run_id == run_id is not None

    def test_weights_are_read_back_unless_their_steps_are_dropped(self, tmp_path: Path) -> None:
        """Resuming drops the snapshots of later steps; clearing drops all."""
        store = filled(self.make(tmp_path), make_steps(5))
        assert store.snapshots() == []
        for index in (4, 0, 8):
            store.keep_weights(index, {"net.weight": torch.full((3,), float(index))})
        assert store.snapshots() == store[1:3].snapshots() == [0, 4, 8]
        assert torch.equal(store[1:3].weights_at(4)["net.weight"], torch.full((3,), 4.0))
        with pytest.raises(ValueError, match="no snapshot of the weights before step 5"):
            store.weights_at(5)
        store.resume(4)
        assert store.snapshots() == [0, 4]
        store.clear()
        assert store.snapshots() == []

    def test_every_run_has_a_unique_id(self, tmp_path: Path) -> None:
        """A checkpoint refers to its run by this id."""
        store = self.make(tmp_path)
        assert store.run_id is None
        first = filled(store, make_steps(2)).run_id
        store.clear()
        assert store.run_id is None
        assert filled(store, make_steps(2)).run_id != first
