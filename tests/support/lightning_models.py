"""Small Lightning modules, datasets and trainers for tests; axes have distinct prime lengths."""

import copy
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
)

Loss = Callable[[Tensor, Tensor], Tensor]


class Plain(pl.LightningModule):
    """A module with the given network, loss and optimizer."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss = functional.cross_entropy,
        optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.1),
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def quiet_trainer(*callbacks: pl.Callback, trainer_type: type = pl.Trainer, **settings: Any) -> Any:
    """Return a Trainer on the CPU without logger, checkpoints, progress bar and model summary."""
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return trainer_type(callbacks=list(callbacks), **{**defaults, **settings})


def loader(dataset: Dataset[Any], batch_size: int = 5, **settings: Any) -> DataLoader[Any]:
    """Return a shuffled loader; its last batch may be smaller than ``batch_size``."""
    return DataLoader(dataset, batch_size=batch_size, **{"shuffle": True, **settings})


def vectors(n: int = 13, d: int = 7, classes: int = 3) -> TensorDataset:
    """Return vectors and labels in float32."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.randint(classes, (n,), generator=generator)
    return TensorDataset(torch.randn(n, d, generator=generator), labels)


def mlp(d: int = 7, classes: int = 3) -> nn.Module:
    """Return a small network with a normalised hidden layer."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(d, 11), nn.ReLU(), nn.LayerNorm(11), nn.Linear(11, classes))


class TrainingLog(pl.Callback):
    """Store each batch, the weights before it, and each gradient before clipping, as references."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append(copy.deepcopy(batch))
        self.weights.append({k: v.detach().clone() for k, v in module.named_parameters()})

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}
        self.gradients.append(gradients)


class IndexedVectors(Dataset):
    """A dataset in which the first entry of each sample is its index."""

    def __init__(self, n: int = 13) -> None:
        self.vectors, self.labels = vectors(n).tensors

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        x = self.vectors[index].clone()
        x[0] = index
        return x, self.labels[index]


class AppliedGradientsLog(TrainingLog):
    """Store the gradients after clipping, too, as the optimizer used them."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if len(self.gradients) > len(self.applied):
            pairs = [(k, p.grad) for k, p in module.named_parameters() if p.grad is not None]
            self.applied.append({name: grad.clone() for name, grad in pairs})

    def __init__(self):
        super().__init__()
        self.applied = []
