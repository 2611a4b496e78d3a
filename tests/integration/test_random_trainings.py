"""Random networks, losses, optimizers, loaders and trainers: exact rows, ids and weights."""

import random
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from lightning_models import quiet_trainer
from random_networks import RandomNetwork, Reentrant
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from zoo_rows import rows_by_parameter

from tda_lightning import GradientRecorder, Identity
from tda_lightning.stores import MemoryStore

N = 17


def mean_of_squares(z, y):
    return functional.mse_loss(z, functional.one_hot(y, z.shape[-1]).double())


def focal(z, y):
    losses = functional.cross_entropy(z, y, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


LOSSES = [
    functional.cross_entropy,
    partial(functional.cross_entropy, reduction="sum"),
    partial(functional.cross_entropy, label_smoothing=0.1),
    lambda z, y: functional.nll_loss(z.log_softmax(-1), y),
    lambda z, y: functional.cross_entropy(z, torch.where(y == 1, y, -100)) + mean_of_squares(z, y),
    lambda z, y: -z.log_softmax(-1).gather(1, y[:, None]).mean(),
    *(mean_of_squares, focal, functional.multi_margin_loss),
]
OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.05),
    lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01),
    lambda p: torch.optim.RMSprop(p, lr=0.005),
    lambda p: torch.optim.NAdam(p, lr=0.01),
]
LOADERS = [
    lambda data, size: DataLoader(data, size, shuffle=True),
    lambda data, size: DataLoader(data, size, shuffle=True, drop_last=True),
    lambda data, size: DataLoader(data, size, sampler=WeightedRandomSampler([0.1] + [1.0] * 16, N)),
    lambda data, size: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data), size, drop_last=False)
    ),
    lambda data, size: DataLoader(Subset(data, range(N - 1, 2, -1)), size, shuffle=True),
]


class RandomTraining(pl.LightningModule):
    """Everything about it follows from a seed."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.net = RandomNetwork(draw).double()
        self.loss, self.optimizer = draw.choice(LOSSES), draw.choice(OPTIMIZERS)
        shape = (N, 4) if self.net.has_labels_of_tokens else (N,)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, shape, generator=generator)
        if labels.ndim == 2:
            labels[:, 0] = 1  # Each sample has a term.
        inputs = self.net.draw_inputs(N, generator)
        self.data = TensorDataset(inputs, labels, torch.arange(N))
        self.loader = draw.choice(LOADERS)(self.data, draw.randint(3, 6))
        self.settings = {
            "accumulate_grad_batches": draw.choice([1, 1, 2]),
            "gradient_clip_val": draw.choice([None, 0.3]),
        }

    def loss_of(self, outputs, y):
        return self.loss(outputs.flatten(0, -2), y.flatten())

    def training_step(self, batch, batch_idx):
        return self.loss_of(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class StepLog(pl.Callback):
    """Store the batches, the weights and the gradient of each step."""

    def __init__(self):
        self.steps, self.batches = [], []

    def on_train_start(self, trainer, module):
        def log(optimizer, *args):
            gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
            norm = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
            self.steps.append((self.batches, self.weights, norm))
            self.batches = []

        trainer.optimizers[0].register_step_post_hook(log)

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch)
        self.weights = {name: value.clone() for name, value in module.state_dict().items()}


def train(seed, *callbacks):
    module = RandomTraining(seed)
    torch.manual_seed(seed + 1)
    quiet_trainer(*callbacks, **module.settings).fit(module, module.loader)
    return module


def rows_of_batch(module, batch):
    """Carry the gradient at each sample's outputs back through that sample alone."""
    x, y, _ = batch
    outputs = module.net(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(module.loss_of(outputs, y), outputs)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for sample in range(len(x)):
        module.zero_grad()  # A reentrant checkpoint allows no other way.
        place = slice(sample, sample + 1)
        module.net(x[place]).backward(gradient[place])
        yield {
            name: torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for name, p in trained.items()
        }


def expected_rows(module, batches, weights, norm):
    """Return the rows of a step by parameter: scaled like its gradient, which may be clipped."""
    module.load_state_dict(weights)
    rows = [row for batch in batches for row in rows_of_batch(module, batch)]
    by_name = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    total = torch.stack([each.sum(dim=0).norm() for each in by_name.values()]).norm()
    return {name: each * norm / total for name, each in by_name.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GradientRecorder. not recorded")
@pytest.mark.parametrize("seed", range(60))
def test_a_random_training_is_recorded_exactly(seed):
    plain, store, log = train(seed), MemoryStore(), StepLog()
    recorder = GradientRecorder(store, projector=Identity(), preconditioner="none")
    module = train(seed, recorder, log)
    # A checkpoint that is no longer reentrant may round in another way.
    bound = 1e-12 if any(isinstance(each, Reentrant) for each in module.modules()) else 0
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=bound, atol=bound)
    assert len(store) == len(log.steps)
    for step, (batches, weights, norm) in zip(store, log.steps, strict=True):
        assert step.sample_ids.tolist() == torch.cat([batch[2] for batch in batches]).tolist()
        expected = expected_rows(module, batches, weights, norm)
        largest = max(float(each.norm()) for each in expected.values())
        found = rows_by_parameter(module, step.sketch, store.recipe)
        for name, rows in found.items():
            torch.testing.assert_close(rows, expected[name], rtol=1e-7, atol=1e-9 * largest)
