"""The training set may change from epoch to epoch: new splits, growing data."""

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import (
    IndexedVectors,
    Plain,
    TrainingLog,
    loader,
    mlp,
    quiet_trainer,
    vectors,
)
from torch.utils.data import DataLoader, Subset

from tda_lightning import GradientRecorder, HDF5Store, attribute, self_influence
from tda_lightning.applications import loss_history
from tda_lightning.callbacks import LossRecorder
from tda_lightning.stores import MemoryStore

SPLITS = ([0, 1, 2, 3, 4], [5, 3, 7, 11, 2], [12, 0, 5, 6, 8])


class Resplit(pl.LightningDataModule):
    """Takes another part of the data in each epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def train_dataloader(self):
        split = SPLITS[self.epochs % len(SPLITS)]
        self.epochs += 1
        return loader(Subset(IndexedVectors(), split), batch_size=3)


def trained(*callbacks, epochs=3, data=None, **settings):
    torch.manual_seed(0)
    model = Plain(mlp())
    trainer = quiet_trainer(*callbacks, max_epochs=epochs, reload_dataloaders_every_n_epochs=1)
    trainer.fit(model, data or Resplit(), **settings)
    return model, trainer


def all_of(splits):
    return sorted(set().union(*splits))


def test_samples_of_later_splits_have_scores(tmp_path):
    log = TrainingLog()
    model, _ = trained(GradientRecorder(tmp_path / "run"), log)
    run = HDF5Store.open(tmp_path / "run")
    delivered = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in run] == delivered
    assert run.train_ids().tolist() == all_of(SPLITS)
    scores = attribute(run, model, vectors()[:2], progress=False)
    assert scores.train_ids.tolist() == all_of(SPLITS)
    assert self_influence(run, progress=False).values.ne(0).all()


def test_a_resumed_run_keeps_the_samples_of_earlier_splits(tmp_path):
    _, trainer = trained(GradientRecorder(tmp_path / "run"), epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    data = Resplit()
    data.epochs = 2
    settings = {"ckpt_path": tmp_path / "two.ckpt", "weights_only": False}
    trained(GradientRecorder(tmp_path / "run"), data=data, **settings)
    run = HDF5Store.open(tmp_path / "run")
    assert [facts.index for facts in run.facts] == list(range(6))
    assert run.train_ids().tolist() == all_of(SPLITS)


def test_losses_of_later_splits_are_recorded(tmp_path):
    trained(LossRecorder(tmp_path / "run"))
    assert HDF5Store.open(tmp_path / "run").train_ids().tolist() == all_of(SPLITS)
    assert set(loss_history(tmp_path / "run").sample_ids.tolist()) == set(all_of(SPLITS))


@pytest.mark.parametrize("epochs", [1, 3])
def test_data_that_stay_the_same_keep_their_recipe(epochs, tmp_path):
    trained(GradientRecorder(tmp_path / "run"), data=loader(IndexedVectors()), epochs=epochs)
    assert HDF5Store.open(tmp_path / "run").recipe.train_ids == ((0, 13),)


def test_a_single_sample_is_warned_of():
    with pytest.warns(UserWarning, match="the training data are a single sample"):
        trained(GradientRecorder(MemoryStore()), data=loader(Subset(IndexedVectors(), [3])))


class ReplacesItsLoader(Plain):
    """Puts another loader in the place of the user's when training starts."""

    def on_train_start(self):
        combined = self.trainer.fit_loop._combined_loader
        loaders = [DataLoader(each.dataset, 4, shuffle=True) for each in combined.flattened]
        combined.flattened = loaders


def test_a_loader_that_the_model_has_replaced_is_watched():
    store, log = MemoryStore(), TrainingLog()
    trainer = quiet_trainer(GradientRecorder(store), log, max_epochs=3)
    trainer.fit(ReplacesItsLoader(mlp()), loader(IndexedVectors(), shuffle=True))
    ids = [batch[0][:, 0].long().tolist() for batch in log.batches]
    assert [step.sample_ids.tolist() for step in store] == ids
    assert [len(each) for each in ids] == [5, 5, 3, 4, 4, 4, 4, 4, 4]
