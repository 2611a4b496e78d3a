"""Whose steps are gradient steps, downhill and in the coordinates of the rows."""

from dataclasses import replace

import pytest
import torch
from least_squares_runs import METHODS, plain_run, record, scores
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.optim import SGD

from tda_lightning import ContributionTracker, GradientRecorder
from tda_lightning.attribution.dynamics.optimizer import has_plain_rates
from tda_lightning.stores import MemoryStore


class Homemade(torch.optim.AdamW):
    """A user's own, which works as what it is derived from."""


def two_rates(kind):
    def optimizer(parameters):
        first, *rest = parameters
        return kind([{"params": [first], "lr": 0.01}, {"params": rest, "lr": 0.02}])

    return optimizer


KINDS = {
    "SGD": (lambda p: SGD(p, lr=0.1), True),
    "SGD of two rates": (two_rates(SGD), True),
    "ASGD": (lambda p: torch.optim.ASGD(p, lr=0.1), True),
    **{
        name: (lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01), True)
        for name in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")
    },
    "one that is derived from AdamW": (lambda p: Homemade(p, lr=0.01), True),
    **{
        name: (lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01), False)
        for name in ("Adamax", "Rprop", "Adadelta", "Adafactor")
        if hasattr(torch.optim, name)
    },
    "Adamax of two rates": (two_rates(torch.optim.Adamax), False),
}


@pytest.mark.parametrize("name", KINDS)
def test_it_is_known_whose_steps_are_gradient_steps(name):
    optimizer, is_known = KINDS[name]
    assert has_plain_rates(record(optimizer)[0]) == is_known


def test_in_raw_coordinates_the_steps_of_adam_are_no_gradient_steps():
    run, _ = record(lambda p: torch.optim.AdamW(p, lr=0.01), preconditioner="none")
    assert not has_plain_rates(run)


@pytest.mark.parametrize(
    ("name", "preconditioner", "is_known"),
    [
        ("SGD", "none", True),
        ("AdamW", "optimizer", True),
        ("AdamW", "none", False),
        ("Lion", "optimizer", False),
    ],
)
def test_runs_of_older_versions_are_known_by_the_names_of_their_optimizers(
    name, preconditioner, is_known
):
    raw, run = plain_run(), MemoryStore()
    run.begin(replace(raw.recipe, preconditioner=preconditioner))
    for step in raw:
        run.append(replace(step, optimizer=name))
    assert has_plain_rates(run) == is_known


@METHODS
def test_what_is_no_gradient_step_is_said_once(method):
    run, _ = record(lambda p: torch.optim.Adamax(p, lr=0.01))
    with pytest.warns(UserWarning, match="Steps of Adamax are not known to be grad") as said:
        scores(method, run, run[0].sketch[:3])
    assert len(said) == 1


def test_an_optimizer_that_takes_few_turns_is_seen_as_well():
    raw, run = plain_run(), MemoryStore()
    run.begin(raw.recipe)
    for step in raw:
        run.append(replace(step, optimizer="Lion" if step.index == 1 else "SGD"))
    assert not has_plain_rates(run)


def upwards(parameters):
    return SGD(parameters, lr=0.1, maximize=True)


def some_upwards(parameters):
    first, *rest = parameters
    return torch.optim.Adam([{"params": rest}, {"params": [first], "maximize": True}], lr=0.01)


@pytest.mark.parametrize("optimizer", [upwards, some_upwards])
@pytest.mark.parametrize("kind", ["recorder", "tracker"])
def test_steps_that_go_upwards_are_refused(optimizer, kind, tmp_path):
    """What is said to lower a loss would raise it."""
    store, data = MemoryStore(), vectors()
    tracker = ContributionTracker(data[:3], tmp_path / "probe.npz")
    callback = GradientRecorder(store) if kind == "recorder" else tracker
    with pytest.raises(ValueError, match=r"`maximize=True` in the .*Return the negative from"):
        quiet_trainer(callback).fit(Plain(mlp(), optimizer=optimizer), loader(data))
    assert store.run_id is None
