"""LightningCLI: the recorder stands in the configuration, and the question on the command line.

    python lightning_cli.py fit --config lightning_cli.yaml
    tda-lightning attribute lightning_cli.tda --config lightning_cli.yaml \
        --checkpoint lightning_cli.ckpt --model lightning_cli:Classifier \
        --queries lightning_cli:Digits --split test
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Classifier(pl.LightningModule):
    """A network with one hidden layer.

    Args:
        width: Width of the hidden layer.
        lr: Learning rate.
    """

    def __init__(self, width: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Digits(pl.LightningDataModule):
    """Scikit-learn's digits: 1500 for training, the first few others as queries.

    Args:
        batch_size: Number of training samples in a batch.
        n_query: Number of test samples.
    """

    def __init__(self, batch_size: int = 50, n_query: int = 5) -> None:
        super().__init__()
        self.batch_size, self.n_query = batch_size, n_query

    def setup(self, stage: str) -> None:
        images, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = images.float() / 16
        self.train: Dataset = TensorDataset(images[:1500], labels[:1500])
        end = 1500 + self.n_query
        self.test: Dataset = TensorDataset(images[1500:end], labels[1500:end])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.n_query)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits, save_config_callback=None)
