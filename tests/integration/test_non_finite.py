"""What is said where weights, queries or rows are not finite, instead of a ranking of nothing."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from unchecked_calls import require_said, what_is_said

from tda_lightning import GradientRecorder, attribute
from tda_lightning.stores import MemoryStore

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
assert run[4].index == 4
calls = {
    "TracIn": lambda: attribute(run[1:], model, queries, method=TracIn()),
    "Unrolled": lambda: attribute(run[1:], model, queries, method=Unrolled()),
    "Source": lambda: attribute(run[1:], model, queries, method=Source()),
    "InfluenceFunction": lambda: attribute(run[1:], model, queries, method=InfluenceFunction()),
    "sampled labels": lambda: attribute(diverged("curvature_rows"), model, queries),
    "from the first step": lambda: attribute(run[4:], model, queries),
    "what needs no curvature": lambda: attribute(
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
def test_a_step_that_diverged_is_named_with_the_steps_before_it(call):
    require_said(CALLS, call, "Step 4 of the run has gradients that are not finite")
    require_said(CALLS, call, "ask about the steps before it, `run[:3]`")


def test_what_diverged_at_once_is_to_be_trained_anew():
    require_said(CALLS, "from the first step", "Expected finite rows; train anew")


def test_rows_of_sampled_labels_matter_to_methods_that_read_them():
    expected = "Step 4 of the recording has rows of sampled labels that are not finite"
    require_said(CALLS, "sampled labels", expected)
    assert what_is_said(CALLS)["what needs no curvature"] == "nothing was said"
