"""Ids are those of the batches that arrive, also if other code iterates the same loader."""

import pytest
import torch
from lightning_models import IndexedVectors, Plain, mlp, quiet_trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tda_lightning import GradientRecorder, LossRecorder
from tda_lightning.stores import MemoryStore

DATA = IndexedVectors(15)


class Seen(Plain):
    """Notes the samples of its batches."""

    def __init__(self):
        super().__init__(mlp())
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(x[:, 0].long().tolist())
        return cross_entropy(self.net(x / 15), y)


class PeeksFirst(Seen):
    def on_train_start(self):
        next(iter(self.trainer.train_dataloader))


class PeeksEveryEpoch(Seen):
    def on_train_epoch_start(self):
        next(iter(self.trainer.train_dataloader))


class PassesOverAll(Seen):
    """Evaluates on its training data in the middle of an epoch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            assert len(list(self.trainer.train_dataloader)) == 3


class IteratesInItsStep(Seen):
    """Draws another batch in each step."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.others = iter(self.trainer.train_dataloader)
        next(self.others)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recorder", [GradientRecorder, LossRecorder])
@pytest.mark.parametrize(
    "model_type", [PeeksFirst, PeeksEveryEpoch, PassesOverAll, IteratesInItsStep]
)
def test_other_passes_over_the_loader_do_not_change_the_ids(model_type, recorder, workers):
    store, model = MemoryStore(), model_type()
    data = DataLoader(DATA, batch_size=5, shuffle=True, num_workers=workers)
    quiet_trainer(recorder(store)).fit(model, data)
    assert [step.sample_ids.tolist() for step in store] == model.seen
    assert len(store) == 6


def test_a_look_at_the_first_batch_does_not_change_the_ids_of_workers():
    store, model = MemoryStore(), PeeksFirst()
    data = DataLoader(DATA, batch_size=5, shuffle=True, num_workers=1)
    quiet_trainer(GradientRecorder(store), max_epochs=1).fit(model, data)
    assert [step.sample_ids.tolist() for step in store] == model.seen


def test_two_recorders_find_the_same_pass():
    first, second, model = MemoryStore(), MemoryStore(), PassesOverAll()
    recorders = GradientRecorder(first), GradientRecorder(second)
    quiet_trainer(*recorders).fit(model, DataLoader(DATA, batch_size=5, shuffle=True))
    for store in (first, second):
        assert [step.sample_ids.tolist() for step in store] == model.seen


class Skipping(DataLoader):
    def __iter__(self):
        yield from list(super().__iter__())[1::2]


class Swapping(DataLoader):
    def __iter__(self):
        first, second, *others = super().__iter__()
        yield from (second, first, *others)


@pytest.mark.parametrize("loader_type", [Skipping, Swapping])
def test_batches_that_are_drawn_and_do_not_arrive_are_warned_of(loader_type):
    with pytest.warns(
        UserWarning, match=f"`{loader_type.__name__}` has drawn samples of"
    ) as caught:
        quiet_trainer(GradientRecorder(MemoryStore())).fit(Seen(), loader_type(DATA, batch_size=5))
    assert sum("has drawn" in str(warning.message) for warning in caught) == 1


class Passing(DataLoader):
    """Changes each batch, in their order."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x + torch.zeros(7), y


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_in_order_need_no_warning(workers):
    store, model = MemoryStore(), Seen()
    data = Passing(DATA, batch_size=5, shuffle=True, num_workers=workers)
    quiet_trainer(GradientRecorder(store)).fit(model, data)
    assert [step.sample_ids.tolist() for step in store] == model.seen
