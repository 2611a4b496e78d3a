"""Weights, queries or rows that are not finite raise instead of being ranked."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from unchecked_calls import errors_of, require_error

from tda_lightning import GradientRecorder, attribute
from tda_lightning.stores import MemoryStore

DATA = vectors()


def trained():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(DATA))
    return store, model


def test_non_finite_weights_raise_with_their_name():
    store, model = trained()
    with torch.no_grad():
        model.net[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite: `net\.0\.weight` holds NaN or infinity"):
        attribute(store, model, DATA[:3], progress=False)


def test_a_non_finite_query_raises_with_its_position():
    store, model = trained()
    inputs, labels = (tensor.clone() for tensor in DATA[:3])
    inputs[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"gradient of query 1 is not finite.*inputs and targets"):
        attribute(store, model, (inputs, labels), progress=False)


# Type checks read random steps of a run, and could meet the bad step before the method does.
CALLS = """
from dataclasses import replace

def diverged(rows):
    bad = MemoryStore()
    bad.begin(store.recipe)
    for step in store:
        nan = {rows: torch.full_like(step.sketch, torch.nan)} if step.index == 4 else {}
        bad.append(replace(step, **nan))
    return bad

run = diverged("sketch")
assert run[4].index == 4
calls = {
    "TracIn": lambda: attribute(run[1:], model, queries, method=TracIn()),
    "Unrolled": lambda: attribute(run[1:], model, queries, method=Unrolled()),
    "Source": lambda: attribute(run[1:], model, queries, method=Source()),
    "InfluenceFunction": lambda: attribute(run[1:], model, queries, method=InfluenceFunction()),
    "sampled labels": lambda: attribute(diverged("curvature_rows"), model, queries),
    "from the first step": lambda: attribute(run[4:], model, queries),
    "no curvature": lambda: attribute(
        diverged("curvature_rows"), model, queries, method=TracIn()
    ),
    "self-influence": lambda: self_influence(run[1:]),
    "a trajectory": lambda: trajectory(run[1:], model, queries, [3]),
}
"""


@pytest.mark.parametrize(
    "call",
    [
        "TracIn",
        "Unrolled",
        "Source",
        "InfluenceFunction",
        "self-influence",
        "a trajectory",
    ],
)
def test_a_diverged_step_raises_with_the_steps_before_it(call):
    require_error(CALLS, call, "Step 4 of the run has gradients that are not finite")
    require_error(CALLS, call, "use the steps before it, `run[:3]`")


def test_a_run_that_diverged_at_its_first_step_must_be_trained_again():
    require_error(CALLS, "from the first step", "Expected finite rows; train again")


def test_non_finite_rows_of_sampled_labels_raise_only_if_they_are_read():
    expected = "Step 4 of the recording has rows of sampled labels that are not finite"
    require_error(CALLS, "sampled labels", expected)
    assert errors_of(CALLS)["no curvature"] == "no error"
