"""Rows in no regular order: graphs, sets, packed sequences, tokens that a mask sends to experts."""

import pytest
import torch
from lightning_models import loader, quiet_trainer
from replayed import MeanOfLosses, assert_rows_are_gradients
from torch import nn
from torch.nn import functional

from tda_lightning import GradientRecorder, Identity, TracIn, attribute
from tda_lightning.gradients.graph.sample_layout import IrregularRows
from tda_lightning.stores import MemoryStore

D, CLASSES = 7, 3


class Sets(torch.utils.data.Dataset):
    """Sets of vectors: their number differs from sample to sample.

    Args:
        sizes: The number of vectors of each sample.
    """

    def __init__(self, sizes):
        random = torch.Generator().manual_seed(1)
        self.sets = [torch.randn(size, D, generator=random).double() for size in sizes]

    def __len__(self):
        return len(self.sets)

    def __getitem__(self, index):
        return self.sets[index], torch.tensor(index % CLASSES)


RAGGED = (4, 2, 5, 3, 1, 6, 2, 2, 7, 3, 5, 1, 4)


def joined(samples):
    """Join the vectors of a batch, one sample's after another's."""
    sets, labels = zip(*samples, strict=True)
    owners = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([*map(len, sets)]))
    return torch.cat(sets), owners, torch.stack(labels)


def shuffled(samples):
    """Join them in an order in which samples alternate."""
    vectors, owners, labels = joined(samples)
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(len(owners)))
    return vectors[order], owners[order], labels


def listed(samples):
    sets, labels = zip(*samples, strict=True)
    return list(sets), torch.stack(labels)


class OfSets(MeanOfLosses):
    """A classifier of sets."""

    def __init__(self, body=None, head=None):
        super().__init__(nn.Identity())
        torch.manual_seed(0)
        self.body = body or nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Tanh())
        self.head = head or nn.Linear(5, CLASSES)
        self.double()

    def hidden(self, vectors, owners):
        return self.body(vectors)

    def losses(self, batch):
        vectors, owners, labels = batch
        hidden = self.hidden(vectors, owners)
        pooled = hidden.new_zeros(len(labels), 5).index_add(0, owners, hidden)
        return functional.cross_entropy(self.head(pooled), labels, reduction="none")


class Graph(OfSets):
    """Passes messages from each vector to the next one of its sample."""

    def __init__(self):
        super().__init__()
        self.message, self.eps = nn.Linear(5, 5), nn.Parameter(torch.rand(1))
        self.double()

    def hidden(self, vectors, owners):
        hidden = self.body(vectors)
        to = torch.stack([(owners == owner).nonzero()[:, 0].roll(1)[0] for owner in owners])
        messages = torch.zeros_like(hidden).index_add(0, to, hidden)
        return torch.tanh(self.message((1 + self.eps) * hidden + messages))


class Routed(OfSets):
    """Sends each vector to one of two experts by a mask."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]).double()

    def hidden(self, vectors, owners):
        hidden = self.body(vectors)
        result, is_first = torch.zeros_like(hidden), hidden[:, 0] > 0
        for expert, mask in zip(self.experts, (is_first, ~is_first), strict=True):
            result[mask] = expert(hidden[mask]) * hidden[mask, :1]
        return result


class Tokens(OfSets):
    """Looks up words, of which a sample has any number."""

    def __init__(self):
        super().__init__(nn.Embedding(11, 5))

    def hidden(self, vectors, owners):
        return self.body((vectors.sum(dim=1).abs() * 10).long() % 11)


class Images(OfSets):
    """Convolves crops, of which a sample has any number."""

    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Conv1d(1, 5, 3, padding=1), nn.Tanh(), nn.GroupNorm(1, 5))
        )

    def hidden(self, vectors, owners):
        return self.body(vectors[:, None]).amax(dim=2)


class Scaled(OfSets):
    """Scales the data themselves, and counts the first vector of each sample twice."""

    def __init__(self):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(()))
        self.double()

    def hidden(self, vectors, owners):
        hidden = self.body((1 + self.eps) * vectors * self.scale)
        firsts = torch.stack([(owners == owner).nonzero()[0, 0] for owner in owners.unique()])
        return hidden + torch.zeros_like(hidden).index_add(0, firsts, hidden[firsts])


class Attending(OfSets):
    """Attends within each sample; adding to all scores of a vector has no effect but rounding."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5, 1))
        self.double()

    def hidden(self, vectors, owners):
        hidden = self.body(vectors)
        scores = hidden @ self.source + hidden @ self.target
        weights = scores.masked_fill(owners != owners[:, None], -torch.inf).softmax(dim=1)
        return weights @ hidden


class Normed(OfSets):
    """Has a batch norm over the vectors of all samples."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(D, 5, bias=False), nn.BatchNorm1d(5)))


MODELS = {
    "a layer and a norm": OfSets,
    "messages in a graph": Graph,
    "experts": Routed,
    "words": Tokens,
    "crops": Images,
    "a batch norm": Normed,
    "scaled data": Scaled,
    "attention": Attending,
}


@pytest.mark.parametrize(
    ("order", "batch_size"), [(joined, 13), (shuffled, 5), (shuffled, 2)], ids=["all", "5", "2"]
)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_sets_are_gradients(name, order, batch_size):
    # No batch of one: a batch norm cannot standardize one vector.
    sets = Sets(RAGGED[:12] if batch_size == 2 else (*RAGGED, 3, 3))
    assert_rows_are_gradients(MODELS[name](), sets, batch_size, collate_fn=order)


def test_a_batch_of_one_needs_no_order():
    assert_rows_are_gradients(Graph(), Sets(RAGGED), 1, collate_fn=joined)


def test_a_number_of_vectors_that_samples_divide_shows_nothing():
    # Five samples with 15 vectors in each batch, but not three of each.
    sizes = (1, 5, 3, 4, 2) * 3
    for order in (joined, shuffled):
        assert_rows_are_gradients(Graph(), Sets(sizes), 5, collate_fn=order)


class Loop(MeanOfLosses):
    """Calls its layers once for each sample."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double())

    def losses(self, batch):
        outputs = torch.stack([self.net(vectors).mean(dim=0) for vectors in batch[0]])
        return functional.cross_entropy(outputs, batch[1], reduction="none")


