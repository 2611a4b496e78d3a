"""Audits: the rows of a step sum to the sketch of the gradient that the optimizer used."""

import copy
import functools
import gc
import warnings

import audit_seeds
import pytest
import torch
import torch._functorch.config as functorch_config
from lightning_models import AppliedGradientsLog, Plain, loader, mlp, quiet_trainer, vectors
from networks import NETS, data_of
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import CountSketch, GradientRecorder, Identity, Kronecker, KroneckerCountSketch
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.stores import MemoryStore


def sketch_of(gradients, model, store, position, projector):
    blocks, preconditioner = store.recipe.blocks, store.preconditioner(position)
    sketcher = projector.bind(blocks, torch.device("cpu"), torch.float32)
    if preconditioner is not None:
        sketcher.precondition(preconditioner)
    total = torch.zeros(sketcher.dimension)
    for number, block in enumerate(blocks):
        matrix = lay_out(block, [gradients[name] for name in block.parameters])
        total += sketcher.sketch_matrix(number, matrix)
    return total


@pytest.mark.parametrize(
    "projector",
    [Identity(), Kronecker(width=5), CountSketch(dimension=53), KroneckerCountSketch(53, width=7)],
    ids=lambda projector: type(projector).__name__,
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    ],
    ids=str,
)
def test_rows_sum_to_the_sketch_of_the_gradient(projector, settings):
    store, log = MemoryStore(), AppliedGradientsLog()
    model = Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    trainer = quiet_trainer(GradientRecorder(store, projector=projector), log, **settings)
    trainer.fit(model, loader(vectors()))
    assert len(store) == len(log.applied) == (4 if "accumulate_grad_batches" in settings else 6)
    for position, (step, gradients) in enumerate(zip(store, log.applied, strict=True)):
        expected = sketch_of(gradients, model, store, position, projector)
        assert (step.sketch.sum(dim=0) - expected).norm() / expected.norm() < 1e-5


# Relative error of the gradient that torch computes in each precision.
ROUNDING = {"32": 1e-4, "bf16-mixed": 2e-2}


def skip_unless_it_runs(net, x, precision):
    """Skip a network that torch itself cannot run: older processors have no bf16 LSTM kernel."""
    try:
        with torch.autocast("cpu", enabled=precision == "bf16-mixed"):
            net(x)
    except RuntimeError as error:
        pytest.skip(f"torch cannot run it in {precision} on this processor: {error}")


# Instance norm subtracts the bias of the convolution in front of it.
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded. Conv2d `net.0.bias`.*no effect")
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("name", NETS)
def test_every_architecture_conserves_its_gradient(name, precision):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, store, log = Plain(make()), MemoryStore(), AppliedGradientsLog()
    projector = KroneckerCountSketch(dimension=211, width=7)
    recorder = GradientRecorder(store, projector=projector)
    trainer = quiet_trainer(recorder, log, max_epochs=1, precision=precision)
    x, y = data_of(shape).tensors
    data = TensorDataset(x.float() if x.is_floating_point() else x, y)
    skip_unless_it_runs(copy.deepcopy(model.net), data[:2][0], precision)
    trainer.fit(model, loader(data))
    for position, (step, gradients) in enumerate(zip(store, log.applied, strict=True)):
        expected = sketch_of(gradients, model, store, position, projector)
        error = (step.sketch.sum(dim=0) - expected).norm() / expected.norm()
        assert error < ROUNDING[precision]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled_first", [False, True], ids=["fresh", "already run"])
def test_compiled_models_are_recorded(compiled_first):
    torch.compiler.reset()
    net = torch.compile(mlp(), backend="eager")
    if compiled_first:
        net(torch.zeros(5, 7)).sum().backward()
    store, log = MemoryStore(), AppliedGradientsLog()
    model = Plain(net)
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log)
    trainer.fit(model, loader(vectors()))
    names = [f"net.{number}.{kind}" for number in (0, 2, 3) for kind in ("weight", "bias")]
    assert [block.name for block in store.recipe.blocks] == names
    for position, (step, gradients) in enumerate(zip(store, log.applied, strict=True)):
        cleaned = {name.replace("_orig_mod.", ""): value for name, value in gradients.items()}
        expected = sketch_of(cleaned, model, store, position, Identity())
        assert (step.sketch.sum(dim=0) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("settings", [{}, {"max_overhead": 1e6}], ids=str)
def test_the_graph_of_a_compiled_model_can_be_differentiated_repeatedly(settings, tmp_path):
    """For coordinates and for sampled labels, also if a smaller batch is compiled separately."""

    def record(net, *others):
        torch.compiler.reset()
        store = MemoryStore()
        recorder = GradientRecorder(store, projector=Identity(), curvature="fisher", **settings)
        model = Plain(net, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
        torch.manual_seed(1)
        quiet_trainer(recorder, *others).fit(model, loader(vectors()))
        return store

    before = getattr(functorch_config, "donated_buffer", None)
    plain = record(mlp())
    other = GradientRecorder(tmp_path / "other")
    compiled = record(torch.compile(mlp(), backend="aot_eager"), other)
    assert getattr(functorch_config, "donated_buffer", None) == before
    assert len(other.store) == len(compiled) == 6
    for expected, step in zip(plain, compiled, strict=True):
        torch.testing.assert_close(step.sketch, expected.sketch, rtol=1e-3, atol=1e-5)
        rows = expected.curvature_rows
        torch.testing.assert_close(step.curvature_rows, rows, rtol=1e-3, atol=1e-5)


def test_weights_carry_accumulation_and_clipping():
    store = MemoryStore()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), **settings)
    trainer.fit(Plain(mlp()), loader(vectors()))
    step = store[0]
    assert len(step.sample_ids) == 10
    assert step.sketch.sum(dim=0).norm() == pytest.approx(1e-3, rel=1e-3)
    assert (step.weights < 1 / 10).all()


