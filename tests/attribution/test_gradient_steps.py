"""Which optimizers take gradient steps: downhill, and in the coordinates of the rows."""

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
    """A user-defined optimizer that inherits all behaviour."""


def two_rates(kind):
    def optimizer(parameters):
        first, *rest = parameters
        return kind([{"params": [first], "lr": 0.01}, {"params": rest, "lr": 0.02}])

    return optimizer


KINDS = {
    "SGD": (lambda p: SGD(p, lr=0.1), True),
    "SGD with two rates": (two_rates(SGD), True),
    "ASGD": (lambda p: torch.optim.ASGD(p, lr=0.1), True),
    **{
        name: (lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01), True)
        for name in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")
    },
    "subclass of AdamW": (lambda p: Homemade(p, lr=0.01), True),
    **{
        name: (lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01), False)
        for name in ("Adamax", "Rprop", "Adadelta", "Adafactor")
        if hasattr(torch.optim, name)
    },
    "Adamax with two rates": (two_rates(torch.optim.Adamax), False),
}


@pytest.mark.parametrize("name", KINDS)
def test_optimizers_that_take_gradient_steps_are_recognized(name):
    optimizer, expected = KINDS[name]
    assert has_plain_rates(record(optimizer)[0]) == expected


def test_adam_takes_no_gradient_steps_in_raw_coordinates():
    run, _ = record(lambda p: torch.optim.AdamW(p, lr=0.01), preconditioner="none")
    assert not has_plain_rates(run)


@pytest.mark.parametrize(
    ("name", "preconditioner", "expected"),
    [
        ("SGD", "none", True),
        ("AdamW", "optimizer", True),
        ("AdamW", "none", False),
        ("Lion", "optimizer", False),
    ],
)
def test_in_runs_of_older_versions_optimizers_are_recognized_by_name(
    name, preconditioner, expected
):
    raw, run = plain_run(), MemoryStore()
    run.begin(replace(raw.recipe, preconditioner=preconditioner))
    for step in raw:
        run.append(replace(step, optimizer=name))
    assert has_plain_rates(run) == expected


@METHODS
def test_steps_that_are_no_gradient_steps_give_one_warning(method):
    run, _ = record(lambda p: torch.optim.Adamax(p, lr=0.01))
    with pytest.warns(UserWarning, match="Steps of Adamax are not known to be grad") as caught:
        scores(method, run, run[0].sketch[:3])
    assert len(caught) == 1


def test_an_optimizer_with_a_single_step_is_noticed():
    raw, run = plain_run(), MemoryStore()
    run.begin(raw.recipe)
    for step in raw:
        run.append(replace(step, optimizer="Lion" if step.index == 1 else "SGD"))
    assert not has_plain_rates(run)


def maximizing(parameters):
    return SGD(parameters, lr=0.1, maximize=True)


def partly_maximizing(parameters):
    first, *rest = parameters
    return torch.optim.Adam([{"params": rest}, {"params": [first], "maximize": True}], lr=0.01)


@pytest.mark.parametrize("optimizer", [maximizing, partly_maximizing])
@pytest.mark.parametrize("kind", ["recorder", "tracker"])
def test_maximizing_optimizers_are_refused(optimizer, kind, tmp_path):
    """A sample with a positive score would raise the loss instead of lowering it."""
    store, data = MemoryStore(), vectors()
    tracker = ContributionTracker(data[:3], tmp_path / "probe.npz")
    callback = GradientRecorder(store) if kind == "recorder" else tracker
    with pytest.raises(ValueError, match=r"`maximize=True` in the .*Return the negative from"):
        quiet_trainer(callback).fit(Plain(mlp(), optimizer=optimizer), loader(data))
    assert store.run_id is None
