"""Draw the pictures of the pages on selecting data, on tracing facts and on alarms.

`python tests/benchmarks/pictures_uses.py` trains two networks on scikit-learn's digits and a small
transformer on Python's documentation. It writes `select.png`, `alarms.png` and `trace.png` in about
a minute.
"""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pictures import COLUMNS, draw
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset
from uses_data import (
    N_TRAIN,
    SETTINGS,
    Classifier,
    batches_of,
    digits,
    fit,
    in_domain,
    mixed_domains,
)
from uses_data_text import LanguageModel, corpus, split

from tda_lightning import GradientRecorder
from tda_lightning.applications import BM25, NextToken, select, trace_facts, trace_tokens
from tda_lightning.callbacks import TrainingAlarms

EPOCHS, FAULT_AT = 12, 8


def draw_selection(path: Path) -> None:
    """Draw targets, the first samples of a selection, and random samples."""
    x, y, test_x, test_y = digits(0)
    generator = torch.Generator().manual_seed(0)
    data, domains, wrong = mixed_domains(x, y, generator)
    target = (in_domain(test_x[:100], 1), test_y[:100])
    torch.manual_seed(0)
    model = Classifier()
    run = fit(model, data, batches_of(N_TRAIN, 20, 0))
    chosen = select(run, model, target, n=N_TRAIN // 10, redundancy=0.1, progress=False).ids
    random = torch.randperm(N_TRAIN, generator=generator)[: N_TRAIN // 10]
    images, labels = torch.cat([data.tensors[0], target[0]]), torch.cat([data.tensors[1], test_y])

    def captioned(samples: Tensor) -> list[tuple[int, str, str]]:
        colours = ["tab:red" if i < N_TRAIN and wrong[i] else "black" for i in samples.tolist()]
        pairs = zip(samples.tolist(), colours, strict=True)
        return [(i, f'"{int(labels[i])}"', colour) for i, colour in pairs]

    rows = {
        "targets": captioned(torch.arange(N_TRAIN, N_TRAIN + COLUMNS)),
        "selected": captioned(chosen[:COLUMNS]),
        "random": captioned(random[:COLUMNS]),
    }
    draw(path, images, rows)
    for name, ids in (("selected", chosen), ("random", random)):
        in_target, mislabelled = int((domains[ids] == 1).sum()), int(wrong[ids].sum())
        print(f"{name}: {in_target} of {len(ids)} are rotated, {mislabelled} are mislabelled.")


class Faulty(Sampler[int]):
    """Every sample once per epoch; from one epoch on, drawn with replacement."""

    def __init__(self, n: int) -> None:
        self.n, self.epoch = n, 0
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        if self.epoch < FAULT_AT:
            return iter(torch.randperm(self.n, generator=self.generator).tolist())
        return iter(torch.randint(self.n, (self.n,), generator=self.generator).tolist())


def draw_alarms(path: Path, folder: Path) -> None:
    """Draw the curves of a training with wrong labels, whose sampler is replaced on the way."""
    x, y, _, _ = digits(0)
    generator = torch.Generator().manual_seed(0)
    flipped = torch.rand(N_TRAIN, generator=generator) < 0.05
    others = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    data = TensorDataset(x, torch.where(flipped, others, y))
    recorder = GradientRecorder(folder / "watched.tda")
    alarms = TrainingAlarms(recorder)
    curves = Curves(alarms)
    pl.seed_everything(0, verbose=False)
    settings = {**SETTINGS, "logger": CSVLogger(folder)}
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=[recorder, alarms, curves], **settings)
    trainer.fit(Classifier(), DataLoader(data, batch_size=50, sampler=Faulty(N_TRAIN)))

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots(1, 2)
    epochs = range(1, EPOCHS + 1)
    for axis, name in zip(axes, ("suspected_mislabels", "order_faults"), strict=True):
        axis.plot(epochs, [counts[name] for counts in curves.counts], marker="o")
        axis.set(title=f"alarms/{name}", xlabel="epoch", ylabel="samples", ylim=(0, None))
    n_flipped = int(flipped.sum())
    axes[0].axhline(n_flipped, color="tab:red", linestyle="--", label=f"{n_flipped} flipped labels")
    axes[1].axvline(FAULT_AT, color="tab:red", linestyle="--", label="with replacement from here")
    for axis in axes:
        axis.legend()
    figure.savefig(path, dpi=110)
    suspects = alarms.alarms.raised[0].ids
    print(f"{int(flipped[suspects].sum())} of {len(suspects)} suspects are flipped ({n_flipped}).")
    print(alarms.alarms)


class Curves(pl.Callback):
    """The numbers of alarms after each epoch."""

    def __init__(self, alarms: TrainingAlarms) -> None:
        self.alarms, self.counts = alarms, list[dict[str, int]]()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counts.append(self.alarms.alarms.counts())


def draw_facts(path: Path, number: int = 0) -> None:
    """Draw the first passages behind a planted fact, their tokens shaded by their scores."""
    texts = corpus(0)
    torch.manual_seed(0)
    model = LanguageModel(len(texts.vocabulary))
    run = fit(model, texts.train, batches_of(len(texts.passages), 6, 0, 16), curvature="fisher")
    query = [part[number : number + 1] for part in texts.queries["direct"].tensors]
    traced = trace_facts(run, model, query, k=3, texts=texts.passages, progress=False)
    overlap = BM25().scores([texts.texts["direct"][number]], texts.passages)
    print(texts.texts["direct"][number], traced.beside(overlap), sep="\n")

    target = NextToken(tokens=lambda batch: batch[1])
    passages = [[part[i : i + 1] for part in texts.train.tensors] for i in traced.ids[0].tolist()]
    tokens = [trace_tokens(run, model, query, passage, target=target) for passage in passages]
    shades = torch.stack([scores.by_passage_token() for scores in tokens])
    shades = torch.nn.functional.pad(shades / shades.abs().max(), (1, 0))  # the first has no score
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for rank, axis in enumerate(figure.subplots(len(passages), 1)):
        sample, score = int(traced.ids[0, rank]), float(traced.scores[0, rank])
        title = f"{rank + 1}. passage {sample}, score {score:+.3g}"
        _write(axis, split(texts.passages[sample]), shades[rank].tolist(), title)
    figure.suptitle(f"Which passages taught: “{texts.texts['direct'][number]}”?")
    figure.savefig(path, dpi=110)


def _write(axis: Axes, words: list[str], shades: list[float], title: str) -> None:
    """Write words onto lines, each on a ground as blue (helps) or red (harms) as its shade."""
    axis.set(xlim=(0, 100), ylim=(-3.2, 0.6))
    axis.set_axis_off()
    axis.set_title(title, loc="left", fontsize=10)
    at, line = 0, 0
    for word, shade in zip(words, shades, strict=True):
        if at + len(word) > 96:
            at, line = 0, line + 1
        colour = (0.1, 0.4, 0.8) if shade > 0 else (0.85, 0.2, 0.2)
        ground = {"facecolor": (*colour, 0.7 * abs(shade)), "edgecolor": "none", "pad": 1}
        axis.text(at, -line, word, family="monospace", fontsize=9, bbox=ground)
        at += len(word) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=textwrap.dedent(__doc__))
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--only", nargs="*", default=["select", "alarms", "trace"])
    arguments = parser.parse_args()
    folder = arguments.folder
    with TemporaryDirectory() as scratch:
        if "select" in arguments.only:
            draw_selection(folder / "select.png")
        if "alarms" in arguments.only:
            draw_alarms(folder / "alarms.png", Path(scratch))
        if "trace" in arguments.only:
            draw_facts(folder / "trace.png")


if __name__ == "__main__":
    main()
