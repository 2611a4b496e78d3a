"""Sample ids are the indices that the dataset returned, for every way of loading."""

import itertools

import numpy as np
import pytest
import torch
from lightning_models import IndexedVectors, Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    WeightedRandomSampler,
)

from tda_lightning import GradientRecorder
from tda_lightning import record as record_run
from tda_lightning.stores import MemoryStore


def record(data, epochs=3, **settings):
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, **settings)
    quiet_trainer(recorder, log, max_epochs=epochs).fit(Plain(mlp()), data)
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    return store, ids


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ids_are_the_indices_that_the_dataset_returned(workers, shuffle):
    store, ids = record(loader(IndexedVectors(), shuffle=shuffle, num_workers=workers))
    assert [step.sample_ids.tolist() for step in store] == ids
    assert [len(batch) for batch in ids] == 3 * [5, 5, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
        {"sampler": WeightedRandomSampler(torch.arange(13.0), 11), "shuffle": None},
        {"batch_size": None, "collate_fn": lambda s: (s[0][None], s[1][None])},
        {"drop_last": True},
    ],
    ids=["persistent workers", "weighted with replacement", "no batching", "drop last"],
)
def test_ids_with_other_loaders(settings):
    store, ids = record(loader(IndexedVectors(), **settings))
    assert [step.sample_ids.tolist() for step in store] == ids


def test_a_subset_has_the_ids_of_its_root():
    outer = Subset(IndexedVectors(), [12, 3, 5, 7, 11, 1])
    store, ids = record(loader(Subset(outer, [5, 0, 2, 4])), epochs=2)
    assert [step.sample_ids.tolist() for step in store] == ids
    assert store.train_ids().tolist() == [1, 5, 11, 12]


class Endless(Sampler):
    def __iter__(self):
        return (number * 5 % 13 for number in itertools.count())


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"limit_train_batches": 3}], ids=str)
def test_a_sampler_may_be_infinite(settings):
    store, log = MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store), log, **settings)
    trainer.fit(Plain(mlp()), DataLoader(IndexedVectors(), batch_size=4, sampler=Endless()))
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids
    assert ids[0] == [0, 5, 10, 2]


def test_a_loader_shared_with_validation_keeps_its_place():
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    data, store, log = loader(IndexedVectors()), MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store), log, val_check_interval=1)
    trainer.fit(Validated(mlp()), data, data)
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids


def test_a_batch_that_is_none_does_not_shift_the_ids():
    def drop_some(samples):
        if any(int(x[0]) == 6 for x, _ in samples):
            return None
        return torch.utils.data.default_collate(samples)

    data = DataLoader(IndexedVectors(), batch_size=5, collate_fn=drop_some)
    with pytest.warns(UserWarning, match="yielded None"):
        store, ids = record(data, epochs=2)
    assert [step.sample_ids.tolist() for step in store] == ids
    assert ids == 2 * [[0, 1, 2, 3, 4], [10, 11, 12]]


class Named(Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"x": torch.ones(7) * index, "y": index % 3, "id": 100 + index}


class OfDicts(Plain):
    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch["x"]), batch["y"])


@pytest.mark.parametrize(
    "source", ["id", lambda batch: batch["id"].tolist()], ids=["key", "function"]
)
def test_ids_can_come_from_the_batch(source):
    store = MemoryStore()
    trainer = quiet_trainer(GradientRecorder(store, sample_ids=source), max_epochs=1)
    trainer.fit(OfDicts(mlp()), loader(Named()))
    assert sorted(torch.cat([step.sample_ids for step in store]).tolist()) == list(range(100, 107))
    assert store.train_ids().tolist() == list(range(100, 107))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*vectors().tensors, strict=True))


class Handmade:
    def __iter__(self):
        return iter([tuple(vectors()[:5])])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=5), "iterable dataset"),
        (lambda: loader(IndexedVectors(), num_workers=2, in_order=False), "in_order=False"),
        (lambda: Handmade(), "a `Handmade` yields"),
    ],
    ids=["iterable", "out of order", "no loader"],
)
def test_ids_that_cannot_be_inferred_raise(data, message):
    with pytest.raises(ValueError, match=f"{message}.*(.|\n)*sample_ids="):
        record(data())


def test_iterable_datasets_work_with_ids_from_the_batch():
    store, _ = record(
        DataLoader(Stream(), batch_size=5), sample_ids=lambda batch: range(len(batch[1]))
    )
    assert len(store) == 9


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "no key of the batch, which has a list"),
        (lambda batch: batch[0], "expected one integer per sample"),
        (
            lambda batch: np.arange(len(batch[0]), dtype=np.uint64) + np.uint64(2**63),
            r"ids of 2\*\*63 and more",
        ),
        (
            lambda batch: [1, 2],
            "`sample_ids` returned 2 ids for a batch, but .* Return as many ids as the batch has",
        ),
    ],
    ids=["no such key", "not ids", "unsigned ids that do not fit", "too few"],
)
def test_wrong_ids_raise(source, message):
    with pytest.raises(ValueError, match=message):
        record(loader(IndexedVectors()), sample_ids=source)


class Keyed(IndexedVectors):
    """A dataset whose keys are no indices."""

    def __init__(self, keys):
        super().__init__()
        self.numbers = {key: number for number, key in enumerate(keys)}

    def __getitem__(self, key):
        return super().__getitem__(self.numbers[key])


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        ([(i, 7 * i % 13) for i in range(13)], r"\(0, 0\)"),
        ([f"sample {i}" for i in range(13)], "'sample 0'"),
        (range(9, 22), "13"),
    ],
    ids=["pairs", "strings", "numbers from 9 on"],
)
def test_a_sampler_of_other_things_than_indices_is_refused(keys, first):
    data = DataLoader(Keyed(keys), batch_size=5, sampler=list(keys))
    with pytest.raises(ValueError, match=f"drew {first}, which is no index.*sample_ids="):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(Plain(mlp()), data)


@pytest.mark.parametrize("draw", [torch.randperm, np.random.permutation], ids=["torch", "numpy"])
def test_a_sampler_may_draw_numbers_of_a_library(draw):
    order = draw(13)
    store = MemoryStore()
    data = DataLoader(IndexedVectors(), batch_size=5, sampler=order)
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(Plain(mlp()), data)
    assert torch.cat([step.sample_ids for step in store]).tolist() == order.tolist()


def test_one_id_for_several_rows_is_warned_of():
    with pytest.warns(UserWarning, match="one id for a batch whose tensors have 5 rows"):
        record(loader(IndexedVectors()), sample_ids=lambda batch: [1])


def test_record_names_the_missing_argument_as_the_recorder_does():
    """The message that names `sample_ids` is the same for `record`."""
    store, model = MemoryStore(), Plain(mlp())
    quiet_trainer(GradientRecorder(store)).fit(model, loader(vectors()))
    with pytest.raises(ValueError, match=r"Pass `sample_ids=`: a key of the batch"):
        record_run(model, DataLoader(Stream(), batch_size=5), like=store, progress=False)
