"""Rows for sampled labels average to the Gauss-Newton matrix and do not affect training."""

import pytest
import torch
from lightning_models import Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from tda_lightning import GradientRecorder, HDF5Store, Identity
from tda_lightning import record as record_data
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

N = 13
REPEATS = 25  # of each sample in a batch, and so draws of its label in one step


def double_vectors():
    x, y = vectors(N).tensors
    return TensorDataset(x.double(), y)


def repeated(data):
    """Return a dataset with each sample `REPEATS` times; its mean loss is that of the samples."""
    return TensorDataset(*(tensor.repeat_interleave(REPEATS, dim=0) for tensor in data.tensors))


def record(model, data, *, settings=None, batch_size=N, **arguments):
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, projector=Identity(), curvature="fisher", **arguments)
    trainer = quiet_trainer(recorder, log, precision="64-true", **(settings or {}))
    trainer.fit(model, loader(data, batch_size, shuffle=False))
    return store, log


def frozen_sgd(p):
    """Return an optimizer that never moves: each step is another sample at the same weights."""
    return torch.optim.SGD(p, lr=0.0)


def record_draws(model, data, **arguments):
    """Record 300 draws of the label of each sample, all at the same weights."""
    data = repeated(data)
    settings = {"max_epochs": 300 // REPEATS}
    store, _ = record(model, data, settings=settings, batch_size=len(data), **arguments)
    return store


def gauss_newton(net, loss_of, x, y):
    """Return the Gauss-Newton matrix of the loss, with parameters in the order of the rows."""
    weights = dict(net.named_parameters())
    outputs = net(x).detach()
    jacobian = jacrev(lambda w: functional_call(net, w, (x,)))(weights)
    flat = torch.cat([part.flatten(outputs.ndim) for part in jacobian.values()], dim=-1)
    hessian = torch.autograd.functional.hessian(lambda o: loss_of(o, y), outputs)
    size = outputs.numel()
    flat = flat.reshape(size, -1).detach()
    return flat.mT @ hessian.reshape(size, size) @ flat


def mean_curvature(store):
    return sum(step.curvature_rows.mT @ step.curvature_rows for step in store) / len(store)


def small_net(classes=3):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 2), nn.Tanh(), nn.Linear(2, classes)).double()


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_rows_average_to_the_gauss_newton_matrix(share):
    data, net = double_vectors(), small_net()
    model = Plain(net, optimizer=frozen_sgd)
    if share == 1:
        store = record_draws(model, data)
    else:
        store, _ = record(model, data, settings={"max_epochs": 300}, curvature_share=share)
        assert {len(step.curvature_rows) for step in store} == {0, N}
    expected = gauss_newton(net, functional.cross_entropy, *data.tensors)
    error = (mean_curvature(store) - expected).norm() / expected.norm()
    assert error < (0.06 if share == 1 else 0.12)


class Tokens(nn.Module):
    """A classifier of tokens; classes are along axis 1 of the logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.body(x).tanh()).mT


def test_rows_of_sequences_average_to_the_gauss_newton_matrix():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(N, 7, 3, generator=generator).double(),
        torch.randint(4, (N, 7), generator=generator),
    )
    net = Tokens().double()
    store = record_draws(Plain(net, optimizer=frozen_sgd), data)
    expected = gauss_newton(net, functional.cross_entropy, *data.tensors)
    assert (mean_curvature(store) - expected).norm() / expected.norm() < 0.06
    assert store[0].terms.round().tolist() == [7] * N * REPEATS


class FlattenedTokens(nn.Module):
    """A classifier of tokens whose logits are rows, of one sample or of one position in a row."""

    def __init__(self, time_first):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 4)
        self.time_first = time_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_first else x
        return self.head(self.body(x).tanh())[..., 1:].flatten(0, 1)


class TokenTraining(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        y = y.mT if self.net.time_first else y
        return functional.cross_entropy(self.net(x), y.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("time_first", [False, True], ids=["samples first", "time first"])
def test_rows_of_flattened_sequences_average_to_the_gauss_newton_matrix(time_first):
    torch.manual_seed(0)
    x, y = torch.randn(7, 5, 3).double(), torch.randint(3, (7, 5))
    net = FlattenedTokens(time_first).double()
    model = TokenTraining(net, optimizer=frozen_sgd)
    store, _ = record(
        model, TensorDataset(x, y), settings={"max_epochs": 300}, batch_size=7, curvature_share=0.4
    )
    assert store[0].curvature_rows.shape == (7, 44)

    def loss_of(outputs, labels):
        labels = labels.mT if time_first else labels
        return functional.cross_entropy(outputs, labels.flatten())

    expected = gauss_newton(net, loss_of, x, y)
    error = (mean_curvature(store) - expected).norm() / expected.norm()
    assert error < 0.15


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulated", "clipped"],
)
def test_squared_error_of_one_output_has_its_exact_curvature(settings):
    """Curvature is scaled like the gradient that the optimizer used: accumulated, clipped."""
    x = double_vectors().tensors[0][:12]
    net = nn.Linear(7, 1).double()
    model = Plain(net, loss=functional.mse_loss, optimizer=frozen_sgd)
    data = TensorDataset(x, x[:, :1].clone())
    store, log = record(model, data, batch_size=4, settings=settings)
    for step in store:
        inputs = torch.cat([x[step.sample_ids], torch.ones(len(step.sample_ids), 1)], dim=1)
        expected = 2 * (inputs * step.weights[:, None].double()).mT @ inputs
        curvature = step.curvature_rows.mT @ step.curvature_rows
        torch.testing.assert_close(curvature, expected, rtol=1e-6, atol=1e-12)
    assert len(log.batches) == 6


def test_empirical_rows_with_their_weights_have_the_exact_curvature_of_squared_error():
    x, y = double_vectors().tensors
    net = nn.Linear(7, 1).double()
    data = TensorDataset(x, y[:, None].double())
    model = Plain(net, loss=functional.mse_loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    store, _ = record(model, data, batch_size=5)
    for step in store:
        factors = step.sketch * (step.curvature * step.terms / step.weights).sqrt()[:, None]
        expected = step.curvature_rows.mT @ step.curvature_rows
        torch.testing.assert_close(factors.mT @ factors, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("curvature", ["none", "fisher"])
def test_rows_do_not_depend_on_whether_labels_are_sampled(curvature):
    def rows_and_weights(curvature):
        store = MemoryStore()
        model = Plain(mlp())
        torch.manual_seed(5)
        quiet_trainer(GradientRecorder(store, curvature=curvature)).fit(model, loader(vectors()))
        return torch.cat([step.sketch for step in store]), model.net[0].weight

    rows, weights = rows_and_weights("none")
    sampled_rows, sampled_weights = rows_and_weights(curvature)
    assert torch.equal(rows, sampled_rows)
    assert torch.equal(weights, sampled_weights)


class NetWithDropout(nn.Module):
    """Use random numbers, batch statistics, checkpointing and an in-place operation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Linear(11, 5), nn.Dropout(0.3))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(checkpoint(self.middle, self.body(x), use_reentrant=False))


