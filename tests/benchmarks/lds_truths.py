"""The results of retraining, with a cache: the truths of the benchmark `lds.py`.

*Same run*: the recorded run is repeated from its initial weights and through its batches, with some
samples' losses weighted by zero. Batches and their sizes are unchanged. Each step only loses the
contributions of these samples: the counterfactual of as-applied contributions.

*Expected*: new trainings on half of the samples, as a user would run them. Full batches are drawn
from that half alone, and losses are averaged over initial weights and orders. The number of steps
is that of the recorded run, so that only the data differ and not the length of the training. (With
as many epochs instead, and so half of the steps, the digits MLP is far from trained. Averages over
a hundred neighbours then predict its losses best.)
"""

import argparse
import hashlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lds_retraining import (
    Weights,
    initial_weights,
    query_losses,
    retrain,
    shuffled_batches,
    stacked,
)
from lds_tasks import Task
from torch import Tensor
from tqdm import tqdm

MEMBERS_AT_ONCE = 20
SEEDS_OF_EXPECTED, SEEDS_OF_OTHERS, SEED_OF_SUBSETS = 100, 200, 300


@dataclass(frozen=True)
class Truth:
    """The losses of the queries after real retraining.

    Attributes:
        included: Mask of the samples of each retraining, shape ``(n_subsets, n_train)``.
        losses: Query losses after it, for each seed, shape ``(seeds, n_subsets, n_query)``.
    """

    included: Tensor
    losses: Tensor

    @classmethod
    def of(cls, cached: Weights) -> "Truth":
        """Read a truth from an entry of the cache."""
        return cls(included=cached["kept"], losses=cached["losses"])


@dataclass(frozen=True)
class Retrainer:
    """Retrains a task, or reads the results from the cache.

    Attributes:
        task: The task to retrain.
        subsets: Number of subsets of the training data to retrain on.
        seeds: Number of trainings that the expected truth averages over.
        cache: Folder of the results.
    """

    task: Task
    subsets: int
    seeds: int
    cache: Path

    def same_run(self, initial: Weights, batches: Sequence[Tensor]) -> Truth:
        """Retrain the recorded run without a tenth of the samples."""
        included = random_subsets(self.subsets, self._n_train, share=0.9)

        def make() -> Weights:
            weights = self._retrained(stacked(initial, len(included)), batches, included)
            return {"kept": included, "losses": query_losses(self.task, weights)[None]}

        facts = fingerprint([*initial.values(), *batches, included])
        return Truth.of(self._cached("same-run", make, facts))

    def expected(self) -> Truth:
        """Train on random halves of the samples, several times for each half."""
        included = random_subsets(self.subsets, self._n_train, share=0.5)

        def make() -> Weights:
            seeds = range(SEEDS_OF_EXPECTED, SEEDS_OF_EXPECTED + self.seeds)
            losses = [query_losses(self.task, self._train_new(included, seed)) for seed in seeds]
            return {"kept": included, "losses": torch.stack(losses)}

        facts = f"{fingerprint([included])}, {self.seeds} seeds"
        return Truth.of(self._cached("expected", make, facts))

    def others(self, count: int) -> Weights:
        """Train on all samples several times, for methods that use several models."""

        def make() -> Weights:
            everything = torch.ones(1, self._n_train, dtype=torch.bool)
            seeds = range(SEEDS_OF_OTHERS, SEEDS_OF_OTHERS + count)
            trained = [self._train_new(everything, seed) for seed in seeds]
            return {name: torch.cat([each[name] for each in trained]) for name in trained[0]}

        return self._cached("others", make, f"{count} seeds")

    def estimated_seconds(self) -> float:
        """Measure a few steps, and return how long both truths take if neither is cached."""
        included = torch.ones(MEMBERS_AT_ONCE, self._n_train, dtype=torch.bool)
        start_weights = stacked(initial_weights(self.task, 0), MEMBERS_AT_ONCE)
        probes = shuffled_batches(included, self.task.batch_size, steps=5, seed=0)
        start = time.perf_counter()
        retrain(self.task, start_weights, probes, included.float())
        per_step = (time.perf_counter() - start) / len(probes) / MEMBERS_AT_ONCE
        return per_step * self.task.steps * self.subsets * (1 + self.seeds)

    @property
    def _n_train(self) -> int:
        return len(self.task.data().train)

    def _train_new(self, included: Tensor, seed: int) -> Weights:
        batches = shuffled_batches(included, self.task.batch_size, self.task.steps, seed)
        initial = stacked(initial_weights(self.task, seed), len(included))
        return self._retrained(initial, batches, included)

    def _retrained(self, initial: Weights, batches: Sequence[Tensor], included: Tensor) -> Weights:
        parts = []
        chunks = torch.arange(len(included)).split(MEMBERS_AT_ONCE)
        total = len(chunks) * len(batches)
        with tqdm(total=total, desc=self.task.title, unit="step", leave=False) as bar:
            for chunk in chunks:
                chunk_batches = [b[chunk] if b.ndim == 2 else b for b in batches]
                weights = {name: value[chunk] for name, value in initial.items()}
                factors = included[chunk].float()
                parts.append(retrain(self.task, weights, chunk_batches, factors, bar.update))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _cached(self, kind: str, make: Callable[[], Weights], facts: str) -> Weights:
        key = hashlib.sha256(repr((self.task.settings(), facts)).encode()).hexdigest()[:16]
        path = self.cache / f"{self.task.name}-{kind}-{key}.pt"
        if path.exists():
            return torch.load(path)
        result = make()
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(result, partial)
        partial.replace(path)
        return result


def random_subsets(count: int, n_train: int, share: float) -> Tensor:
    """Return the masks of random subsets with the same number of samples in each."""
    generator = torch.Generator().manual_seed(SEED_OF_SUBSETS)
    places = torch.rand(count, n_train, generator=generator).argsort(dim=1)
    return places < round(share * n_train)


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """Return a digest of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options of a comparison, with the cache; compute quietly and on one thread."""
    default = Path(tempfile.gettempdir()) / "tda-lightning-lds"
    parser.add_argument("--cache", type=Path, default=default, help="folder of retraining results")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return parser.parse_args()
