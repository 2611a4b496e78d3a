"""Tracing facts: BM25 by its formula, candidates of two stages, and scores token by token."""

import math

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import loader, quiet_trainer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from unchecked_calls import type_checks_disabled

from tda_lightning import (
    GradientRecorder,
    Identity,
    InfluenceFunction,
    Logit,
    TracIn,
    attribute,
)
from tda_lightning.applications import (
    BM25,
    NextToken,
    candidates_of,
    last_layer_scores,
    rescore,
    trace_facts,
    trace_tokens,
)
from tda_lightning.passes.targets import Loss
from tda_lightning.stores import MemoryStore

WORDS, LENGTH, N = 11, 7, 13


class Bigrams(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Embedding(WORDS, 5), nn.Linear(5, WORDS)).double()

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, batch_idx):
        tokens, labels = batch
        return cross_entropy(self(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def passages(n=N, seed=5):
    tokens = torch.randint(WORDS, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(tokens, tokens)


def completion(row):
    """Return a query of which only the last three words count."""
    tokens = passages(3, seed=9).tensors[0][row : row + 1]
    labels = tokens.clone()
    labels[:, :-3] = -100
    return [tokens, labels]


@pytest.fixture(scope="module")
def trained():
    store, model = MemoryStore(), Bigrams()
    recorder = GradientRecorder(store, projector=Identity())
    quiet_trainer(recorder, precision="64-true").fit(model, loader(passages(), 3))
    return store, model


def test_bm25_is_its_formula():
    passages = ["the cat sat", "the dog sat on the mat mat", "", "a cat and a dog"]
    query = "cat on the mat mat"
    words, counts = query.split(), [passage.split() for passage in passages]
    mean = sum(map(len, counts)) / 4
    expected = []
    for count in counts:
        total = 0.0
        for word in words:
            n = sum(word in other for other in counts)
            f = count.count(word)
            idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
            total += idf * f * (1.5 + 1) / (f + 1.5 * (1 - 0.75 + 0.75 * len(count) / mean))
        expected.append(total)
    scores = BM25().scores([query, "zebra"], passages)
    torch.testing.assert_close(scores.values[0], torch.tensor(expected))
    assert not scores.values[1].any()


def test_bm25_of_a_mapping_keeps_its_ids():
    scores = BM25().scores(["b"], {7: "a b", 3: "c"})
    assert scores.train_ids.tolist() == [3, 7]
    assert scores.proponents(1).ids.tolist() == [[7]]


def test_bm25_refuses_wrong_constants():
    with pytest.raises(ValueError, match="number from 0 to 1"):
        BM25(b=2.0)
    with pytest.raises(ValueError, match="`passages` is empty"):
        BM25().scores(["a"], [])


@pytest.mark.parametrize("words", [{"queries": "word"}, {"passages": "word"}])
def test_bm25_refuses_one_text_in_place_of_a_list(words):
    with type_checks_disabled(), pytest.raises(ValueError, match=r"is one text; expected a list"):
        BM25().scores(**{"queries": ["word"], "passages": ["word"], **words})


@pytest.mark.parametrize("texts", [["text"] * (N - 1), {0: "text"}], ids=["list", "mapping"])
def test_a_passage_without_a_text_is_refused(trained, texts):
    store, model = trained
    with pytest.raises(ValueError, match=r"`texts` has no text for the passage with id"):
        trace_facts(store, model, None, texts=texts)


def test_the_candidates_are_the_best_of_all(trained):
    expected = attribute(*trained, completion(0), method=InfluenceFunction(), progress=False)
    candidates = trace_facts(*trained, completion(0), k=5, texts=["text"] * N, progress=False)
    assert candidates.ids.tolist() == expected.proponents(5).ids.tolist()
    assert "5 passages for each query by InfluenceFunction" in repr(candidates)
    assert ": text" in repr(candidates)
    assert list(candidates.to_pandas()["text"]) == ["text"] * 5


def test_rescoring_ranks_the_same_passages_by_the_other_method(trained):
    first = trace_facts(*trained, completion(1), k=7, progress=False)
    second = rescore(first, *trained, completion(1), method=TracIn(), progress=False)
    scores = attribute(*trained, completion(1), method=TracIn(), progress=False)
    expected = sorted(first.ids[0].tolist(), key=lambda i: -float(scores.values[0, i]))
    assert second.ids[0].tolist() == expected
    assert second.scores[0].tolist() == scores.values[0, expected].tolist()
    (former,) = second.other_ranks.values()
    assert first.ids[0, former[0] - 1].tolist() == expected
    assert "rank by InfluenceFunction" in "".join(second.to_pandas().columns)


def test_ranks_beside_are_those_among_all_passages(trained):
    scores = attribute(*trained, completion(2), method=TracIn(), progress=False)
    candidates = trace_facts(*trained, completion(2), k=5, progress=False).beside(scores)
    order = scores.values[0].argsort(descending=True).tolist()
    assert candidates.other_ranks[repr(TracIn())].tolist() == [
        [order.index(i) + 1 for i in candidates.ids[0].tolist()]
    ]


def test_scores_of_other_queries_are_refused(trained):
    candidates = trace_facts(*trained, completion(0), k=5, progress=False)
    with pytest.raises(ValueError, match="expected the 1 queries of these candidates"):
        candidates.ranked_by(BM25().scores(["a", "b"], ["x"] * N))
    with pytest.raises(ValueError, match="scores for each passage"):
        candidates.ranked_by(BM25().scores(["a"], ["x"]))
    with pytest.raises(ValueError, match="number from 1 to 13"):
        candidates_of(BM25().scores(["a"], ["x"] * N), 14)


def test_token_scores_are_the_inner_products_of_the_tokens_gradients(trained):
    store, model = trained
    query, passage = completion(0), list(passages()[4:5])
    scores = trace_tokens(store, model, query, passage, target=NextToken(tokens=lambda b: b[1]))
    assert scores.values.shape == (3, LENGTH - 1)

    def gradient(batch, at):
        logits = model(batch[0])[0, at]
        loss = cross_entropy(logits, batch[1][0, at + 1])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    expected = [
        [float(gradient(query, a) @ gradient(passage, b)) for b in range(LENGTH - 1)]
        for a in range(LENGTH - 4, LENGTH - 1)
    ]
    torch.testing.assert_close(scores.values, torch.tensor(expected).double())
    torch.testing.assert_close(scores.by_passage_token(), scores.values.sum(dim=0))


def test_token_scores_bear_the_names_of_their_tokens(trained):
    store, model = trained
    query, passage = completion(0), list(passages()[4:5])
    target = NextToken(tokens=lambda b: b[1])

    def names(batch):
        return [f"w{token}" for token in batch[0][0, 1:].tolist()]

    scores = trace_tokens(store, model, query, passage, target=target, names=names)
    assert scores.query_tokens == tuple(names(query)[-3:])
    assert list(scores.to_pandas().columns) == names(passage)
    assert "strongest in the passage: 'w" in repr(scores)


def test_a_query_without_a_token_that_counts_is_refused(trained):
    store, model = trained
    tokens, labels = completion(0)
    masked = [tokens, torch.full_like(labels, -100)]
    with pytest.raises(ValueError, match="No token of `query` has a gradient"):
        trace_tokens(store, model, masked, masked, target=NextToken(tokens=lambda b: b[1]))
    two = [tokens.repeat(2, 1), labels.repeat(2, 1)]
    with pytest.raises(ValueError, match="`query` is a batch of 2 samples; expected"):
        trace_tokens(store, model, two, masked)


def summed_gradients(model, value):
    layer = model.net[1]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [layer.weight, layer.bias])])


