"""Sample ids from unusual loaders and batches, and the `data_order` report."""

from collections import UserDict

import pytest
import torch
from lightning_models import IndexedVectors, Plain, TrainingLog, loader, mlp, quiet_trainer, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler, Subset

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.cli import main
from tda_lightning.stores import DataOrder, MemoryStore, data_order


class Nested(Plain):
    """Finds inputs and labels in nested batches."""

    def training_step(self, batch, batch_idx):
        inputs, labels = self.find(batch)
        return self.loss(self.net(inputs), labels)

    def find(self, batch):
        if isinstance(batch, torch.Tensor):
            raise TypeError
        if isinstance(batch, (dict, UserDict)):
            return (batch["x"], batch["y"]) if "x" in batch else self.find(batch["data"])
        return batch if isinstance(batch[0], torch.Tensor) else self.find(batch[0])


class Encoding(UserDict):
    """Like the result of a tokenizer: a mapping that is not a dict and has a method `to`."""

    def to(self, device):
        return self


def as_dict(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y}


COLLATES = {
    "dict": as_dict,
    "encoding": lambda samples: Encoding(as_dict(samples)),
    "nested": lambda samples: (as_dict(samples), {"other": None}),
    "deep": lambda samples: {"data": [as_dict(samples)]},
}


def record(data, model_type=Nested, epochs=2, **settings):
    store, log = MemoryStore(), TrainingLog()
    recorder = GradientRecorder(store, **settings)
    model = model_type(mlp())
    quiet_trainer(recorder, log, max_epochs=epochs).fit(model, data)
    finder = Nested(mlp())
    return store, [finder.find(batch)[0][:, 0].long().tolist() for batch in log.batches]


@pytest.mark.parametrize("collate", COLLATES.values(), ids=COLLATES)
def test_ids_in_batches_of_any_structure(collate):
    store, batch_ids = record(loader(IndexedVectors(), collate_fn=collate))
    assert [step.sample_ids.tolist() for step in store] == batch_ids


class ByLength:
    """A custom batch sampler with batches of several sizes."""

    def __iter__(self):
        return iter([[12, 1, 3], [2], [5, 4, 11, 7, 0]])

    def __len__(self):
        return 3


class InBatches(IndexedVectors):
    """Returns a batch for a list of indices, as `batch_size=None` with a batch sampler needs."""

    def __getitem__(self, indices):
        return torch.utils.data.default_collate(
            [super(InBatches, self).__getitem__(i) for i in indices]
        )


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(IndexedVectors(), batch_sampler=ByLength()),
        lambda: DataLoader(
            InBatches(),
            batch_size=None,
            sampler=BatchSampler(RandomSampler(IndexedVectors()), 4, False),
        ),
        lambda: DataLoader(
            IndexedVectors(), batch_sampler=BatchSampler(RandomSampler(IndexedVectors()), 4, True)
        ),
        lambda: loader(IndexedVectors(), num_workers=2, prefetch_factor=1, drop_last=True),
        lambda: CombinedLoader({"data": loader(IndexedVectors())}),
        lambda: {"data": loader(IndexedVectors())},
    ],
    ids=[
        "batch sampler",
        "no batches",
        "torch's batch sampler",
        "drop last",
        "combined",
        "in a dict",
    ],
)
def test_ids_with_loaders_of_any_kind(data):
    store, batch_ids = record(data())
    assert [step.sample_ids.tolist() for step in store] == batch_ids


