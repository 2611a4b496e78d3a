"""Preconditioning: rows and queries in the coordinates of an adaptive optimizer."""

import h5py
import pytest
import torch
from lightning_models import Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, HDF5Store, Identity, TracIn, attribute
from tda_lightning.gradients.parameter_selection import select_parameters
from tda_lightning.gradients.sketching.block_maps import lay_out
from tda_lightning.passes.queries import record_queries
from tda_lightning.recording.preconditioning.second_moments import rank_one_factors, round_to_bits
from tda_lightning.stores import MemoryStore

ADAPTIVE = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


class Moments(TrainingLog):
    """Stores the second moment of every parameter after each step."""

    def __init__(self):
        super().__init__()
        self.moments = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        (optimizer,) = trainer.optimizers
        group = optimizer.param_groups[0]
        self.moments.append(
            {name: self._moment(group, optimizer.state[p]) for name, p in module.named_parameters()}
        )

    def _moment(self, group, state):
        for key in ("max_exp_avg_sq", "exp_avg_sq"):
            if key in state:
                return state[key] / (1 - group["betas"][1] ** int(state["step"]))
        return state.get("square_avg", state.get("sum", torch.zeros(()))).clone()


def double_vectors():
    x, y = vectors().tensors
    return TensorDataset(x.double(), y)


def record(optimizer, *, epochs=2, data=None, **arguments):
    store, log = MemoryStore(), Moments()
    model = Plain(mlp().double(), optimizer=optimizer)
    recorder = GradientRecorder(store, projector=Identity(), **arguments)
    trainer = quiet_trainer(recorder, log, max_epochs=epochs, precision="64-true")
    trainer.fit(model, loader(data or double_vectors()))
    return store, log, model


def in_blocks(model, values):
    """Return the values of parameters as the matrices of the blocks."""
    blocks = select_parameters(model).blocks
    return [lay_out(block, [values[name] for name in block.parameters]) for block in blocks]


def coordinates(store, position):
    """Return the stored coordinates of a step as one matrix per block, in float64."""
    factors, blocks = store.preconditioner(position), store.recipe.blocks
    rows = factors.rows.double().split([block.rows for block in blocks])
    columns = factors.columns.double().split([block.columns for block in blocks])
    return [torch.outer(r, c) for r, c in zip(rows, columns, strict=True)]