class LoopOfLosses(Loop):
    """Also evaluates the loss once for each sample."""

    def losses(self, batch):
        pairs = zip(*batch, strict=True)
        means = [(self.net(vectors).mean(dim=0), label) for vectors, label in pairs]
        return torch.stack([functional.cross_entropy(*each) for each in means])


@pytest.mark.parametrize("batch_size", [5, 1], ids=["ragged", "one"])
@pytest.mark.parametrize("model", [Loop, LoopOfLosses])
def test_rows_of_a_loop_over_samples_are_gradients(model, batch_size):
    assert_rows_are_gradients(model(), Sets(RAGGED), batch_size, collate_fn=listed)


class Packed(MeanOfLosses):
    """A recurrent network over sequences of different lengths."""

    def __init__(self, kind):
        super().__init__(nn.Identity())
        torch.manual_seed(0)
        self.recurrent, self.head = kind(D, 5), nn.Linear(5, CLASSES)
        self.double()

    def losses(self, batch):
        sequences, labels = batch
        packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
        hidden = self.recurrent(packed)[1]
        last = (hidden[0] if isinstance(hidden, tuple) else hidden)[-1]
        return functional.cross_entropy(self.head(last), labels, reduction="none")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_rows_of_packed_sequences_are_gradients(kind):
    assert_rows_are_gradients(Packed(kind), Sets(RAGGED), collate_fn=listed)


def test_sampled_labels_have_rows_of_sets():
    store = assert_rows_are_gradients(
        Graph(), Sets(RAGGED), collate_fn=shuffled, curvature="fisher", curvature_share=0.5
    )
    for step in store:
        assert bool((step.curvature_rows.norm(dim=1) > 0).all())


class Shared(OfSets):
    """Adds the mean over the batch to every vector."""

    def hidden(self, vectors, owners):
        hidden = self.body(vectors)
        return hidden + hidden.mean(dim=0)


def test_rows_of_several_samples_are_taken_where_samples_part():
    # 45 vectors, so that no regular order is possible. Each loss depends on all of them.
    assert_rows_are_gradients(Shared(), Sets(RAGGED), 13, collate_fn=joined)


class SharedLater(OfSets):
    """Mixes samples from the second batch on."""

    calls = 0

    def hidden(self, vectors, owners):
        self.calls += 1
        hidden = self.body(vectors)
        return hidden if self.calls == 1 else hidden + hidden.mean(dim=0)


def test_rows_that_mix_samples_later_are_refused_by_name():
    recorder = GradientRecorder(MemoryStore(), projector=Identity())
    with pytest.raises(ValueError, match=r"at `.*` belongs to several samples at once"):
        quiet_trainer(recorder).fit(SharedLater(), loader(Sets(RAGGED), collate_fn=joined))


def test_queries_of_sets_are_answered_like_batches_of_one():
    store, model = MemoryStore(), Graph()
    quiet_trainer(GradientRecorder(store, projector=Identity())).fit(
        model, loader(Sets(RAGGED), collate_fn=joined)
    )
    queries = Sets((3, 1, 4, 2))
    together = attribute(store, model, loader(queries, 4, shuffle=False, collate_fn=joined))
    alone = attribute(store, model, loader(queries, 1, shuffle=False, collate_fn=joined))
    torch.testing.assert_close(together.values, alone.values)


def test_a_single_batch_with_parts_of_several_lengths_needs_a_loader():
    store, model = MemoryStore(), Graph()
    batches = loader(Sets(RAGGED), collate_fn=joined)
    quiet_trainer(GradientRecorder(store)).fit(model, batches)
    with pytest.raises(ValueError, match=r"so the number of samples is not clear.*Pass a `D"):
        attribute(store, model, joined([batches.dataset[0], batches.dataset[2]]), method=TracIn())


def test_irregular_rows_are_sorted_by_sample_and_padded():
    rows = IrregularRows(torch.tensor([2, 0, 2, 2, 0]), 4)
    values = torch.arange(1.0, 11).reshape(5, 2)
    padded = rows.samples_first(values, 4)
    assert padded[:, :, 0].tolist() == [[3, 9, 0], [0, 0, 0], [1, 5, 7], [0, 0, 0]]
    assert rows.entries_of(5, 4, 2).tolist() == [0, 2, 3]


class Experts(nn.Module):
    """Each sample goes to the expert of its first feature's sign; a head follows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(D, 5) for _ in range(2))
        self.first, self.head = nn.Linear(D, D), nn.Linear(5, CLASSES)

    def forward(self, x):
        first, hidden = self.first(x).tanh(), x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0).long().eq(number).nonzero()[:, 0]
            hidden = hidden.index_add(0, chosen, expert(first[chosen]))
        return self.head(hidden.tanh())


def test_a_first_batch_for_one_expert_says_nothing_about_the_others():
    torch.manual_seed(0)
    x, y = torch.randn(20, D).double(), torch.randint(CLASSES, (20,))
    x[:, 0] = x[:, 0].abs() + 0.1
    x[[3, 8, 15], 0] *= -1
    data = torch.utils.data.TensorDataset(x, y)
    store = assert_rows_are_gradients(Experts().double(), data)
    assert not {3, 8, 15} & set(store[0].sample_ids.tolist())
