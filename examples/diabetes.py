"""Regression: does the attribution predict what happens if patients are left out?

Trains a network on scikit-learn's diabetes data. Scores add up: the sum of the scores of a group
predicts how the loss of a query rises without that group. Here the training is repeated without
each of 16 random groups, and the picture compares prediction and result.
"""

import matplotlib
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, attribute

matplotlib.use("agg")
import matplotlib.pyplot as plt

N_TRAIN, N_LEFT_OUT, N_GROUPS = 342, 34, 16


class Progression(pl.LightningModule):
    """A regression whose loss ignores the samples with weight 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        features, target, weight = batch
        losses = functional.mse_loss(self.net(features)[:, 0], target, reduction="none")
        return (weight * losses).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data: tuple[Tensor, Tensor], left_out: Tensor, *callbacks: pl.Callback) -> Progression:
    """Train without some samples, from the same start and in the same order."""
    pl.seed_everything(0, verbose=False)
    weight = torch.ones(N_TRAIN).index_fill(0, left_out, 0.0)
    dataset = TensorDataset(data[0][:N_TRAIN], data[1][:N_TRAIN], weight)
    model = Progression()
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(dataset, batch_size=18, shuffle=True))
    return model


def main() -> None:
    features, target = load_diabetes(return_X_y=True, scaled=False)
    features, target = (torch.tensor(part, dtype=torch.float32) for part in (features, target))
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    target = (target - target.mean()) / target.std()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    data = features[order], target[order]
    queries = (data[0][N_TRAIN:], data[1][N_TRAIN:], torch.ones(len(target) - N_TRAIN))

    def losses(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return (model.net(queries[0])[:, 0] - queries[1]) ** 2

    nothing = torch.empty(0, dtype=torch.int64)
    model = train(data, nothing, GradientRecorder("diabetes.tda", existing="replace"))
    scores = attribute("diabetes.tda", model, queries, progress=False)
    before = losses(model)

    generator = torch.Generator().manual_seed(1)
    groups = [torch.randperm(N_TRAIN, generator=generator)[:N_LEFT_OUT] for _ in range(N_GROUPS)]
    predicted = torch.stack([scores.values[:, group].sum(dim=1) for group in groups], dim=1)
    actual = torch.stack([losses(train(data, group)) - before for group in groups], dim=1)

    ranks = [part.argsort(dim=1).argsort(dim=1).float() for part in (predicted, actual)]
    pairs = torch.stack(ranks, dim=1)
    correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean()
    print(f"\nTest error (MSE): {before.mean():.2f}, by the mean {queries[1].var():.2f}")
    print(f"{N_GROUPS} trainings without {N_LEFT_OUT} of {N_TRAIN} patients. Rank correlation of")
    print(f"the predicted and the actual change in loss, mean over queries: {correlation:.2f}")

    figure, axes = plt.subplots(figsize=(5, 4.5))
    axes.scatter(predicted, actual, s=6, alpha=0.4)
    low, high = actual.min(), actual.max()
    axes.plot([low, high], [low, high], color="gray", linewidth=1)
    axes.set_xlabel("predicted change of a query's loss")
    axes.set_ylabel("change after training without the group")
    axes.set_title(f"{len(before)} queries, {N_GROUPS} groups of {N_LEFT_OUT} patients")
    figure.tight_layout()
    figure.savefig("diabetes.png", dpi=110)
    print("Picture: diabetes.png")


if __name__ == "__main__":
    main()
