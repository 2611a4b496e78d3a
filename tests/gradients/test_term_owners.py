"""Facts of a sample's loss come from its own terms, wherever the samples lie in the outputs."""

import pytest
import torch
from lightning_models import Plain, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, LossRecorder
from tda_lightning.gradients.losses import find_losses_and_penalties
from tda_lightning.gradients.losses.term_owners import term_owners
from tda_lightning.stores import MemoryStore

N, T, V = 5, 7, 11
cross_entropy, mse = nn.functional.cross_entropy, nn.functional.mse_loss


def flattened(outputs, x, y):
    return cross_entropy(outputs.reshape(-1, V), y.reshape(-1))


def classes_in_the_middle(outputs, x, y):
    return cross_entropy(outputs.permute(1, 2, 0), y.mT)


def shifted(outputs, x, y):
    return cross_entropy(outputs[:-1].contiguous().view(-1, V), y[1:].reshape(-1))


def back_to_samples_first(outputs, x, y):
    return cross_entropy(outputs.transpose(0, 1).flatten(0, 1), y.mT.flatten())


def squares(outputs, x, y):
    return mse(outputs[..., 0], y.float())


def squares_of_a_mean(outputs, x, y):
    return mse(outputs.mean(dim=0)[:, 3], y.float().mean(dim=0))


def masked(outputs, x, y):
    return cross_entropy(outputs[x > 2], y[x > 2], reduction="sum") / (N * T)


def masked_rows(outputs, x, y):
    counts = (x > 2).flatten()
    rows, labels = outputs.view(-1, V)[counts], y.reshape(-1)[counts]
    return cross_entropy(rows, labels, reduction="sum") / (N * T)


def two_parts(outputs, x, y):
    return 0.5 * flattened(outputs, x, y) + 0.5 * squares(outputs, x, y)


LOSSES = [
    flattened,
    classes_in_the_middle,
    shifted,
    back_to_samples_first,
    squares,
    squares_of_a_mean,
    masked,
    masked_rows,
    two_parts,
]


class SequenceFirst(Plain):
    """A recurrent network that has the samples on the second axis, as torch's do by default."""

    def __init__(self, loss):
        super().__init__(nn.Embedding(V, 6), loss, lambda p: torch.optim.SGD(p, lr=0.0))
        self.recurrent, self.head = nn.GRU(6, 6), nn.Linear(6, V)

    def training_step(self, batch, batch_idx):
        x, y = batch[0].mT, batch[1].mT
        return self.loss(self.head(self.recurrent(self.net(x))[0]), x, y)


def sequences(length=T, n=2 * N):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, V, (2, n, length), generator=generator)
    x[:, -1] = 3  # At least one entry of each sample counts.
    return TensorDataset(x, y)


def recorded_losses(model, data, recorder_type):
    store = MemoryStore()
    quiet_trainer(recorder_type(store), max_epochs=1).fit(model, DataLoader(data, batch_size=N))
    return torch.cat([step.losses for step in store])


def mean_of_terms(model, sample):
    """The loss of a sample alone, over the sum of its terms' weights."""
    loss = model.training_step(sample, 0)
    counted = int((sample[0] > 2).sum()) if model.loss in (masked, masked_rows) else N * T
    return float(loss.detach()) * N * T / counted


# With as many entries on two axes, only a recorded parameter shows which one has the samples.
@pytest.mark.parametrize(
    ("recorder_type", "length"),
    [(GradientRecorder, T), (GradientRecorder, N), (LossRecorder, T)],
    ids=["T > n", "T = n", "without rows"],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_the_samples_alone(loss, recorder_type, length):
    torch.manual_seed(0)
    model, data = SequenceFirst(loss).double(), sequences(length)
    losses = recorded_losses(model, data, recorder_type)
    samples = DataLoader(data, batch_size=1)
    expected = torch.tensor([mean_of_terms(model, sample) for sample in samples])
    torch.testing.assert_close(losses, expected.to(losses))


class OfSets(Plain):
    """Classifies sets that differ in size, joined below each other, and their elements."""

    def training_step(self, batch, batch_idx):
        x, owners, labels, of_sets = batch
        outputs = self.net(x)
        pooled = torch.zeros(len(of_sets), V).index_add(0, owners, outputs)
        return cross_entropy(pooled, of_sets) + cross_entropy(outputs, labels)


def join(samples):
    xs, labels, of_sets = zip(*samples, strict=True)
    sizes = torch.tensor([len(x) for x in xs])
    owners = torch.arange(len(xs)).repeat_interleave(sizes)
    return torch.cat(xs), owners, torch.cat(labels), torch.stack(of_sets)


def test_losses_of_elements_go_to_their_sets():
    torch.manual_seed(0)
    sizes = [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]  # In all, three per set: as if they were equal.
    data = [(torch.randn(m, 3), torch.randint(0, V, (m,)), torch.tensor(m)) for m in sizes]
    model = OfSets(nn.Linear(3, V), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    store = MemoryStore()
    loop = DataLoader(data, batch_size=N, collate_fn=join)
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(model, loop)
    losses = torch.cat([step.losses for step in store])
    torch.testing.assert_close(losses, torch.stack([_mean_of_set(model, each) for each in data]))


def _mean_of_set(model, sample):
    x, labels, of_set = sample
    outputs = model.net(x).detach()
    weights = torch.tensor([1 / N, len(x) / (3 * N)])  # Of the set, and of all its elements.
    parts = cross_entropy(outputs.sum(0), of_set), cross_entropy(outputs, labels)
    return (weights * torch.stack(parts)).sum() / weights.sum()


class WithPairs(Plain):
    """Adds a loss of pairs of samples, which belongs to none of them."""

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        return self.loss(outputs, batch[1]) + nn.functional.pdist(outputs).square().mean()


def test_losses_are_unknown_if_some_terms_belong_to_no_sample():
    torch.manual_seed(0)
    store, data = MemoryStore(), TensorDataset(torch.randn(N, 3), torch.arange(N))
    model = WithPairs(nn.Linear(3, V))
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(model, DataLoader(data, batch_size=N))
    assert store[0].losses is None
    assert store[0].curvature is None


def test_the_axis_of_n_entries_shows_the_samples_of_flattened_terms():
    outputs = torch.randn(T, N, V, requires_grad=True) * 1
    node = find_losses_and_penalties(
        cross_entropy(outputs.reshape(-1, V), torch.zeros(T * N).long())
    )[0]
    owners = term_owners(node, N)
    terms = torch.arange(float(T * N)).reshape(T * N, 1)
    assert torch.equal(owners.sums(terms), terms.reshape(T, N).sum(dim=0))


class Correlated(Plain):
    """Two views whose features are correlated over the batch, or whose samples are compared."""

    def __init__(self, features, product):
        torch.manual_seed(0)
        super().__init__(nn.Linear(T, features))
        self.product = product

    def training_step(self, batch, batch_idx):
        x, _ = batch
        table = self.product(self.net(x), self.net(x.flip(1)))
        return (table - torch.eye(len(table))).square().mean()


@pytest.mark.parametrize("features", [3, N, 11])
def test_terms_of_features_belong_to_no_sample_also_if_there_are_as_many(features):
    def losses(product):
        store = MemoryStore()
        data = DataLoader(TensorDataset(torch.randn(N, T), torch.zeros(N)), batch_size=N)
        recorder = GradientRecorder(store)
        quiet_trainer(recorder, max_epochs=1).fit(Correlated(features, product), data)
        return store[0].losses

    assert losses(lambda first, second: first.mT @ second) is None
    assert losses(lambda first, second: first @ second.mT) is not None
