"""Unlearning: someone withdraws their data. What does an exact answer cost, and a quick one?

Digits arrive in order, in one pass, as in a stream. Then the samples 900 to 929 are withdrawn.
`rewind_plan` finds the latest snapshot that none of them had touched: training from there without
them gives the weights of a training without them, at a fraction of the cost. `unlearn` moves the
weights at once, approximately, and its report compares both.
"""

import copy

import matplotlib
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.applications import RewindPlan, rewind_plan, unlearn

matplotlib.use("agg")
import matplotlib.pyplot as plt

N_TRAIN, BATCH_SIZE = 1500, 10
WITHDRAWN = range(900, 930)


class Digits(pl.LightningModule):
    """A plain LightningModule, without any code for recording."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)  # No momentum: weights are all its state.


def train(model: Digits, data: Dataset, *callbacks: pl.Callback) -> Digits:
    """Train in one pass, in the order of the data."""
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=BATCH_SIZE))
    return model


def draw(plan: RewindPlan, snapshots: list[int]) -> None:
    """Save a picture of the recorded training, and of the part of it that is repeated."""
    figure, axes = plt.subplots(figsize=(7, 1.9), layout="constrained")
    start = plan.snapshot or 0
    axes.barh(1, plan.n_steps, height=0.5, color="lightgray")
    axes.barh(0, plan.n_steps - start, left=start, height=0.5, color="tab:blue")
    axes.scatter(plan.first_steps, [1] * len(plan.ids), color="tab:red", label="withdrawn samples")
    axes.scatter(snapshots, [1.4] * len(snapshots), color="black", marker="v", label="snapshots")
    axes.set_xlim(-3, plan.n_steps + 3)
    axes.set_ylim(-0.5, 1.7)
    axes.set_yticks([1, 0], ["recorded", "to repeat"])
    axes.set_xlabel("step")
    axes.legend(loc="lower left")
    figure.savefig("unlearning.png", dpi=110)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    data = TensorDataset(images[:N_TRAIN], labels[:N_TRAIN])
    test = DataLoader(TensorDataset(images[N_TRAIN:], labels[N_TRAIN:]), batch_size=50)
    start = Digits()

    recorder = GradientRecorder("unlearning.tda", snapshots=20, existing="replace")
    model = train(copy.deepcopy(start), data, recorder)

    plan = rewind_plan("unlearning.tda", WITHDRAWN)
    print(f"\n{plan}\n")
    assert plan.snapshot is not None
    run = HDF5Store.open("unlearning.tda")
    draw(plan, run.snapshots())
    rewound = Digits()
    rewound.load_state_dict(run.weights_at(plan.snapshot))
    kept = [i for i in range(N_TRAIN) if i not in WITHDRAWN]
    rest = [i for i in kept if i >= plan.snapshot * BATCH_SIZE]
    train(rewound, Subset(data, rest))

    from_scratch = train(copy.deepcopy(start), Subset(data, kept))
    same = all(map(torch.equal, rewound.parameters(), from_scratch.parameters()))
    print(f"Equal to a training from scratch without them, bit by bit: {'yes' if same else 'no'}\n")

    result = unlearn(
        model,
        "unlearning.tda",
        DataLoader(data, batch_size=50),
        WITHDRAWN,
        holdout=test,
        retrained=from_scratch,
        progress=False,
    )
    print(result)
    print("\nPicture: unlearning.png")


if __name__ == "__main__":
    main()