def per_sample_gradients(model, weights, batch):
    x, y = batch
    net = {name.removeprefix("net."): value for name, value in weights.items()}

    def loss(w, sample, label):
        return functional.cross_entropy(functional_call(model.net, w, (sample[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(net, x, y)
    return {f"net.{name}": value for name, value in gradients.items()}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_rows_are_gradients_times_the_root_of_the_preconditioner(name):
    store, log, model = record(ADAPTIVE[name])
    for position, (step, weights, batch, moments) in enumerate(
        zip(store, log.weights, log.batches, log.moments, strict=True)
    ):
        gradients = per_sample_gradients(model, weights, batch)
        samples = [
            in_blocks(model, {k: v[i] for k, v in gradients.items()}) for i in range(len(batch[1]))
        ]
        factors = [rank_one_factors([block + 0.0]) for block in in_blocks(model, moments)]
        products = [torch.outer(r, c) for r, c in factors]
        exact = [torch.where(v > 0, v**-0.25, 0) for v in products]
        roots = coordinates(store, position)
        for root, value in zip(roots, exact, strict=True):  # Two factors of five binary digits.
            torch.testing.assert_close(root, value, rtol=2 / 2**5, atol=0, check_dtype=False)
        expected = torch.stack(
            [
                torch.cat([(g * p).flatten() for g, p in zip(sample, roots, strict=True)])
                for sample in samples
            ]
        )
        rows = step.sketch / step.weights[:, None].double()
        torch.testing.assert_close(rows, expected)
        assert step.preconditioner is not None
        assert store.preconditioner(position) is step.preconditioner
    assert store.recipe.preconditioner == "optimizer"


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_a_batch_has_the_same_rows_in_training_and_as_a_query_at_its_step(name):
    store, log, model = record(ADAPTIVE[name], epochs=9)
    assert sum(step.preconditioner is None for step in store) == 7  # 20 of 27 are the warm-up.
    for position, (weights, batch) in enumerate(zip(log.weights, log.batches, strict=True)):
        model.load_state_dict(weights)
        queries = record_queries(model, batch, like=store, at=position)
        step = store[position]
        torch.testing.assert_close(queries, step.sketch / step.weights[:, None].double())


def test_coordinates_are_refreshed_as_training_grows():
    store, _, _ = record(ADAPTIVE["AdamW"], epochs=35)
    indices = [step.index for step in store if step.preconditioner is not None]
    assert indices == [*range(20), 39, 59, 79, 99]


def test_parameters_that_stop_early_do_not_change_when_coordinates_are_refreshed():
    """The optimizer's age is that of its oldest parameter, not of its first."""

    class Early(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].requires_grad_(self.trainer.global_step < 5)

    model, store = Early(mlp().double(), optimizer=ADAPTIVE["AdamW"]), MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store), max_epochs=14, precision="64-true")
    trainer.fit(model, loader(double_vectors()))
    indices = [step.index for step in store if step.preconditioner is not None]
    assert indices == [*range(20), 39]


@pytest.mark.parametrize("bits", [5, 8])
def test_factors_are_rounded_to_the_nearest_of_few_values(bits):
    values = torch.rand(1001, generator=torch.Generator().manual_seed(5)) * 3 + 1
    rounded = round_to_bits(values, bits)
    assert len(rounded.unique()) <= 2 ** (bits - 1) * 2 + 1  # Two octaves.
    assert ((rounded / values - 1).abs() <= 2.0**-bits).all()
    torch.testing.assert_close(round_to_bits(values * 2**-70, bits), rounded * 2**-70)
    special = torch.tensor([0.0, torch.inf])
    assert torch.equal(round_to_bits(special, bits), special)
    assert round_to_bits(torch.tensor([torch.nan]), bits).isnan()


def test_coordinates_take_less_room_than_a_byte_a_factor(tmp_path):
    """They are stored for each of the first steps, and read back as they are."""
    net = torch.nn.Sequential(torch.nn.Linear(7, 3001), torch.nn.Linear(3001, 3))
    torch.manual_seed(0)
    model, store = Plain(net, optimizer=ADAPTIVE["AdamW"]), HDF5Store(tmp_path / "run")
    memory = MemoryStore()
    recorders = [GradientRecorder(store), GradientRecorder(memory)]
    quiet_trainer(*recorders, max_epochs=7).fit(model, loader(vectors()))
    run = HDF5Store.open(tmp_path / "run")
    for position in range(len(memory)):
        factors, expected = run.preconditioner(position), memory.preconditioner(position)
        assert torch.equal(factors.rows, expected.rows)
        assert torch.equal(factors.columns, expected.columns)
    (segment,) = (tmp_path / "run").glob("*.h5")
    with h5py.File(segment) as file:
        parts = [file["preconditioners"][name] for name in ("rows", "columns")]
        stored = sum(part.id.get_storage_size() for part in parts)
        assert len(parts[0]) == 20
        assert stored < sum(part.size for part in parts)


def test_plain_gradient_descent_has_no_coordinates():
    store, _, _ = record(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), epochs=1)
    assert store.preconditioner() is None
    assert store.recipe.preconditioner == "none"


def test_raw_rows_are_gradients():
    store, log, model = record(ADAPTIVE["AdamW"], preconditioner="none")
    assert store.preconditioner() is None
    gradients = per_sample_gradients(model, log.weights[3], log.batches[3])
    first = in_blocks(model, {k: v[0] for k, v in gradients.items()})
    row = store[3].sketch[0] / store[3].weights[0].double()
    torch.testing.assert_close(row, torch.cat([matrix.flatten() for matrix in first]))


def groups_of(rates):
    def optimizer(parameters):
        first, *rest = list(parameters)
        return torch.optim.SGD([{"params": [first]}, {"params": rest, "lr": rates[1]}], lr=rates[0])

    return optimizer


def warmed_up(rates):
    """Return an optimizer whose groups begin with a rate of 0, as after a linear warm-up."""

    def optimizer(parameters):
        groups = groups_of(rates)(parameters)
        warm_up = torch.optim.lr_scheduler.LambdaLR(groups, lambda step: WARMTH[step])
        return [groups], [{"scheduler": warm_up, "interval": "step"}]

    return optimizer


WARMTH = [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("is_warmed_up", [False, True], ids=["constant", "warm-up"])
@pytest.mark.parametrize("rates", [(0.1, 0.02), (0.02, 0.1), (0.1, 0.0)], ids=str)
def test_every_group_contributes_with_its_learning_rate(rates, is_warmed_up):
    store, log, model = record((warmed_up if is_warmed_up else groups_of)(rates), epochs=1)
    query = record_queries(model, double_vectors()[:3], like=store)
    scores = TracIn().attribute(store, query, progress=False)
    weights = {k: v.detach() for k, v in model.named_parameters()}
    query_gradients = per_sample_gradients(model, weights, double_vectors()[:3])
    expected = torch.zeros(3, 13, dtype=torch.float64)
    for step, at, batch in zip(store, log.weights, log.batches, strict=True):
        visits = per_sample_gradients(model, at, batch)
        for number, name in enumerate(visits):
            rate = rates[min(number, 1)] * (WARMTH[step.index] if is_warmed_up else 1)
            inner = query_gradients[name].flatten(1) @ visits[name].flatten(1).mT
            expected[:, step.sample_ids] += rate * inner * step.weights.double()
    torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-9)


def test_weights_without_any_gradient_do_not_contribute():
    """Such as those of pixels that are dark in all training images, and bright in the query."""
    x, y = double_vectors().tensors
    x = x.clone()
    x[:, 2] = 0
    store, _, model = record(ADAPTIVE["AdamW"], data=TensorDataset(x, y), epochs=1)
    dark, bright = x[:3].clone(), x[:3].clone()
    rows = record_queries(model, (dark, y[:3]), like=store)
    column = torch.zeros(11, 7, dtype=torch.bool)
    column[:, 2] = True
    assert rows[:, : 11 * 7][:, column.flatten()].abs().max() == 0
    bright[:, 2] = 5.0
    bright_rows = record_queries(model, (bright, y[:3]), like=store)
    assert bright_rows[:, : 11 * 7][:, column.flatten()].abs().max() == 0


def test_an_audit_measures_the_update_in_the_coordinates_of_the_optimizer():
    """The first step of Adam without momentum is a gradient step in Adam's coordinates."""
    store = MemoryStore()
    model = Plain(
        mlp(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.0, 0.9), eps=1e-12)
    )
    recorder = GradientRecorder(store, projector=Identity(), audit=1)
    quiet_trainer(recorder, max_epochs=1).fit(model, loader(vectors()))
    raw = MemoryStore()
    model = Plain(
        mlp(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.0, 0.9), eps=1e-12)
    )
    recorder = GradientRecorder(raw, projector=Identity(), audit=1, preconditioner="none")
    quiet_trainer(recorder, max_epochs=1).fit(model, loader(vectors()))
    for audit, raw_audit in zip(store.audits(), raw.audits(), strict=True):
        assert audit.explained_in_all() == pytest.approx(1, abs=1e-5)
        assert audit.update > max(raw_audit.update, 0.7)


