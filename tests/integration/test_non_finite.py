"""What is not finite raises, or is left out with a warning; it is never ranked."""

from dataclasses import replace

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from unchecked_calls import errors_of, require_error

from tda_lightning import (
    GradientRecorder,
    HDF5Store,
    InfluenceFunction,
    TracIn,
    Unrolled,
    attribute,
    self_influence,
    trajectory,
)
from tda_lightning.attribution import EmpiricalFisher
from tda_lightning.cli import main
from tda_lightning.stores import MemoryStore
from tda_lightning.stores.contract import filled, make_steps

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


BAD_SAMPLE, BAD_STEP = 8, 1


class Guarded(Plain):
    """A training that zeroes a gradient that is not finite, as many do."""

    moment = "on_before_optimizer_step"

    def _zero(self):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            self.zero_grad()

    def on_before_optimizer_step(self, optimizer):
        if self.moment == "on_before_optimizer_step":
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def on_after_backward(self):
        if self.moment == "on_after_backward":
            self._zero()


class GuardedLate(Guarded):
    moment = "on_after_backward"


def recorded_with_bad_sample(folder, module=Plain, **settings):
    """Record 2 epochs of 3 steps to disk; one sample of the step BAD_STEP holds NaN."""
    x, y = (tensor.clone() for tensor in DATA.tensors)
    x[BAD_SAMPLE] = torch.nan
    data = torch.utils.data.TensorDataset(x, y)
    optimizer = settings.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))
    model, recorder = module(mlp(), optimizer=optimizer), GradientRecorder(folder, **settings)
    name = f"the gradient of sample {BAD_SAMPLE} at step {BAD_STEP} is not finite"
    with pytest.warns(UserWarning, match=name) as record:
        quiet_trainer(recorder).fit(model, loader(data, shuffle=False))
    assert sum("is not finite" in str(warning.message) for warning in record) == 1
    return HDF5Store.open(folder), model


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("module", [Plain, Guarded, GuardedLate])
@pytest.mark.parametrize("curvature", ["none", "fisher"])
def test_a_run_on_disk_with_a_batch_that_is_not_finite_is_readable(
    tmp_path, module, optimizer, curvature
):
    run, _ = recorded_with_bad_sample(
        tmp_path / "run", module, optimizer=optimizer, curvature=curvature
    )
    assert [step.index for step in run] == list(range(6))
    assert BAD_SAMPLE in run[BAD_STEP].sample_ids[run[BAD_STEP].non_finite_visits()]
    assert len(run[0].non_finite_visits()) == 0
    assert [len(run.facts[at].sample_ids) for at in range(6)] == [5, 5, 3] * 2
    for command in ("info", "data", "audit"):
        assert main([command, str(tmp_path / "run")]) == 0


METHODS = [TracIn(), InfluenceFunction(), Unrolled()]


@pytest.mark.parametrize("module", [Guarded, GuardedLate])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_an_answer_leaves_out_visits_that_were_not_applied(tmp_path, module, method):
    run, model = recorded_with_bad_sample(tmp_path / "run", module)
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.warns(UserWarning, match=f"such as that of sample {BAD_SAMPLE} at step"):
        scores = attribute(run, model, DATA[:3], method=method, progress=False)
    assert scores.values.isfinite().all()
    assert scores.provenance["left out as not finite"].startswith(
        f"2: sample {BAD_SAMPLE} at step {BAD_STEP}, sample {BAD_SAMPLE} at step {BAD_STEP + 3}"
    )
    # The gradient of the whole batch was zeroed, so that no sample of it contributed.
    assert torch.equal(run[BAD_STEP].weights, torch.zeros(5))
    finite = run[BAD_STEP].sketch.isfinite().all(dim=1)
    assert not run[BAD_STEP].sketch[finite].any()


def test_other_answers_leave_them_out_too(tmp_path):
    run, model = recorded_with_bad_sample(tmp_path / "run", Guarded)
    with pytest.warns(UserWarning, match="Left out visits"):
        assert self_influence(run, progress=False).values.isfinite().all()
    with pytest.warns(UserWarning, match="Left out visits"):
        curves = trajectory(run, model, DATA[:3], [BAD_SAMPLE], method=TracIn(), progress=False)
    assert not curves.values.any()
    assert "left out as not finite" in curves.provenance


def test_a_run_on_disk_that_diverged_is_answered_up_to_there(tmp_path):
    recorded_with_bad_sample(tmp_path / "run")
    calls = f"""
run = HDF5Store.open({str(tmp_path / "run")!r})
calls = {{
    "all": lambda: attribute(run, model, queries, method=TracIn()),
    "before": lambda: attribute(run[:{BAD_STEP}], model, queries, method=TracIn()),
}}
"""
    require_error(calls, "all", "the training diverged there, or a sample holds NaN")
    require_error(calls, "all", "use the steps before it, `run[:1]`")
    assert errors_of(calls)["before"] == "no error"


@pytest.mark.parametrize("storage", ["as computed", "bfloat16", "float16", "int8"])
def test_every_storage_keeps_which_visits_are_not_finite(tmp_path, storage):
    (step,) = make_steps(5)[4:]
    sketch = step.sketch.clone()
    sketch[2, 3] = torch.nan
    curvature = torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0])
    store = HDF5Store(tmp_path / "run", storage=storage)
    filled(store, [replace(step, sketch=sketch, curvature=curvature, terms=torch.ones(5))])
    read = HDF5Store.open(tmp_path / "run")[0]
    assert read.non_finite_visits().tolist() == [2]
    assert torch.equal(read.curvature.nan_to_num(3.0), torch.arange(1.0, 6.0))


class SquaredError(Plain):
    def training_step(self, batch, batch_idx):
        targets = torch.nn.functional.one_hot(batch[1], 3).float()
        return torch.nn.functional.mse_loss(self.net(batch[0]), targets)


NAMED = rf"scores by `Unrolled.* largest row, of sample {BAD_SAMPLE} at step {BAD_STEP}, holds"


@pytest.mark.parametrize(
    ("factor", "match"), [(1e8, NAMED), (1e10, "curvature matrix holds NaN or infinity")]
)
def test_scores_that_overflow_raise_instead_of_being_ranked(tmp_path, factor, match):
    x, y = (tensor.clone() for tensor in DATA.tensors)
    x[BAD_SAMPLE] *= factor
    data = torch.utils.data.TensorDataset(x, y)
    model = SquaredError(torch.nn.Linear(7, 3), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    recorder = GradientRecorder(tmp_path / "run")
    quiet_trainer(recorder, max_epochs=1).fit(model, loader(data, shuffle=False))
    run = HDF5Store.open(tmp_path / "run")
    assert all(step.sketch.isfinite().all() for step in run)
    method = Unrolled(EmpiricalFisher())  # Weights from the loss would bound the curvature.
    with pytest.raises(ValueError, match=match):
        attribute(run, model, DATA[:3], method=method, progress=False)
    with pytest.raises(ValueError, match=match):
        trajectory(run, model, DATA[:3], [0], method=method, progress=False)
    assert attribute(run, model, DATA[:3], method=TracIn(), progress=False).values.isfinite().all()
