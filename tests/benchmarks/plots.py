"""Draw the plots of `tda_lightning.report.plots` from one run and its retrainings.

Breast cancer, 400 training samples, a tenth of their labels flipped. `python
tests/benchmarks/plots.py` takes half a minute, writes `plots.png` and a report with its removal
curve, and prints the figures.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import (
    GradientRecorder,
    InfluenceFunction,
    Scores,
    TracIn,
    Unrolled,
    attribute,
    self_influence,
    trajectory,
)
from tda_lightning.applications import Plan, leave_out, random_subsets
from tda_lightning.metrics import linear_datamodeling_score, removal_curve
from tda_lightning.report import RemovalCurve, report
from tda_lightning.report.plots import plot_lds, plot_removal, plot_self_influence

METHODS = {
    "Unrolled": Unrolled(),
    "InfluenceFunction": InfluenceFunction(),
    "TracIn": TracIn(),
}
SIZES = [10, 40, 80]
SUBSETS = 24


class Diagnosis(pl.LightningModule):
    """A plain LightningModule, without any code for recording."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def load() -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Return training set, test set, and a mask of the flipped training labels."""
    data, chance = load_breast_cancer(), torch.Generator().manual_seed(0)
    features = torch.tensor(data.data, dtype=torch.float32)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    labels, order = torch.tensor(data.target), torch.randperm(len(data.target), generator=chance)
    train, test = order[:400], order[400:]
    flipped = torch.rand(400, generator=chance) < 0.1
    noisy = torch.where(flipped, 1 - labels[train], labels[train])
    return (
        TensorDataset(features[train], noisy),
        TensorDataset(features[test], labels[test]),
        flipped,
    )


def trainer_with(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("plots.png"))
    parser.add_argument("--report", type=Path, default=Path("report.html"))
    options = parser.parse_args()
    train, test, flipped = load()
    queries = test.tensors

    with TemporaryDirectory() as folder:
        run = Path(folder) / "run.tda"
        pl.seed_everything(0)
        model = Diagnosis()
        trainer_with(GradientRecorder(run)).fit(
            model, DataLoader(train, batch_size=20, shuffle=True)
        )
        scores = {n: attribute(run, model, queries, method=m) for n, m in METHODS.items()}
        influence = self_influence(run)
        worst = int(losses(model, test).argmax())
        query = tuple(part[worst : worst + 1] for part in queries)
        strongest = scores["Unrolled"][worst]
        ids = [*strongest.highest(3).ids.tolist(), *strongest.lowest(3).ids.tolist()]
        course = trajectory(run, model, query, ids, per="epoch")

        subsets = random_subsets(400, SUBSETS)
        truth = retrained(subsets, train, test)
        lds = {
            n: linear_datamodeling_score(s.values, subsets.kept, truth) for n, s in scores.items()
        }
        curve = removal(scores, train, test)
        report(
            run,
            model,
            queries,
            train=train,
            out=options.report,
            removal=curve,
            title="Breast cancer",
        )
    print({name: round(float(values.nanmean()), 3) for name, values in lds.items()}, curve)

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    plot_self_influence(influence, flipped, axes=axes[0, 0]).set_title("plot_self_influence")
    course.plot(axes=axes[0, 1]).set_title("trajectory(...).plot")
    plot_removal(curve.removed, curve.changes, axes=axes[1, 0]).set_title("plot_removal")
    plot_lds(lds, axes=axes[1, 1]).set_title("plot_lds")
    figure.savefig(options.picture, dpi=100)


def losses(model: nn.Module, data: TensorDataset) -> Tensor:
    """Return the loss of every sample."""
    features, labels = data.tensors
    return functional.cross_entropy(model(features), labels, reduction="none").detach()


def retrained(plan: Plan, train: TensorDataset, test: TensorDataset) -> Tensor:
    """Return the losses of the test set after each training of a plan, in a bare loop."""
    return torch.stack(
        [losses(trained_on(train[chosen.nonzero()[:, 0]]), test) for chosen in plan.kept]
    )


def trained_on(data: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = Diagnosis()
    optimizer = model.configure_optimizers()
    for _ in range(20):
        for batch in torch.randperm(len(data[0])).split(20):
            optimizer.zero_grad()
            model.training_step((data[0][batch], data[1][batch]), 0).backward()
            optimizer.step()
    return model


def removal(scores: dict[str, Scores], train: TensorDataset, test: TensorDataset) -> RemovalCurve:
    """Train again without the samples that helped all queries most, and without random ones."""
    chance = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    orders = {name: s.values.mean(dim=0).argsort(descending=True) for name, s in scores.items()}
    orders["random"] = chance
    groups = [order[:size] for order in orders.values() for size in SIZES]
    measured = retrained(leave_out(400, [[], *groups]), train, test)
    changes = {
        name: removal_curve(measured[1 + 3 * place :][: len(SIZES)], measured[0]).tolist()
        for place, name in enumerate(orders)
    }
    return RemovalCurve(SIZES, changes)


if __name__ == "__main__":
    main()