def test_an_audit_measures_the_update():
    """The rows explain the whole update of SGD; with momentum, a part of it."""

    def audits(**settings):
        store = MemoryStore()
        model = Plain(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, **settings))
        recorder = GradientRecorder(store, projector=Identity(), audit=1)
        quiet_trainer(recorder).fit(model, loader(vectors()))
        return store.audits()

    assert [audit.update for audit in audits()] == pytest.approx([1.0] * 6, abs=1e-4)
    momentum = audits(momentum=0.9)
    assert momentum[0].update == pytest.approx(1.0, abs=1e-4)
    assert all(audit.update < 0.99 for audit in momentum[1:])
    assert all(audit.explained_in_all() == pytest.approx(1, abs=1e-6) for audit in momentum)


def test_a_weight_that_also_acts_elsewhere_conserves_its_gradient():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(7, 7)
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            return self.head(functional.linear(self.layer(x), self.layer.weight))

    store, log, model = MemoryStore(), AppliedGradientsLog(), Plain(Functional())
    trainer = quiet_trainer(GradientRecorder(store, projector=Identity()), log)
    trainer.fit(model, loader(vectors()))
    assert len(store) == 6
    for position, (step, gradients) in enumerate(zip(store, log.applied, strict=True)):
        expected = sketch_of(gradients, model, store, position, Identity())
        assert (step.sketch.sum(dim=0) - expected).norm() / expected.norm() < 1e-5


PENALTIES = {
    "squares": lambda net: 0.1 * sum(p.square().sum() for p in net.parameters()),
    "one weight": lambda net: 0.1 * net[3].weight.abs().sum(),
    "a bias": lambda net: 0.5 * net[0].bias.sum(),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_on_parameters_is_refused(penalty):
    class Penalized(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + penalty(self.net)

    message = "do not sum to its gradient.*Replace a penalty by `weight_decay=` of the optimizer"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(Penalized(mlp()), loader(vectors()))


def test_a_hook_that_changes_a_gradient_is_refused():
    model = Plain(mlp())
    model.net[3].weight.register_hook(lambda gradient: 1.1 * gradient)
    with pytest.raises(ValueError, match=r"`net.3.weight` do not sum to its gradient: .* 9% off"):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(model, loader(vectors()))


class Half(nn.Module):
    """Computes in float16, and returns float32."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return self.net(x).float()


@pytest.mark.parametrize("name", ["called twice", "layer norm", "conv", "attention"])
def test_gradients_under_float16_autocast_are_conserved(name):
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, store, log = Plain(Half(make())), MemoryStore(), AppliedGradientsLog()
    projector = KroneckerCountSketch(dimension=211, width=7)
    recorder = GradientRecorder(store, projector=projector)
    x, y = data_of(shape).tensors
    quiet_trainer(recorder, log).fit(model, loader(TensorDataset(x.float(), y)))
    for position, (step, gradients) in enumerate(zip(store, log.applied, strict=True)):
        expected = sketch_of(gradients, model, store, position, projector)
        assert (step.sketch.sum(dim=0) - expected).norm() / expected.norm() < 5e-3


class Altered(Plain):
    """Scales the gradient of a weight after the backward pass."""

    factor = 1.0

    def on_after_backward(self):
        if self.factor != 1:
            self.net[3].weight.grad.mul_(self.factor)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("factor", [1.05, 0.0])
def test_a_gradient_that_is_altered_after_the_backward_pass_is_refused(
    factor, precision, optimizer
):
    model = Altered(mlp(), optimizer=lambda p: optimizer(p, lr=0.01))
    model.factor = factor
    trainer = quiet_trainer(GradientRecorder(MemoryStore()), precision=precision)
    with pytest.raises(ValueError, match=f"weight` {'do not sum' if factor else 'was cleared'}"):
        trainer.fit(model, loader(vectors()))


def test_a_later_fit_of_an_accepted_run_warns_instead_of_refusing():
    store = MemoryStore()
    recorder, model = GradientRecorder(store), Altered(mlp())
    trainer = quiet_trainer(recorder, max_epochs=1)
    trainer.fit(model, loader(vectors()))
    model.factor = 1.05
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match=r"`net.3.weight` do not sum .* The run goes on") as caught:
        trainer.fit(model, loader(vectors()))
    assert sum("do not sum" in str(warning.message) for warning in caught) == 1
    assert [step.index for step in store] == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("model", audit_seeds.MODELS)
def test_honest_models_in_mixed_precision_are_accepted_and_faulty_ones_refused(model):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        audit_seeds.be_quiet()
        outcomes = [audit_seeds.outcomes(model, seed) for seed in range(10)]
    for names in outcomes:
        assert names.pop(audit_seeds.HONEST).refusal == ""
        assert "was cleared between the backward pass" in names.pop("gradient x 0").refusal
        assert all("do not sum to its gradient" in fault.refusal for fault in names.values())
        assert len(names) == 3


@pytest.mark.slow
def test_a_compiled_function_in_the_training_step_is_refused():
    class CompilesFunction(Plain):
        @functools.cached_property
        def compiled(self):
            return torch.compile(lambda x: self.net(x), backend="aot_eager")

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.compiled(batch[0]), batch[1])

    torch.compiler.reset()
    with pytest.raises(ValueError, match="compiled function that uses parameters"):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(
            CompilesFunction(mlp()), loader(vectors())
        )
    torch.compiler.reset()
    for _ in range(3):  # Compiled code holds tensors that need several passes.
        gc.collect()
