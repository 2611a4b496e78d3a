"""Draw the pictures of the pages on wrong labels and on pruning.

`python tests/benchmarks/pictures.py` trains an MLP on scikit-learn's digits twice, with a tenth of
the labels flipped and with the right ones. It writes `mislabeled.png` and `prune.png` in some
twenty seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.applications import EL2N, Lowest, Mislabeled, find_mislabeled, prune

COLUMNS = 12


class Classifier(pl.LightningModule):
    """A plain LightningModule, without any code for recording."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def record(run: Path, images: Tensor, labels: Tensor) -> Path:
    """Train on all digits for 15 epochs, and record it."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=[GradientRecorder(run)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(images, labels)
    trainer.fit(Classifier(), DataLoader(data, batch_size=50, shuffle=True))
    return run


def draw(path: Path, images: Tensor, rows: dict[str, Sequence[tuple[int, str, str]]]) -> None:
    """Save rows of digits, each with a caption in a colour."""
    figure = Figure(figsize=(10, 1.25 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for line, (name, samples) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, (sample, caption, colour) in zip(line, samples, strict=True):
            axis.imshow(images[sample].reshape(8, 8), cmap="gray_r")
            axis.set_title(caption, fontsize=9, color=colour)
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def worst_first(suspects: Mislabeled, given: Tensor, right: Tensor) -> list[tuple[int, str, str]]:
    """Return the two first rows of suspects: id, given label, and red for a flipped one."""
    return [
        (sample, f'"{given[sample]}"', "tab:red" if given[sample] != right[sample] else "black")
        for sample in suspects.ids[: 2 * COLUMNS].tolist()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path())
    folder = parser.parse_args().folder
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    right, chance = torch.tensor(digits.target), torch.Generator().manual_seed(0)
    others = (right + torch.randint(1, 10, right.shape, generator=chance)) % 10
    flipped = torch.rand(len(right), generator=chance) < 0.1
    given = torch.where(flipped, others, right)

    with TemporaryDirectory() as scratch:
        suspects = find_mislabeled(record(Path(scratch) / "noisy.tda", images, given))
        worst = worst_first(suspects, given, right)
        draw(folder / "mislabeled.png", images, {"": worst[:COLUMNS], " ": worst[COLUMNS:]})
        print(f"{int(flipped.sum())} labels are flipped.", suspects, sep="\n")

        run = record(Path(scratch) / "clean.tda", images, right)
        ends = {"first\nto keep": EL2N(), "first\nto drop": Lowest(EL2N())}
        rows = {
            name: [
                (sample, str(int(right[sample])), "black")
                for sample in prune(run, COLUMNS / len(right), importance=importance).ids.tolist()
            ]
            for name, importance in ends.items()
        }
        draw(folder / "prune.png", images, rows)


if __name__ == "__main__":
    main()
