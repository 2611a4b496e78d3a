"""What retraining says, kept in a cache: the truths that the benchmark `lds.py` judges by.

*Same run*: from the recorded run's initial weights, through its very batches, with some samples'
losses weighted by zero. Batches and their sizes stay, so that what a sample added to each step is
taken away, and nothing else happens to that step: the counterfactual of as-applied contributions.

*Expected*: new trainings on half of the samples, as a user would run them: full batches drawn from
that half alone, other initial weights, other orders, the losses averaged over those. They take as
many steps as the recorded run, so that it is the data that differs and not how long training went
on. (With as many epochs instead, and so half of the steps, the digits MLP is far from trained, and
averages over a hundred neighbours foretell its losses best.)
"""

import hashlib
import time
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
        kept: Which samples each retraining used, shape ``(n_subsets, n_train)``.
        losses: Each query's loss after it, for each seed, shape ``(seeds, n_subsets, n_query)``.
    """

    kept: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Retrainer:
    """Retrains one task, or remembers having done so.

    Attributes:
        task: What to train.
        subsets: How many subsets of the training data to retrain on.
        seeds: How many trainings the expected truth averages over.
        cache: Folder to remember in.
    """

    task: Task
    subsets: int
    seeds: int
    cache: Path

    def same_run(self, initial: Weights, batches: Sequence[Tensor]) -> Truth:
        """Retrain the recorded run without a tenth of the samples."""
        kept = random_subsets(self.subsets, self._n_train, share=0.9)

        def make() -> Weights:
            weights = self._retrained(stacked(initial, len(kept)), batches, kept)
            return {"kept": kept, "losses": query_losses(self.task, weights)[None]}

        facts = fingerprint([*initial.values(), *batches, kept])
        return Truth(**self._remembered("same-run", make, facts))

    def expected(self) -> Truth:
        """Train anew on half of the samples, several times for each half."""
        kept = random_subsets(self.subsets, self._n_train, share=0.5)

        def make() -> Weights:
            seeds = range(SEEDS_OF_EXPECTED, SEEDS_OF_EXPECTED + self.seeds)
            losses = [query_losses(self.task, self._anew(kept, seed)) for seed in seeds]
            return {"kept": kept, "losses": torch.stack(losses)}

        facts = f"{fingerprint([kept])}, {self.seeds} seeds"
        return Truth(**self._remembered("expected", make, facts))

    def others(self, count: int) -> Weights:
        """Train anew on all samples, some times: for methods that ask several models."""

        def make() -> Weights:
            everything = torch.ones(1, self._n_train, dtype=torch.bool)
            seeds = range(SEEDS_OF_OTHERS, SEEDS_OF_OTHERS + count)
            trained = [self._anew(everything, seed) for seed in seeds]
            return {name: torch.cat([one[name] for one in trained]) for name in trained[0]}

        return self._remembered("others", make, f"{count} seeds")

    def estimated_seconds(self) -> float:
        """Time a few steps, and say how long both truths take if neither is remembered."""
        kept = torch.ones(MEMBERS_AT_ONCE, self._n_train, dtype=torch.bool)
        start_weights = stacked(initial_weights(self.task, 0), MEMBERS_AT_ONCE)
        probes = shuffled_batches(kept, self.task.batch_size, steps=5, seed=0)
        start = time.perf_counter()
        retrain(self.task, start_weights, probes, kept.float())
        per_step = (time.perf_counter() - start) / len(probes) / MEMBERS_AT_ONCE
        return per_step * self.task.steps * self.subsets * (1 + self.seeds)

    @property
    def _n_train(self) -> int:
        return len(self.task.data().train)

    def _anew(self, kept: Tensor, seed: int) -> Weights:
        batches = shuffled_batches(kept, self.task.batch_size, self.task.steps, seed)
        initial = stacked(initial_weights(self.task, seed), len(kept))
        return self._retrained(initial, batches, kept)

    def _retrained(self, initial: Weights, batches: Sequence[Tensor], kept: Tensor) -> Weights:
        parts = []
        chunks = torch.arange(len(kept)).split(MEMBERS_AT_ONCE)
        total = len(chunks) * len(batches)
        with tqdm(total=total, desc=self.task.title, unit="step", leave=False) as bar:
            for chunk in chunks:
                own = [batch[chunk] if batch.ndim == 2 else batch for batch in batches]
                some = {name: value[chunk] for name, value in initial.items()}
                parts.append(retrain(self.task, some, own, kept[chunk].float(), bar.update))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _remembered(self, kind: str, make: Callable[[], Weights], facts: str) -> Weights:
        key = hashlib.sha256(repr((self.task.settings(), facts)).encode()).hexdigest()[:16]
        path = self.cache / f"{self.task.name}-{kind}-{key}.pt"
        if path.exists():
            return torch.load(path)
        made = make()
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(made, partial)
        partial.replace(path)
        return made


def random_subsets(count: int, n_train: int, share: float) -> Tensor:
    """Return which samples each of some random subsets keeps: the same number in each."""
    generator = torch.Generator().manual_seed(SEED_OF_SUBSETS)
    places = torch.rand(count, n_train, generator=generator).argsort(dim=1)
    return places < round(share * n_train)


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """Return a digest of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
