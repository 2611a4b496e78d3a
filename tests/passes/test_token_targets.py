"""Targets per token of a causal language model: the shift, and tokens that are ignored."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import loader, quiet_trainer
from torch import nn
from torch.nn.functional import cross_entropy

from tda_lightning import (
    GradientRecorder,
    Identity,
    Logit,
    LogProbability,
    Margin,
    Scores,
    TracIn,
    attribute,
    top_attributions,
)
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

T, VOCABULARY = 5, 11


class Causal(pl.LightningModule):
    """A recurrent language model: its logits at a token predict the next one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(VOCABULARY, 7)
        self.mix, self.head = nn.GRU(7, 5, batch_first=True), nn.Linear(5, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.mix(self.tokens(tokens))[0])

    def training_step(self, batch, batch_idx):
        logits, labels = self(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
        losses = cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        return losses.sum(dim=1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCABULARY, (7, T), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.fixture(scope="module")
def run():
    store, model, data = MemoryStore(), Causal(), Texts()
    recorder = GradientRecorder(store, projector=Identity(), preconditioner="none")
    quiet_trainer(recorder, precision="64-true", max_epochs=1).fit(model, loader(data))
    batch = data[:3]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :3] = -100  # A prompt of three tokens.
    batch["labels"][1, 4] = -100  # Padding.
    return store, model.double(), batch


# Label positions that are neither ignored nor the first of a text, which nothing predicts.
QUERIES = [(0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (2, 4)]


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (LogProbability(shift=True), lambda logits, c: logits.log_softmax(0)[c]),
        (Logit(shift=True), lambda logits, c: logits[c]),
        (
            Margin(shift=True),
            lambda logits, c: logits[c] - logits[torch.arange(VOCABULARY) != c].logsumexp(0),
        ),
    ],
    ids=["log probability", "logit", "margin"],
)
def test_each_counted_token_is_a_query_for_the_logits_before_it(run, target, value):
    store, model, batch = run
    rows = record_queries(model, batch, like=store, target=target)
    assert len(rows) == len(QUERIES)
    logits, labels = model(batch["input_ids"]), batch["labels"]
    for row, (sample, token) in zip(rows, QUERIES, strict=True):
        number = -value(logits[sample, token - 1], labels[sample, token])
        grads = torch.autograd.grad(number, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in grads]))


def test_the_scores_of_the_tokens_sum_to_those_of_the_loss(run):
    store, model, batch = run
    target, method = LogProbability(shift=True), TracIn()
    scores = attribute(store, model, batch, target=target, method=method, progress=False)
    pairs = list(zip(scores.query_ids.tolist(), scores.tokens.tolist(), strict=True))
    assert pairs == QUERIES
    whole = attribute(store, model, batch, method=method, progress=False)
    assert whole.tokens is None
    torch.testing.assert_close(scores.grouped(scores.query_ids).values, whole.values)


def test_answers_name_the_tokens(run, tmp_path):
    store, model, batch = run
    target = LogProbability(shift=True)
    scores = attribute(store, model, batch, target=target, progress=False)
    assert "  query 0, token 3: proponents" in repr(scores)
    scores.save(tmp_path / "scores.npz")
    assert torch.equal(Scores.load(tmp_path / "scores.npz").tokens, scores.tokens)
    frame = scores.to_pandas(k=1)
    assert list(frame.columns)[:2] == ["query", "token"]
    top = top_attributions(store, model, batch, 1, target=target, progress=False)
    assert top.to_pandas()["token"].tolist() == frame["token"].tolist()
    assert scores[2:4].tokens.tolist() == [1, 2]
    assert Scores.concatenate([scores, scores]).tokens.tolist() == 2 * scores.tokens.tolist()


def test_a_logit_needs_no_labels_for_a_shift(run):
    store, model, batch = run
    unlabelled = {"input_ids": batch["input_ids"]}
    target = Logit(3, shift=True, class_axis=-1)
    rows = record_queries(model, unlabelled, like=store, target=target)
    assert len(rows) == 3 * (T - 1)


def test_labels_that_equal_the_inputs_need_a_shift(run):
    store, model, batch = run
    with pytest.warns(UserWarning, match=r"labels equal the inputs.*expected `shift=True`"):
        record_queries(model, batch, like=store, target=LogProbability())


def test_a_batch_without_a_label_raises(run):
    store, model, batch = run
    silent = {**batch, "labels": torch.full((3, T), -100)}
    with pytest.raises(ValueError, match="All labels of `queries` are -100"):
        record_queries(model, silent, like=store, target=LogProbability(shift=True))


def test_a_shift_without_a_sequence_raises(run):
    store, model, batch = run
    target = LogProbability(
        outputs=lambda module, batch: module(batch["input_ids"])[:, -1],
        labels=lambda batch: batch["labels"][:, -1],
        shift=True,
    )
    with pytest.raises(ValueError, match=r"`shift=True` with logits .* shape \(n, T, classes\)"):
        record_queries(model, batch, like=store, target=target)


class Chosen:
    """A target of a user's own, with its own queries."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, module, batch):
        return module(batch["input_ids"]).square().sum(dim=2)

    def is_query(self, batch):
        return self.mask


def test_a_target_of_ones_own_may_choose_its_tokens(run):
    store, model, batch = run
    mask = torch.zeros(3, T, dtype=torch.bool)
    mask[1, 2] = mask[2, 0] = True
    chosen = record_queries(model, batch, like=store, target=Chosen(mask))
    every = record_queries(model, batch, like=store, target=Chosen(None))
    torch.testing.assert_close(chosen, every.unflatten(0, (3, T))[mask])
    with pytest.raises(ValueError, match=r"`is_query` of the target .* boolean tensor of shape"):
        record_queries(model, batch, like=store, target=Chosen(mask[:, :2]))
