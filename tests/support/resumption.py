"""Callbacks and a sampler for trainings that are interrupted and resumed."""

import pytorch_lightning as pl
import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """Draw a permutation from the number of the epoch, which can be resumed at any batch."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n, self.batch_size, self.epoch, self.begin = n, batch_size, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        begin, self.begin = self.begin, 0
        yield from order[begin * self.batch_size :]

    def __len__(self):
        return self.n


class ResumeSampler(pl.Callback):
    """Make an ``EpochSampler`` continue at the batch at which the checkpoint was saved."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_load_checkpoint(self, trainer, module, checkpoint):
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        trained_batches = progress["current"]["ready"]
        self.sampler.begin = 0 if progress["is_last_batch"] else trained_batches


class InterruptAt(pl.Callback):
    """Raise an error after a step."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            raise RuntimeError("interrupted")