@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded. Linear `net.body.0.bias`")
def test_sampling_labels_does_not_change_training():
    def train(*callbacks):
        torch.manual_seed(5)
        model = Plain(NetWithDropout(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
        quiet_trainer(*callbacks, max_epochs=3).fit(model, loader(vectors()))
        return model.state_dict(), torch.get_rng_state()

    plain_weights, plain_rng = train()
    recorder = GradientRecorder(MemoryStore(), curvature="fisher")
    weights, rng = train(recorder)
    assert all(torch.equal(weights[name], value) for name, value in plain_weights.items())
    assert torch.equal(rng, plain_rng)


class CustomLoss(Plain):
    """A model with a loss that is not recognised on the graph."""

    def training_step(self, batch, batch_idx):
        self.outputs = self.net(batch[0])
        self.labels = batch[1]
        labels = self.labels[:, None]
        return self.outputs.logsumexp(1).mean() - self.outputs.gather(1, labels).mean()


class CustomSampling(CustomLoss):
    """The same model, with a method that samples labels for its loss."""

    def sampled_output_gradients(self, loss, generator):
        p = self.outputs.detach().softmax(dim=1)
        drawn = torch.multinomial(p, 1, generator=generator)
        gradient = p.scatter_add(1, drawn, -torch.ones_like(p[:, :1]))
        return [(self.outputs, gradient / len(p) ** 0.5)]


def test_a_model_can_define_the_sampling_for_a_custom_loss():
    data, net = double_vectors(), small_net()
    store = record_draws(CustomSampling(net, optimizer=frozen_sgd), data)
    expected = gauss_newton(net, functional.cross_entropy, *data.tensors)
    assert (mean_curvature(store) - expected).norm() / expected.norm() < 0.06
    assert store[0].terms is None


def test_a_loss_that_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match=r"Labels cannot be sampled for the loss.*cross-entropy"):
        record(CustomLoss(small_net()), double_vectors())


def test_a_curvature_share_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"`curvature_share` is 0.*above 0"):
        GradientRecorder("run", curvature_share=0.0)


@pytest.mark.parametrize("storage", ["as computed", "int8"])
def test_a_run_on_disk_holds_the_curvature_rows(tmp_path, storage):
    store = HDF5Store(tmp_path / "run", storage=storage)
    model = Plain(mlp())
    quiet_trainer(GradientRecorder(store, curvature="fisher")).fit(model, loader(vectors()))
    run = HDF5Store.open(tmp_path / "run")
    assert run.recipe.curvature == "fisher"
    assert [step.curvature_rows.shape for step in run] == [step.sketch.shape for step in run]


def test_a_pass_without_training_records_the_rows_of_queries():
    data = double_vectors()
    model = Plain(small_net(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    store, _ = record(model, data, batch_size=5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    again = record_data(
        model, loader(data, shuffle=True), like=store, labels="sampled", progress=False
    )
    query_rows = record_queries(model, data[:], like=store)
    for step in again:
        gradients = step.sketch / step.weights[:, None].double()
        torch.testing.assert_close(gradients, query_rows[step.sample_ids])
        assert step.curvature_rows.shape == step.sketch.shape
        assert step.curvature.shape == (len(step.sample_ids),)
    assert sorted(torch.cat([step.sample_ids for step in again]).tolist()) == list(range(N))
    assert again.recipe.curvature == "fisher"
    assert torch.equal(again.preconditioner().rows, store.preconditioner().rows)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_pass_without_training_can_be_stored_on_disk(tmp_path):
    data = double_vectors()
    model = Plain(small_net())
    run, _ = record(model, data)
    target = HDF5Store(tmp_path / "again")
    record_data(model, loader(data), like=run, store=target, progress=False)
    again = HDF5Store.open(tmp_path / "again")
    assert len(again) == 3
    assert again[0].curvature_rows is None
