"""Targets: attribution of quantities other than the loss."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from tda_lightning import (
    GradientRecorder,
    Identity,
    Logit,
    LogProbability,
    Margin,
    TracIn,
    Unrolled,
    attribute,
    top_attributions,
    trajectory,
)
from tda_lightning.passes.queries import record_queries
from tda_lightning.passes.targets import Loss
from tda_lightning.stores import MemoryStore


class Forward(Plain):
    def forward(self, x):
        return self.net(x)


def double_vectors(n=13):
    x, y = vectors(n)[:]
    return TensorDataset(x.double(), y)


def trained(model, data, **settings):
    store = MemoryStore()
    recorder = GradientRecorder(store, projector=Identity(), preconditioner="none")
    defaults = {"precision": "64-true", "max_epochs": 1}
    quiet_trainer(recorder, **{**defaults, **settings}).fit(model, loader(data))
    model.double()
    return store


@pytest.fixture(scope="module")
def run():
    model = Forward(mlp())
    return model, trained(model, double_vectors()), double_vectors()[:7]


def rows_of(run, target):
    model, store, batch = run
    return record_queries(model, batch, like=store, target=target)


def test_the_loss_is_the_default(run):
    model, store, batch = run
    assert torch.equal(rows_of(run, Loss()), record_queries(model, batch, like=store))


def test_the_log_probability_has_the_rows_of_the_cross_entropy(run):
    torch.testing.assert_close(rows_of(run, LogProbability()), rows_of(run, Loss()))


def test_the_rows_of_a_cross_entropy_are_weighted_sums_over_logits(run):
    model, _, (x, y) = run
    residuals = torch.eye(3, dtype=torch.float64)[y] - model(x).softmax(dim=1).detach()
    logits = torch.stack([rows_of(run, Logit(index)) for index in range(3)], dim=1)
    torch.testing.assert_close((residuals[:, :, None] * logits).sum(dim=1), rows_of(run, Loss()))
    torch.testing.assert_close(rows_of(run, Logit()), logits[torch.arange(7), y])


def test_the_rows_of_a_margin_are_those_of_the_loss_over_1_minus_p(run):
    model, _, (x, y) = run
    complement = 1 - model(x).softmax(dim=1).detach()[torch.arange(7), y]
    torch.testing.assert_close(complement[:, None] * rows_of(run, Margin()), rows_of(run, Loss()))


def test_a_margin_is_the_log_odds(run):
    model, _, batch = run
    p = LogProbability()(model, batch).exp()
    torch.testing.assert_close(Margin()(model, batch), torch.log(p / (1 - p)))


@pytest.mark.parametrize("target", [Margin(), Logit(), Logit(1), LogProbability()], ids=repr)
def test_scores_sum_to_the_change_in_the_target(target):
    model = Forward(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-5))
    batch = double_vectors()[:5]
    model.double()
    before = target(model, batch).detach()
    store = trained(model, double_vectors())
    scores = attribute(store, model, batch, method=Unrolled(), target=target, progress=False)
    change = target(model, batch).detach() - before
    torch.testing.assert_close(scores.values.sum(dim=1), change, rtol=1e-3, atol=1e-9)
    assert scores.provenance["target"] == repr(target)


def test_any_function_can_be_a_target_and_queries_are_independent(run):
    model, store, (x, y) = run

    def energy(module, batch):
        return module.net(batch[0]).square().sum(dim=1)

    together = rows_of(run, energy)
    alone = [record_queries(model, (x[i : i + 1], y[i : i + 1]), like=store, target=energy)
             for i in range(7)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone))
    grads = torch.autograd.grad(energy(model, (x[2:3], y[2:3])).sum(), list(model.parameters()))
    torch.testing.assert_close(together[2].norm(), torch.cat([g.flatten() for g in grads]).norm())


def test_top_attributions_and_trajectories_take_targets(run):
    model, store, batch = run
    whole = attribute(store, model, batch, target=Margin(), progress=False)
    top = top_attributions(store, model, batch, 3, target=Margin(), progress=False)
    assert torch.equal(top.proponents.ids, whole.proponents(3).ids)
    over_time = trajectory(store, model, batch, [0, 5], target=Margin(), progress=False)
    torch.testing.assert_close(over_time.values.sum(dim=2), whole.values[:, [0, 5]])


class SequenceModel(pl.LightningModule):
    """A token classifier with shared positions and a layer that needs the generic rule."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.tokens, self.positions = nn.Embedding(11, 6), nn.Embedding(4, 6)
        self.mix, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(4))
        return self.head(self.mix(x)[0])

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sentences(torch.utils.data.Dataset):
    def __init__(self, n):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(11, (n, 4), generator=generator)
        self.labels = torch.randint(3, (n, 4), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


@pytest.fixture(scope="module")
def sequence_run():
    model, data = SequenceModel(), Sentences(10)
    return model, trained(model, data), data[:3]


def test_each_token_is_a_query(sequence_run):
    model, _, batch = sequence_run
    rows = rows_of(sequence_run, LogProbability())
    assert len(rows) == 3 * 4
    for token in range(4):

        def of_token(module, batch, token=token):
            return LogProbability()(module, batch)[:, token]

        torch.testing.assert_close(
            rows.unflatten(0, (3, 4))[:, token], rows_of(sequence_run, of_token)
        )
    grads = torch.autograd.grad(-LogProbability()(model, batch)[1, 2], list(model.parameters()))
    torch.testing.assert_close(rows[6].norm(), torch.cat([g.flatten() for g in grads]).norm())


def test_the_scores_of_tokens_average_to_those_of_their_sample(sequence_run):
    model, store, batch = sequence_run
    tokens = attribute(store, model, batch, target=LogProbability(), progress=False)
    sample = torch.arange(3).repeat_interleave(4)
    whole = attribute(store, model, batch, progress=False)
    torch.testing.assert_close(tokens.grouped(sample).values / 4, whole.values)


@pytest.mark.parametrize("method", [TracIn(), Unrolled()], ids=repr)
def test_grouped_scores_are_those_of_summed_rows(run, method):
    model, store, batch = run
    scores = attribute(store, model, batch, method=method, progress=False)
    groups = [1, 0, 1, 4, 4, 4, 0]
    grouped = scores.grouped(groups)
    assert grouped.query_ids.tolist() == [0, 1, 4]
    rows = record_queries(model, batch, like=store)
    summed = torch.stack([rows[[1, 6]].sum(0), rows[[0, 2]].sum(0), rows[[3, 4, 5]].sum(0)])
    expected = method.attribute(store, summed, progress=False)
    torch.testing.assert_close(grouped.values, expected.values)
    with pytest.raises(ValueError, match=r"expected \(7,\), one label per query"):
        scores.grouped([1, 2])


def test_recording_a_target_preserves_the_state_of_the_model(run):
    model, store, batch = run
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.net.train()
    rng = torch.get_rng_state()
    record_queries(model, batch, like=store, target=Margin())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.net.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda module, batch: module(batch[0]).sum(), r"a tensor of shape \(\).*shape \(7,\)"),
        (lambda module, batch: module(batch[0])[:5, 0], r"\(5,\).*for 7 samples"),
        (lambda module, batch: module(batch[0])[:, 0].detach(), "depends on the parameters"),
        (lambda module, batch: 1.0, "returned a float"),
        (Logit(3), r"Logit\(index=3\)` is out of range.*0 to 2"),
        (Margin(labels=lambda batch: batch[1].double()), "expected integers"),
        (Margin(labels=lambda batch: batch[1] - 100), "Labels range from -100"),
        (Margin(outputs=lambda module, batch: module(batch[0])[:, :1]), "at least two"),
    ],
    ids=["scalar", "too few", "constant", "number", "class", "floats", "ignored", "one output"],
)
def test_an_invalid_target_is_refused(run, target, message):
    with pytest.raises(ValueError, match=r"The target `.*` failed on `queries`.*" + message):
        rows_of(run, target)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(3, 7).double(), "There are no labels in a tensor"),
        ({"data": torch.ones(3, 7)}, "There are no inputs in a batch with the keys"),
        ({"x": torch.ones(3, 7).double()}, "There are no labels in a batch with the keys"),
    ],
    ids=["tensor", "unknown keys", "no labels"],
)
def test_a_batch_without_inputs_or_labels_is_refused(run, batch, message):
    model, store, _ = run
    with pytest.raises(ValueError, match=message):
        record_queries(model, batch, like=store, target=Margin())


