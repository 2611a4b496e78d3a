"""What is said where weights, queries or rows are not finite, instead of a ranking of nothing."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from unchecked import require_said

from tda_lightning import GradientRecorder, MemoryStore, attribute

DATA = vectors()


def trained():
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(DATA))
    return store, model


def test_weights_that_are_not_finite_are_named():
    store, model = trained()
    with torch.no_grad():
        model.net[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite: `net\.0\.weight` holds NaN or infinity"):
        attribute(store, model, DATA[:3], progress=False)


def test_a_query_that_is_not_finite_is_named():
    store, model = trained()
    inputs, labels = (one.clone() for one in DATA[:3])
    inputs[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"gradient of query 1 is not finite.*inputs and targets"):
        attribute(store, model, (inputs, labels), progress=False)


# Type checks look into runs at random, and would come upon the step before a method does.
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
calls = {
    "TracIn": lambda: attribute(run[1:], model, queries, method=TracIn()),
    "Unrolled": lambda: attribute(run[1:], model, queries, method=Unrolled()),
    "Source": lambda: attribute(run[1:], model, queries, method=Source()),
    "InfluenceFunction": lambda: attribute(run[1:], model, queries, method=InfluenceFunction()),
    "sampled labels": lambda: attribute(diverged("curvature_rows")[1:], model, queries),
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
        "sampled labels",
        "self-influence",
        "a trajectory",
    ],
)
def test_a_step_that_diverged_is_named_with_the_steps_before_it(call):
    require_said(CALLS, call, "Step 4 of the run has gradients that are not finite")
    require_said(CALLS, call, "ask about the steps before it, `run[:3]`")