@pytest.mark.parametrize("target", [Logit(shift=True), Loss()], ids=["logit", "loss"])
def test_scores_of_the_last_layer_are_products_of_its_gradients(target):
    model, queries = Bigrams(), [completion(0), completion(2)]
    expected = torch.empty(2, N, dtype=torch.float64)
    for row, (tokens, labels) in enumerate(queries):
        logits = model(tokens)[0, -4:-1]
        picked = logits.gather(1, labels[0, -3:, None]).sum()
        value = picked if isinstance(target, Logit) else -model.training_step([tokens, labels], 0)
        gradient = summed_gradients(model, value)
        for column in range(N):
            passage = passages().tensors[0][column : column + 1]
            loss = model.training_step([passage, passage], 0)
            expected[row, column] = -gradient @ summed_gradients(model, loss)
    batches = [torch.cat(parts) for parts in zip(*queries, strict=True)]
    for questions in (batches, DataLoader(TensorDataset(*batches), 1)):
        settings = {"target": target, "progress": False}
        scores = last_layer_scores(model, loader(passages(), 5), questions, **settings)
        torch.testing.assert_close(scores.values, expected)
    assert candidates_of(scores, k=1).ids[:, 0].tolist() == expected.argmax(dim=1).tolist()
    assert model.training
    assert not model.net[1]._forward_hooks


def test_scores_of_the_last_layer_do_not_depend_on_the_batches_of_padded_passages():
    """A mean over the tokens of a batch weighs long passages more; one of them has no token."""
    model, tokens = Bigrams(), passages().tensors[0]
    is_padding = torch.arange(LENGTH) >= torch.arange(N)[:, None] % LENGTH + 1
    data = TensorDataset(tokens, tokens.masked_fill(is_padding, -100))
    expected, found = (
        last_layer_scores(model, passes, completion(0), progress=False)
        for passes in (DataLoader(data, 1), loader(data, 5))
    )
    torch.testing.assert_close(found.values, expected.values)
    assert not found.values[0, 0]
    assert found.values.isfinite().all()


def test_scores_of_the_last_layer_along_a_run_are_the_highest_of_its_snapshots():
    store, model = MemoryStore(), Bigrams()
    recorder = GradientRecorder(store, snapshots=4)
    quiet_trainer(recorder, precision="64-true").fit(model, loader(passages(), 3))
    settings = {"progress": False}
    final = {name: value.clone() for name, value in model.state_dict().items()}
    scores = last_layer_scores(model, loader(passages()), completion(1), run=store, **settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, final[name])
    each = []
    for snapshot in store.snapshots():
        other = Bigrams()
        other.load_state_dict(store.weights_at(snapshot))
        each.append(last_layer_scores(other, loader(passages()), completion(1), **settings).values)
    assert len(each) > 2
    torch.testing.assert_close(scores.values, torch.stack(each).amax(dim=0))


def test_scores_of_the_last_layer_need_a_layer_and_a_completion():
    model, (tokens, labels) = Bigrams(), completion(0)
    with pytest.raises(ValueError, match=r"expected a `Linear` of `Bigrams`: one of \['net.1'\]"):
        last_layer_scores(model, loader(passages()), [tokens, labels], layer="head")
    with pytest.raises(ValueError, match="No token of `queries` counts"):
        last_layer_scores(model, loader(passages()), [tokens, labels * 0 - 100], progress=False)
