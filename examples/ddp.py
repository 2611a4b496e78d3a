"""Two processes (DDP): each records its own samples, and the run reads as one.

The model is trained once by one process and once by two, on the same digits with the same global
batch size. Both runs have the same steps, and answer alike.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store, attribute


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(devices: int, data: TensorDataset, run: str) -> Digits:
    """Train, and record into ``run``."""
    pl.seed_everything(0, verbose=False)
    model = Digits()
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        callbacks=[GradientRecorder(run, existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=48 // devices, shuffle=True))
    return model


def main() -> None:
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    data, queries = TensorDataset(images[:960], labels[:960]), (images[-20:], labels[-20:])

    for devices in (1, 2):
        run = f"ddp-{devices}.tda"
        model = train(devices, data, run)
        steps = HDF5Store.open(run)
        best = attribute(run, model, queries, progress=False).proponents(10).ids
        same_digit = (labels[best] == queries[1][:, None]).float().mean()
        print(f"\n{devices} process(es): {len(steps)} steps of {len(steps[0].sample_ids)} samples.")
        print(f"{same_digit:.0%} of the ten best proponents show the query's digit.")


if __name__ == "__main__":
    main()
