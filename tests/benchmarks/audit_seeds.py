"""Does the audit of the first step refuse honest models, and does it notice lost gradients?

    python tests/benchmarks/audit_seeds.py
    python tests/benchmarks/audit_seeds.py --seeds 100 --models "trained CNN"

Each model is trained in mixed precision with a new seed. It is then recorded for a step: as it is,
and with each of several faults. The table counts refusals. They should be none of the honest
models, and all of the others. Its last column compares the sum of a block's rows with its gradient,
as a multiple of the limit: the largest deviation of an honest model, the smallest of a faulty one.
"""

import argparse
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder
from tda_lightning.gradients.row_sum import RowSum
from tda_lightning.recording import audits
from tda_lightning.stores import MemoryStore

HONEST = "honest"
BATCH_SIZE = 50
TRAINED_STEPS = 60
LENGTH, VOCABULARY = 16, 64
QUIET = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def convolutional() -> nn.Module:
    """Return a network whose convolutions have biases, although batch norms subtract them."""
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    second = (nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10))


def digits() -> TensorDataset:
    data = load_digits()
    images = torch.tensor(data.data).float().reshape(-1, 1, 8, 8) / 16
    return TensorDataset(images, torch.tensor(data.target))


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Classifier(nn.Module):
    """BERT; the biases of its keys have no effect, since a softmax cancels them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": LENGTH}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 8}
        self.bert = BertForSequenceClassification(
            BertConfig(vocab_size=VOCABULARY, **sizes, **layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.bert(tokens).logits
        return logits


def excerpts() -> TensorDataset:
    """Return excerpts of the source of a module that comes with Python."""
    text = torch.tensor(list(Path(os.__file__).read_bytes())) % VOCABULARY
    text = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return TensorDataset(text, text)


def last_letters() -> TensorDataset:
    """Return excerpts whose label is the last letter, modulo 8."""
    (text, _) = excerpts().tensors
    return TensorDataset(text, text[:, -1] % 8)


class Training(pl.LightningModule):
    """A classifier or a language model.

    Attributes:
        changes: Called after each backward pass.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.changes: list[Callable[[], object]] = []

    def on_after_backward(self) -> None:
        for change in self.changes:
            change()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        if targets.ndim == 1:
            return cross_entropy(self.network(inputs), targets)
        logits = self.network(inputs).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TensorDataset], int]] = {
    "fresh CNN": (convolutional, digits, 0),
    "trained CNN": (convolutional, digits, TRAINED_STEPS),
    "fresh GPT-2": (language_model, excerpts, 0),
    "trained GPT-2": (language_model, excerpts, TRAINED_STEPS),
    "trained BERT": (Classifier, last_letters, TRAINED_STEPS),
}


def fit(training: Training, data: TensorDataset, steps: int, *callbacks: pl.Callback) -> None:
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)
    limits = {"max_steps": steps, "max_epochs": -1, "precision": "bf16-mixed"}
    pl.Trainer(callbacks=list(callbacks), **limits, **QUIET).fit(training, loader)


def be_quiet() -> None:
    for name in ("pytorch_lightning", "lightning_fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def weight_of(training: Training, seed: int) -> nn.Parameter:
    """Return one of the matrices, another one for each seed."""
    matrices = [p for p in training.parameters() if p.ndim > 1]
    return matrices[seed % len(matrices)]


@contextmanager
def no_fault(training: Training, seed: int) -> Iterator[None]:
    """Leave the model as it is."""
    yield


@contextmanager
def scaled(factor: float, training: Training, seed: int) -> Iterator[None]:
    """Scale the gradient of one weight after the backward pass."""
    training.changes.append(lambda: weight_of(training, seed).grad.mul_(factor))
    yield


@contextmanager
def noisy(training: Training, seed: int) -> Iterator[None]:
    """Add to the gradient of one weight a twentieth of its norm in a random direction."""

    def add() -> None:
        gradient = weight_of(training, seed).grad
        noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed))
        gradient.add_(noise * (0.05 * gradient.norm() / noise.norm()))

    training.changes.append(add)
    yield


@contextmanager
def dropped(training: Training, seed: int) -> Iterator[None]:
    """Drop the rows of one weight, as if its layer were not seen."""
    add = RowSum.add
    weight = weight_of(training, seed)
    lost = next(number for number, p in enumerate(training.parameters()) if p is weight)

    def add_others(rows: RowSum, blocks: tuple[int, ...], *arguments: Any) -> None:
        if lost not in blocks:
            add(rows, blocks, *arguments)

    with mock.patch.object(RowSum, "add", add_others):
        yield


FAULTS: dict[str, Callable[[Training, int], AbstractContextManager[None]]] = {
    "gradient x 1.05": partial(scaled, 1.05),
    "gradient x 0": partial(scaled, 0.0),
    "5 % noise": noisy,
    "rows dropped": dropped,
}


@dataclass(frozen=True)
class Outcome:
    """What the audit of a step found.

    Attributes:
        refusal: The error, or an empty string.
        multiple: The largest deviation of a block beyond rounding, as a multiple of the limit.
    """

    refusal: str
    multiple: float


def audit(training: Training, data: TensorDataset, seed: int) -> Outcome:
    """Record one step of a model."""
    torch.manual_seed(seed)
    multiples = []
    measure = audits.relative_deviations

    def measured(*arguments: Any) -> Tensor:
        relative = measure(*arguments)
        multiples.append(float(relative.max()) / audits.MAX_RELATIVE_DEVIATION)
        return relative

    refusal = ""
    with mock.patch.object(audits, "relative_deviations", measured):
        try:
            fit(training, data, 1, GradientRecorder(MemoryStore()))
        except ValueError as error:
            refusal = str(error)
    return Outcome(refusal, multiples[0])


def outcomes(model: str, seed: int) -> dict[str, Outcome]:
    """Audit a model with a new seed: as it is, and with each fault.

    Args:
        model: Name of the model.
        seed: Seed of the weights and of the batches.
    """
    make, data_of, steps = MODELS[model]
    data = data_of()
    torch.manual_seed(seed)
    training = Training(make())
    if steps:
        fit(training, data, steps)
    results = {}
    for name, fault in {HONEST: no_fault, **FAULTS}.items():
        copied = copy.deepcopy(training)
        with fault(copied, seed):
            results[name] = audit(copied, data, seed)
    return results


def print_row(model: str, seeds: int) -> None:
    """Print the row of a model, after the refusals of honest models."""
    results = [outcomes(model, seed) for seed in range(seeds)]
    for refusal in {each[HONEST].refusal for each in results} - {""}:
        print(refusal)
    counts = [sum(bool(each[name].refusal) for each in results) for name in (HONEST, *FAULTS)]
    largest = max(each[HONEST].multiple for each in results)
    smallest = min(each[name].multiple for each in results for name in FAULTS)
    cells = [model, *(f"{count} of {seeds}" for count in counts), f"{largest:.2f}, {smallest:.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    be_quiet()
    headings = ["model", HONEST, *FAULTS, "deviation / limit: honest, faulty"]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}", flush=True)
    for model in options.models:
        print_row(model, options.seeds)


if __name__ == "__main__":
    main()
