"""A `collate_fn` that puts its samples into another order is refused; all others go on."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning_models import IndexedVectors, Plain, TrainingLog, mlp, quiet_trainer, vectors
from torch.utils.data import DataLoader, Subset, default_collate

from tda_lightning import GradientRecorder, attribute
from tda_lightning.recording.collation import CheckedCollate, ReorderedSamplesError
from tda_lightning.stores import MemoryStore

DATA = IndexedVectors()


def sort_by_size(samples):
    return default_collate(sorted(samples, key=lambda sample: -float(sample[0].square().sum())))


def sort_in_place(samples):
    samples.sort(key=lambda sample: -float(sample[0].square().sum()))
    return default_collate(samples)


def shuffle(samples):
    return default_collate(random.sample(samples, len(samples)))


def named_and_sorted(samples):
    x, y = sort_by_size(samples)
    return {"x": [x], "y": (y, "sorted")}


class OfDicts(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch["x"][0]), batch["y"][0])


REORDERING = [sort_by_size, sort_in_place, shuffle, named_and_sorted]


# torch waits ten seconds for workers in which an error was raised.
@pytest.mark.parametrize(
    ("collate", "workers"), [*((each, 0) for each in REORDERING), (sort_by_size, 1)]
)
def test_samples_in_another_order_are_refused(collate, workers):
    model = OfDicts(mlp()) if collate is named_and_sorted else Plain(mlp())
    data = DataLoader(DATA, batch_size=5, collate_fn=collate, num_workers=workers)
    store = MemoryStore()
    random.seed(0)  # A symmetric order of the first batch would show in the second.
    with pytest.raises(ValueError, match=r"(?s)`collate_fn` changes the order.*sample_ids="):
        quiet_trainer(GradientRecorder(store), max_epochs=1).fit(model, data)
    assert data.collate_fn is collate
    assert len(store) == 0


def test_ids_of_the_batch_need_no_order():
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, sample_ids=lambda batch: batch[0][:, 0].long())
    data = DataLoader(DATA, batch_size=5, collate_fn=sort_by_size)
    quiet_trainer(recorder, log, max_epochs=1).fit(Plain(mlp()), data)
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids
    assert ids[0] != sorted(ids[0])


def test_samples_of_the_same_size_may_be_sorted():
    def sort(samples):
        return default_collate(sorted(samples, key=lambda sample: len(sample[0])))

    store, log = MemoryStore(), TrainingLog()
    data = DataLoader(DATA, batch_size=5, shuffle=True, collate_fn=sort)
    quiet_trainer(GradientRecorder(store), log, max_epochs=2).fit(Plain(mlp()), data)
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids


def mixup(samples):
    x, y = default_collate(samples)
    return x.roll(1, 0).mul_(0.3).add_(x.mul(0.7)), y


def cutmix(samples):
    x, y = default_collate(samples)
    x[:, 2:4] = x.flip(0)[:, 2:4]
    return x, y


def pairs(samples):
    x, y = default_collate(samples)
    return torch.cat([x, x.roll(1, 0)], dim=1)[:, :7] + 0 * x.roll(1, 0), y


@pytest.mark.parametrize("collate", [mixup, cutmix, pairs])
def test_a_function_that_mixes_samples_is_warned_of_once(collate):
    store, log = MemoryStore(), TrainingLog()
    data = DataLoader(DATA, batch_size=5, shuffle=True, collate_fn=collate)
    with pytest.warns(UserWarning, match="`collate_fn` puts two samples into a row") as caught:
        quiet_trainer(GradientRecorder(store), log).fit(Plain(mlp()), data)
    assert sum("two samples" in str(warning.message) for warning in caught) == 1


def permuted_at_random(samples):
    x, y = default_collate(samples)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    return x[order], y[order]


def test_a_permutation_that_is_the_same_in_both_calls_is_refused():
    data = DataLoader(DATA, batch_size=5, collate_fn=permuted_at_random)
    with pytest.raises(ReorderedSamplesError):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(Plain(mlp()), data)


def sequences_first(samples):
    """Return vectors with one entry for each of as many steps as there are samples."""
    x, y = default_collate(samples)
    return x[:, : len(x)].T.contiguous(), y


def sets_of_several_rows(samples):
    """Return rows of which each sample has none, one or two: as many as there are samples."""
    sizes = [2, 0, 1, 1, 1]
    rows = [x[None].expand(size, -1) for (x, _), size in zip(samples, sizes, strict=False)]
    return torch.cat(rows), torch.stack([y for _, y in samples])


def one_tensor_for_each_sample(samples):
    sizes = [3, 5, 2, 7, 1]  # Of the samples, wherever they are.
    return {"boxes": [x[: sizes[int(x[0])]].clone() for x, _ in samples], "labels": 0}


def one_mapping_for_each_sample(samples):
    return [{"boxes": boxes} for boxes in one_tensor_for_each_sample(samples)["boxes"]]


def labelled(samples):
    return torch.stack([torch.cat([x, label]) for x, label in samples])


def test_samples_may_share_a_tensor():
    labels = [torch.zeros(1), torch.ones(1)]
    samples = [(DATA[i][0], labels[i % 2]) for i in range(5)]
    assert torch.equal(CheckedCollate(labelled)(samples), labelled(samples))
    assert torch.equal(CheckedCollate(labelled)(samples[:1] * 3), labelled(samples[:1] * 3))


@pytest.mark.parametrize(
    "collate",
    [
        sequences_first,
        sets_of_several_rows,
        one_tensor_for_each_sample,
        one_mapping_for_each_sample,
    ],
)
def test_as_many_rows_as_samples_need_not_be_the_samples(collate):
    samples = [DATA[i] for i in range(5)]
    batch, expected = CheckedCollate(collate)(samples), collate(samples)
    assert str(batch) == str(expected)


class Damaged(IndexedVectors):
    """A dataset without its sample 12, of the third batch."""

    def __getitem__(self, index):
        return None if index == 12 else super().__getitem__(index)


def dropping(samples):
    return default_collate([sample for sample in samples if sample is not None])


def filling(samples):
    good = [sample for sample in samples if sample is not None]
    return default_collate((good * len(samples))[: len(samples)])


@pytest.mark.parametrize("collate", [dropping, filling])
def test_missing_samples_are_refused_in_any_batch(collate):
    store = MemoryStore()
    data = DataLoader(Damaged(), batch_size=5, collate_fn=collate)
    with pytest.raises(ReorderedSamplesError, match=r"returned None.*Subset.*sample_ids="):
        quiet_trainer(GradientRecorder(store)).fit(Plain(mlp()), data)
    assert [step.sample_ids.tolist() for step in store] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


class Noisy:
    """Adds noise of every generator that there is, and counts its calls."""

    def __init__(self):
        self.torch = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(5)
        self.legacy, self.python = np.random.RandomState(7), random.Random(11)
        self.calls = 0

    def __call__(self, samples):
        self.calls += 1
        x, y = default_collate(samples)
        noise = torch.rand(1) + torch.rand(1, generator=self.torch)
        noise = noise + self.numpy.random() + self.legacy.rand() + np.random.rand()
        return x + noise + self.python.random() + self.calls, y

    def method(self, samples):
        return self(samples)


def closed(generator):
    def collate(samples):
        x, y = default_collate(samples)
        return x + generator.random(), y

    return collate


NOISY = {
    "object": Noisy,
    "method": lambda: Noisy().method,
    "partial": lambda: partial(lambda noisy, samples: noisy(samples), Noisy()),
    "closure": lambda: closed(np.random.default_rng(13)),
}


@pytest.mark.parametrize("create", NOISY.values(), ids=NOISY)
def test_the_check_changes_no_batch(create):
    def train(*callbacks):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        log = TrainingLog()
        data = DataLoader(vectors(), batch_size=5, collate_fn=create())
        quiet_trainer(*callbacks, log, max_epochs=2).fit(Plain(mlp()), data)
        return log.batches

    expected, batches = train(), train(GradientRecorder(MemoryStore()))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(expected, batches, strict=True))


def test_queries_that_are_sorted_have_their_positions_as_ids():
    store = MemoryStore()
    model, data = Plain(mlp()), DataLoader(DATA, batch_size=5, shuffle=True)
    quiet_trainer(GradientRecorder(store), max_epochs=2).fit(model, data)
    queries = Subset(DATA, [3, 11, 5, 7])
    loader = DataLoader(queries, batch_size=4, collate_fn=sort_by_size)
    scores = attribute(store, model, loader, progress=False)
    assert scores.query_ids.tolist() == [0, 1, 2, 3]
    expected = attribute(store, model, next(iter(loader)), progress=False)
    assert torch.equal(scores.values, expected.values)


def test_the_error_names_what_to_do():
    with pytest.raises(ReorderedSamplesError, match="enforce_sorted=False"):
        next(iter(_checked(sort_by_size)))


def _checked(collate):
    from tda_lightning.recording.sample_ids import SampleLedger

    data = DataLoader(DATA, batch_size=5, collate_fn=collate)
    SampleLedger(None).watch(data, lambda: True)
    return data
