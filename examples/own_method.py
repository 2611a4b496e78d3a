"""Your own method: a few lines, compared with the built-in ones.

Each method yields, for every step, the direction that a query looks for in the rows of this step.
The score of a training sample is the inner product, summed over its visits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, TracIn, Unrolled, attribute
from tda_lightning.attribution import Attributor
from tda_lightning.metrics import rank_agreement
from tda_lightning.stores import Step, Store


@dataclass(frozen=True)
class FadingTracIn(Attributor):
    """TracIn in which a step counts less, the longer ago it is.

    Attributes:
        half_life: Number of steps after which a step counts half.
    """

    half_life: float = 20.0

    def directions(self, run: Store, queries: Tensor) -> Iterator[tuple[Step, Tensor]]:
        """Yield each step with the direction of the queries."""
        end = run.facts[-1].index
        for step in run:
            yield step, step.lr * 0.5 ** ((end - step.index) / self.half_life) * queries


class Wine(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    pl.seed_everything(0)
    features, labels = map(torch.tensor, load_wine(return_X_y=True))
    features = ((features - features.mean(dim=0)) / features.std(dim=0)).float()
    order = torch.randperm(len(labels))
    train = TensorDataset(features[order[:140]], labels[order[:140]])
    queries = features[order[140:]], labels[order[140:]]

    model = Wine()
    trainer = pl.Trainer(
        max_epochs=10,
        accelerator="cpu",
        callbacks=[GradientRecorder("own_method.tda", existing="replace")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=14, shuffle=True))

    methods = [TracIn(), Unrolled(), FadingTracIn(half_life=5), FadingTracIn(half_life=50)]
    answers = [
        attribute("own_method.tda", model, queries, method=method, progress=False)
        for method in methods
    ]
    print("\nRank agreement of the methods, mean over queries:")
    for method, scores in zip(methods, answers, strict=True):
        agreements = [rank_agreement(scores, other).mean() for other in answers]
        print(f"  {method!s:35.35s}" + "".join(f"{each:7.2f}" for each in agreements))


if __name__ == "__main__":
    main()
