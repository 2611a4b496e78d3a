"""How large are an optimizer's stored coordinates, and does their rounding change scores?

    python tests/benchmarks/coordinates.py
    python tests/benchmarks/coordinates.py --only scores

The first table records the first 20 steps of GPT-2 (124M parameters, from its configuration,
random weights) on excerpts of Python's own source. Each of these steps stores new coordinates; the
30 steps after them store one more set. It needs transformers, and some gigabytes of memory.

The second table records the digits CNN of `lds.py` with exact coordinates, and with rounded ones.
It compares their scores: the rank correlation over training samples, and the largest difference as
a share of the largest score, per query.
"""

import argparse
import logging
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import h5py
import pytorch_lightning as pl
import torch
from lds_tasks import TASKS, train
from torch import Tensor
from torch.utils.data import DataLoader

from tda_lightning import (
    GradientRecorder,
    InfluenceFunction,
    KroneckerCountSketch,
    TracIn,
    Unrolled,
    attribute,
)
from tda_lightning.metrics.agreement import rank_correlation
from tda_lightning.recording.preconditioning import optimizer_preconditioner
from tda_lightning.stores import MemoryStore

WARM_UP = 20
SETS_IN_50_STEPS = 21
BATCH, LENGTH = 2, 64
METHODS = (TracIn(), InfluenceFunction(), Unrolled())
Scores = dict[str, Tensor]


class LanguageModel(pl.LightningModule):
    """GPT-2, from its configuration."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.network = GPT2LMHeadModel(GPT2Config())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.network(batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def excerpts() -> Tensor:
    """Return excerpts of Python's source; tokens are words, the most frequent ones first."""
    folder = Path(os.__file__).parent
    words = " ".join(path.read_text() for path in sorted(folder.glob("a*.py"))).split()
    by_count = sorted(set(words), key=lambda word: (-words.count(word), word))
    number = {word: rank for rank, word in enumerate(by_count)}
    tokens = torch.tensor([number[word] for word in words])
    return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def print_sizes() -> None:
    """Record GPT-2, and print the bytes of its coordinates."""
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        recorder = GradientRecorder(Path(folder) / "run")
        loader = DataLoader(excerpts(), BATCH, shuffle=True)
        pl.Trainer(max_steps=WARM_UP, accelerator="cpu", callbacks=[recorder], **quiet).fit(
            LanguageModel(), loader
        )
        plain = stored = 0
        for path in (Path(folder) / "run").glob("segment-*.h5"):
            with h5py.File(path) as file:
                for name in ("rows", "columns"):
                    part = file["preconditioners"][name]
                    plain += part.size * part.dtype.itemsize
                    stored += part.id.get_storage_size()
    print("| coordinates of GPT-2 | one set | 50 steps |\n|---|---|---|")
    for title, size in (("exact, uncompressed", plain), ("rounded, compressed", stored)):
        each = size / WARM_UP / 1e6
        print(f"| {title} | {each:.2f} MB | {each * SETS_IN_50_STEPS:.1f} MB |", flush=True)


def scores_with(bits: int | None, seed: int = 0) -> Scores:
    """Record the digits CNN, and return the scores of each method.

    Args:
        bits: Significant binary digits of the coordinates; exact ones if none.
        seed: Seed of the projector.
    """
    task, store = TASKS["digits-cnn"], MemoryStore()
    exact = optimizer_preconditioner.round_to_bits
    rounded = (lambda values: values) if bits is None else partial(exact, bits=bits)
    with mock.patch.object(optimizer_preconditioner, "round_to_bits", rounded):
        projector = KroneckerCountSketch(seed=seed)
        learner = train(task, 0, GradientRecorder(store, projector=projector))
    queries = task.data().queries.tensors
    return {
        type(method).__name__: attribute(
            store, learner, queries, method=method, progress=False
        ).values
        for method in METHODS
    }


def print_agreement() -> None:
    """Print how far scores are from those with exact coordinates."""
    exact = scores_with(None)
    print(
        "| coordinates | method | rank correlation: mean, smallest | difference: median, largest |"
    )
    print("|---|---|---|---|")
    cases = [(f"{bits} binary digits", partial(scores_with, bits)) for bits in (4, 5, 8)]
    for title, make in [*cases, ("exact, another sketch", partial(scores_with, None, seed=1))]:
        for name, scores in make().items():
            ranks = rank_correlation(scores, exact[name])
            far = (scores - exact[name]).abs().amax(dim=1) / exact[name].abs().amax(dim=1)
            print(
                f"| {title} | `{name}` | {ranks.mean():.4f}, {ranks.min():.4f} "
                f"| {far.median():.1%}, {far.max():.1%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("sizes", "scores"))
    only = parser.parse_args().only
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if only != "scores":
        print_sizes()
    if only != "sizes":
        print_agreement()


if __name__ == "__main__":
    main()