class Batches(InBatches):
    """Items are batches, so an index does not identify a sample."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return super().__getitem__(range(4 * index, 4 * index + 4))


def test_items_that_are_batches_count_as_one_sample_unless_ids_tell_their_samples_apart():
    with pytest.warns(UserWarning, match="sampler drew one id for a batch whose tensors have 4"):
        store, _ = record(DataLoader(Batches(), batch_size=None))
    assert all(len(step.sample_ids) == 1 for step in store)
    data = DataLoader(Batches(), batch_size=None, shuffle=True)
    store, batch_ids = record(data, sample_ids=lambda batch: batch[0][:, 0].long())
    assert [step.sample_ids.tolist() for step in store] == batch_ids


def test_ids_of_a_subset_are_positions_in_the_concatenated_dataset():
    class Shifted(IndexedVectors):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            x[0] += 13 * self.number
            return x, y

    parts = [Shifted(), Shifted()]
    parts[0].number, parts[1].number = 0, 1
    store, batch_ids = record(loader(Subset(ConcatDataset(parts), [25, 3, 14, 0, 13, 7])))
    assert [step.sample_ids.tolist() for step in store] == batch_ids
    assert store.train_ids().tolist() == [0, 3, 7, 13, 14, 25]


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_several_loaders_raise_an_error_without_sample_ids(mode):
    class JoinsLoaders(Plain):
        def training_step(self, batch, batch_idx):
            parts = [part for part in batch if part is not None]
            joined = [torch.cat(both) for both in zip(*parts, strict=True)]
            return self.loss(self.net(joined[0]), joined[1])

    def data():
        return CombinedLoader([loader(IndexedVectors()), loader(IndexedVectors(7))], mode)

    with pytest.raises(ValueError, match=r"2 training loaders at once.*sample_ids="):
        quiet_trainer(GradientRecorder(MemoryStore())).fit(JoinsLoaders(mlp()), data())

    def ids(batch):
        parts = [(100 * n, part) for n, part in enumerate(batch) if part is not None]
        return torch.cat([offset + part[0][:, 0].long() for offset, part in parts])

    store = MemoryStore()
    quiet_trainer(GradientRecorder(store, sample_ids=ids)).fit(JoinsLoaders(mlp()), data())
    assert len(store) == (4 if mode == "min_size" else 6)
    assert 100 in store.train_ids()


def test_plain_data_has_no_irregularities():
    store, _ = record(loader(IndexedVectors()))
    order = data_order(store)
    assert len(order.never) == len(order.repeated) == len(order.replayed) == 0
    assert order.same_order == {}


def test_unseen_and_repeated_samples_are_reported():
    store, batch_ids = record(DataLoader(IndexedVectors(), batch_sampler=ByLength()), epochs=3)
    order = data_order(store)
    assert order.never.tolist() == [6, 8, 9, 10]
    assert order.same_order == {1: 0, 2: 0}
    sampler = RandomSampler(IndexedVectors(), replacement=True, num_samples=60)
    store, batch_ids = record(DataLoader(IndexedVectors(), batch_size=5, sampler=sampler), epochs=1)
    ids = [sample_id for batch in batch_ids for sample_id in batch]
    expected = sorted({sample_id for sample_id in ids if ids.count(sample_id) > 1})
    assert data_order(store).repeated[0].tolist() == expected


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_an_epoch_resumed_in_its_middle_repeats_its_first_batches(tmp_path, capsys):
    def train(*callbacks, resume=None):
        recorder = GradientRecorder(tmp_path / "run")
        trainer = quiet_trainer(recorder, *callbacks, enable_checkpointing=bool(callbacks))
        trainer.fit(Plain(mlp()), loader(vectors(), shuffle=False), ckpt_path=resume)

    train(ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="{step}"))
    train(resume=tmp_path / "step=5.ckpt")
    order = data_order(HDF5Store.open(tmp_path / "run"))
    assert order.replayed == (5,)
    assert order.repeated[1].tolist() == [*range(5)]
    assert main(["data", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for expected in ("never seen", "steps replayed            1: 5", "1: 5 in epoch 1"):
        assert expected in printed, printed


def test_it_prints_a_line_per_kind_of_irregularity():
    order = DataOrder(torch.tensor([3, 5]), {1: torch.tensor([7])}, (), {2: 0})
    assert repr(order).splitlines() == [
        "DataOrder",
        "  never seen                2: 3, 5",
        "  seen again in one epoch   1: 1 in epoch 1",
        "  steps replayed            none",
        "  epochs in the same order  1: 2 as 0",
    ]


def test_its_frame_has_a_row_per_irregularity():
    order = DataOrder(torch.tensor([3, 5]), {1: torch.tensor([7])}, (11,), {2: 0})
    frame = order.to_pandas()
    assert frame["kind"].value_counts().to_dict() == {
        "never seen": 2,
        "seen again in one epoch": 1,
        "step replayed": 1,
        "same order": 1,
    }
    expected = {"epoch": [1, 2], "train_id": [3, 5, 7], "step": [11], "earlier_epoch": [0]}
    assert {name: frame[name].dropna().tolist() for name in expected} == expected
    nothing = torch.empty(0, dtype=torch.int64)
    assert len(DataOrder(nothing, {}, (), {}).to_pandas()) == 0
