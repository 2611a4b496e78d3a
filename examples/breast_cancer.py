"""A table: which patients does a wrong diagnosis rest on, and what do they have in common with it?

Trains a small network on scikit-learn's breast cancer data, and takes the test patient with the
worst prediction. It is printed beside the training patients that helped and hurt it most. The
columns are the five features in which the patient is most unusual.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, attribute


class Diagnosis(pl.LightningModule):
    """A plain LightningModule, without any code for recording."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    pl.seed_everything(0)
    data = load_breast_cancer()
    features = torch.tensor(data.data, dtype=torch.float32)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train_ids, test_ids = order[:400], order[400:]
    train = TensorDataset(features[train_ids], labels[train_ids])

    model = Diagnosis()
    trainer = pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        callbacks=[GradientRecorder("breast_cancer.tda", existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=20, shuffle=True))

    queries = (features[test_ids], labels[test_ids])
    with torch.no_grad():
        losses = functional.cross_entropy(model.net(queries[0]), queries[1], reduction="none")
        correct = (model.net(queries[0]).argmax(dim=1) == queries[1]).float().mean()
    print(f"\nTest accuracy: {correct:.1%}")

    worst = losses.argmax().item()
    query = queries[0][[worst]], queries[1][[worst]]
    scores = attribute("breast_cancer.tda", model, query, progress=False)
    unusual = queries[0][worst].abs().topk(5).indices.tolist()
    names = [data.feature_names[i] for i in unusual]

    def line(role: str, label: Tensor, row: Tensor, score: str) -> str:
        cells = "".join(f"{row[i]:24.1f}" for i in unusual)
        return f"{role:10s} {data.target_names[label]:10s}{score:>8s}{cells}"

    print("Features are in standard deviations from the mean.\n")
    print(" " * 29 + "".join(f"{name:>24s}" for name in names))
    print(line("query", queries[1][worst], queries[0][worst], ""))
    for role, ranking in (("proponent", scores.proponents(4)), ("opponent", scores.opponents(4))):
        for i, value in zip(ranking.ids[0], ranking.values[0], strict=True):
            print(line(role, train.tensors[1][i], train.tensors[0][i], f"{value:+.2f}"))


if __name__ == "__main__":
    main()
