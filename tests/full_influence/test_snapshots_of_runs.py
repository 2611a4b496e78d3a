"""Full gradients along a run: the same samples in every pass, and the snapshots of a slice."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch.utils.data import DataLoader, Subset, TensorDataset
from unchecked_calls import require_error

from tda_lightning import FullInfluenceFunction, GradientRecorder, Identity, attribute_by_gradients
from tda_lightning.full_influence import GaussNewton, Woodbury
from tda_lightning.full_influence.full_gradients import FullGradients
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.passes.model_state import preserved_state
from tda_lightning.stores import MemoryStore

X, Y = vectors(11 + 3)[:]
DATA = TensorDataset(X[:11].double(), Y[:11])
QUERIES = TensorDataset(X[11:].double(), Y[11:])
METHOD = FullInfluenceFunction(damping=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def trained(snapshots=2, optimizer=sgd, **settings):
    store, model = MemoryStore(), Plain(mlp(), optimizer=optimizer).double()
    recorder = GradientRecorder(store, projector=Identity(), snapshots=snapshots, **settings)
    trainer = quiet_trainer(recorder, max_epochs=4, precision="64-true")
    trainer.fit(model, loader(DATA, 4))  # twelve steps
    return model, store


def score(model, train=None, queries=QUERIES[:], method=METHOD, **settings):
    train = loader(DATA, 4, shuffle=False) if train is None else train
    return attribute_by_gradients(model, train, queries, method=method, progress=False, **settings)


def shuffled(data, batch_size, **settings):
    generator = torch.Generator().manual_seed(5)
    return DataLoader(data, batch_size, shuffle=True, generator=generator, **settings)


def test_a_loader_that_draws_other_samples_in_each_pass_is_refused():
    model, store = trained()
    with pytest.raises(
        ValueError, match=r"the same samples in every pass: ids \d.*all 6 passes, one for"
    ):
        score(model, shuffled(DATA, 4, drop_last=True), run=store)
    once = score(model, shuffled(DATA, 4, drop_last=True))  # without a run there is one pass
    assert len(once.train_ids) == 8


def test_the_order_of_a_pass_does_not_matter():
    model, store = trained()
    ordered = loader(DATA, 4, shuffle=False)  # labels are drawn batch by batch
    expected = score(model, run=store)
    actual = score(model, shuffled(DATA, 4), run=store, curvature_loader=ordered)
    assert torch.equal(actual.train_ids, expected.train_ids)
    torch.testing.assert_close(actual.values, expected.values)


def test_a_shuffling_query_loader_is_read_only_once():
    model, store = trained()
    order = [int(number) for number in torch.cat([y for _, y in shuffled(numbered(), 2)])]
    expected = score(model, run=store, at="snapshots").values[order]
    actual = score(model, queries=shuffled(QUERIES, 2), run=store, at="snapshots").values
    torch.testing.assert_close(actual, expected)


def numbered():
    return TensorDataset(torch.zeros(3), torch.arange(3))


@pytest.mark.parametrize(
    ("part", "steps"),
    [
        (slice(0, 5), [0, 2, 4]),
        (slice(0, 4), [0, 2, 4]),  # including the one after its last step
        (slice(3, 7), [4, 6]),
        (slice(9, None), [10]),
        (slice(None), [0, 2, 4, 6, 8, 10]),
    ],
    ids=str,
)
def test_a_slice_of_a_run_has_the_snapshots_of_its_steps(part, steps):
    model, store = trained()
    actual = score(model, run=store[part])
    assert actual.provenance["along"] == f"{len(steps)} snapshots, steps {steps[0]} to {steps[-1]}"
    fewer = MemoryStore()
    fewer.begin(store.recipe)
    for step in store[part]:
        fewer.append(step)
    for snapshot in steps:
        fewer.keep_weights(snapshot, store.weights_at(snapshot))
    assert torch.equal(actual.values, score(model, run=fewer).values)


def test_the_snapshot_after_the_last_recorded_step_counts_where_steps_are_skipped():
    model, store = trained(snapshots=6, every_n_steps=3)
    assert ([step.index for step in store], store.snapshots()) == ([0, 3, 6, 9], [0, 6])
    assert score(model, run=store[:2]).provenance["along"] == "2 snapshots, steps 0 to 6"


def test_a_slice_without_snapshots_is_refused():
    model, store = trained(snapshots=6)
    with pytest.raises(ValueError, match="no snapshot of the weights at its steps 2 to 3"):
        score(model, run=store[2:4])


@pytest.mark.parametrize(
    ("optimizer", "preconditioner"),
    [
        ("AdamW", "none"),
        pytest.param("Adamax", "optimizer", marks=pytest.mark.slow),
        pytest.param("Rprop", "optimizer", marks=pytest.mark.slow),
        pytest.param("Adadelta", "optimizer", marks=pytest.mark.slow),
    ],
)
def test_learning_rates_suggest_a_damping_only_for_gradient_steps(optimizer, preconditioner):
    model, store = trained(
        optimizer=lambda p: getattr(torch.optim, optimizer)(p, lr=0.01),
        preconditioner=preconditioner,
    )
    by_default = FullInfluenceFunction(Woodbury(draws=8))
    with pytest.warns(UserWarning, match=f"Steps of {optimizer} are not gradient steps") as warned:
        actual = score(model, method=by_default, run=store)
    assert len(warned) == 1
    gradients = FullGradients(model, select_parameters(model), store)
    objective = gradients.objective(loader(DATA, 4, shuffle=False), None, progress=False)
    with preserved_state(model, "eval"):
        operator = by_default.solver.operator(objective, GaussNewton())
    damping = by_default.solver.default_damping(operator)
    given = FullInfluenceFunction(Woodbury(draws=8), damping=damping)
    expected = score(model, method=given, run=store)  # without a warning
    assert torch.equal(expected.values, actual.values)


def test_data_with_non_finite_gradients_are_named():
    model, (x, y) = Plain(mlp()).double(), DATA[:]
    x = x.clone()
    x[[3, 7], 2] = torch.nan
    wrong = loader(TensorDataset(x, y), 11)
    with pytest.raises(ValueError, match=r"`train_loader` yields samples.*infinite: [37], [37];"):
        score(model, wrong, curvature_loader=loader(DATA, 4))


def test_errors_name_the_loader_with_the_wrong_data():
    model, empty = Plain(mlp()).double(), loader(Subset(DATA, []), shuffle=False)
    with pytest.raises(ValueError, match="`curvature_loader` is an empty loader; expected"):
        score(model, curvature_loader=empty)
    with pytest.raises(ValueError, match="`train_loader` is an empty loader; expected"):
        score(model, empty)
    other = loader(TensorDataset(X.double()[:, :5], Y), 4)
    with pytest.raises(ValueError, match="training_step` failed on `curvature_loader`"):
        score(model, curvature_loader=other)


CALLS = """
score = lambda **settings: attribute_by_gradients(model, batches, queries, **settings)
calls = {
    "several runs": lambda: score(run=[store, store]),
    "a number for a run": lambda: score(run=3),
    "a moment without a run": lambda: score(at="snapshots"),
    "an unknown moment": lambda: score(run=store, at="snapshot"),
    "an unknown reduction": lambda: score(reduction="avg"),
    "a string for batch_dims": lambda: score(batch_dims="flattened"),
    "no model": lambda: attribute_by_gradients(None, batches, queries),
    "a class for a model": lambda: attribute_by_gradients(Plain, batches, queries),
}
"""
EXPECTED = {
    "several runs": "`run` is a list of 2; expected one recorded training.",
    "a number for a run": "`run` is a `int`; expected the folder of a recorded run, or its store.",
    "a moment without a run": "`at='snapshots'` was passed without a run; expected `run=`",
    "an unknown moment": '`at` is \'snapshot\'; expected "now", "model", "snapshots", or',
    "no model": "`model` is a `NoneType`; expected the LightningModule that was trained",
    "a class for a model": "expected the LightningModule that was trained: an object",
    "a string for batch_dims": "`batch_dims` is 'flattened'; expected an object such as",
    "an unknown reduction": "`reduction` is 'avg'; expected one of 'mean', 'sum'.",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_with_the_expected_value(name):
    require_error(CALLS, name, EXPECTED[name])
