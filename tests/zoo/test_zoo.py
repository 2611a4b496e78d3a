"""The zoo: models that other people wrote are recorded exactly, answer, and resume.

A few models run by default; the others are slow together. To try one by name, whatever its mark::

    pytest tests/zoo -m "" -k mixtral
"""

import pytest
import torch
from zoo_cases import quiet
from zoo_limits import LEFT_OUT, REFUSED
from zoo_models import ZOO
from zoo_precision import computing_in
from zoo_rows import N, compare, gradients_of, reference
from zoo_training import N_QUERY, N_TRAIN, STEPS, ask, train_and_resume

FAST = ("mlp-weight-norm", "own-parameters", "simclr", "gpt2-padded", "mixtral", "mamba", "t5")
FAST_TO_TRAIN = ("mlp-weight-norm", "own-parameters", "simclr")
ERRORS = {torch.float32: 1e-5, torch.float64: 1e-9}


def every_model(refused=(), fast=FAST):
    """Parametrize by the models; refused ones are expected to fail, all but `fast` are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks_of(name, refused, fast)) for name in ZOO]
    )


def marks_of(name, refused, fast):
    slow = [] if name in fast else [pytest.mark.slow]
    return [*slow, pytest.mark.xfail(reason=refused[name])] if name in refused else slow


def case_named(name):
    """Return the case; skip it if what it is built with is not installed."""
    case = ZOO[name]
    for package in case.packages:
        pytest.importorskip(package)
    return case


def test_the_limits_name_models():
    assert {*FAST, *REFUSED, *LEFT_OUT} <= set(ZOO)


@every_model(REFUSED)
def test_each_row_is_the_gradient_of_its_sample(name):
    assert_rows_are_gradients(name, torch.float32)


@every_model(REFUSED)
def test_each_row_is_the_gradient_of_its_sample_in_double_precision(name):
    assert_rows_are_gradients(name, torch.float64)


def assert_rows_are_gradients(name, dtype):
    comparison = compare(case_named(name), dtype)
    assert comparison.error < ERRORS[dtype]
    left_out = sum(entry.size for entry in comparison.left_out)
    assert comparison.recorded + left_out == comparison.trained
    assert bool(left_out) == (name in LEFT_OUT)


@every_model()
def test_the_references_sum_to_the_gradient(name):
    case = case_named(name)
    model = case.module(torch.float64)
    with quiet(), computing_in(torch.float64):
        model.train(case.mode == "train")
        batch = case.batch(N, torch.float64)
        rows = reference(model, case, batch)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = gradients_of(model.training_step(batch, 0), named.values())
    pairs = [
        (rows[name].sum(dim=0), gradient.flatten())
        for name, gradient in zip(named, gradients, strict=True)
        if name not in case.shared
    ]
    total, gradient = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert (total - gradient).norm() / gradient.norm() < 1e-10


@pytest.mark.parametrize("sampled", [0, 0.25], ids=["rows", "sampled labels"])
@every_model(REFUSED, FAST_TO_TRAIN)
def test_a_resumed_training_answers(name, sampled, tmp_path):
    case = case_named(name)
    if sampled and not case.has_likelihood:
        pytest.skip("its loss is not the negative log-likelihood of labels")
    store, model = train_and_resume(case, tmp_path, sampled)
    assert [step.index for step in store] == list(range(STEPS))
    scores, own = ask(store, model, case)
    assert scores.values.shape == (N_QUERY, N_TRAIN)
    assert own.values.shape == (N_TRAIN,)
    assert scores.values.isfinite().all()
    assert own.values.isfinite().all()
    for step in store:
        assert (step.curvature_rows is not None) == bool(sampled)