def test_a_model_without_forward_needs_an_outputs_function(run):
    model, store, batch = run
    without_forward = Plain(model.net)
    with pytest.raises(ValueError, match="`Plain` has no `forward`"):
        record_queries(without_forward, batch, like=store, target=Margin())
    target = Margin(outputs=lambda module, batch: module.net(batch[0]))
    torch.testing.assert_close(
        record_queries(without_forward, batch, like=store, target=target), rows_of(run, Margin())
    )


class TakesTheBatch(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(batch["x"])


def test_a_forward_that_takes_other_arguments_needs_an_outputs_function(run):
    model, _, (x, y) = run
    module, batch = TakesTheBatch(model.net), {"x": x, "y": y}
    with pytest.raises(ValueError, match=r"`TakesTheBatch.forward` failed .* pass a function"):
        Margin()(module, batch)
    expected = Margin()(model, (x, y))
    found = Margin(outputs=lambda module, batch: module(batch))(module, batch)
    torch.testing.assert_close(found, expected)


def test_the_class_of_a_target_is_refused_by_name(run):
    with pytest.raises(ValueError, match=r"^`target` is the class `Margin`.*Call the class"):
        rows_of(run, Margin)


def test_a_missing_key_of_the_batch_is_named_as_such(run):
    model, store, (x, y) = run
    module = Plain(model.net)
    module.training_step = lambda batch, index: cross_entropy(model.net(batch["x"]), batch["y"])
    with pytest.raises(ValueError, match=r"The error was KeyError: .x.\."):
        record_queries(module, {"inputs": x, "label": y}, like=store)


@pytest.mark.parametrize("remedy", ["A loaded model lacks", "Something is None here"])
def test_an_error_and_its_remedy_are_two_sentences(run, remedy):
    model, store, batch = run
    module = Plain(model.net)
    lost = (lambda: module.lost) if remedy.startswith("A loaded") else (lambda: None.lost)
    module.training_step = lambda batch, index: lost()
    with pytest.raises(ValueError, match=rf"no attribute 'lost'\. {remedy}"):
        record_queries(module, batch, like=store)