@pytest.mark.parametrize(("factor", "tolerance"), [(64.0, 1e-5), (4.0**-5, 1e-5), (100.0, 0.05)])
def test_scores_do_not_depend_on_the_scale_of_the_loss(factor, tolerance):
    """Just as the steps of Adam do not; coordinates are rounded alike if it is a power of 4."""

    def scores(factor):
        store = MemoryStore()
        model = Plain(
            mlp().double(),
            loss=lambda o, y: factor * functional.cross_entropy(o, y),
            optimizer=lambda p: torch.optim.Adam(p, lr=0.01, eps=0.0),
        )
        torch.manual_seed(1)
        trainer = quiet_trainer(GradientRecorder(store), precision="64-true")
        trainer.fit(model, loader(double_vectors()))
        result = attribute(store, model, double_vectors()[:3], method=TracIn(), progress=False)
        return result.values / factor

    expected = scores(1.0)
    assert (scores(factor) - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}])
def test_accumulated_and_clipped_steps_have_coordinates(settings):
    store = MemoryStore()
    model = Plain(mlp(), optimizer=ADAPTIVE["AdamW"])
    quiet_trainer(GradientRecorder(store), **settings).fit(model, loader(vectors()))
    assert all(step.preconditioner is not None for step in store)
    assert all(bool(step.sketch.isfinite().all()) for step in store)
