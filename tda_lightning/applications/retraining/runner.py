"""Run a plan of retrainings: several processes, resumable, with progress and an estimate."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)
from tqdm import tqdm

from tda_lightning.applications.retraining.plan import Plan
from tda_lightning.applications.retraining.pool import require_importable, run_in_processes
from tda_lightning.applications.retraining.results import ResultFolder, Retrainings
from tda_lightning.passes.model_state import preserved_rng
from tda_lightning.stores.arguments import describe, require_kind, require_whole

_SAMPLERS = (RandomSampler, SequentialSampler)


@dataclass(frozen=True)
class _Task:
    model: Callable[[], nn.Module]
    loader: Callable[[], DataLoader[Any]]
    trainer: Callable[[], Any]
    measure: Callable[[nn.Module], Tensor]


_Result = tuple[int, Tensor]
# The models and trainers of earlier trainings in this process.
_used: WeakSet[Any] = WeakSet()


def retrain(
    plan: Plan,
    *,
    model: Callable[[], nn.Module],
    loader: Callable[[], DataLoader[Any]],
    trainer: Callable[[], Any],
    measure: Callable[[nn.Module], Tensor],
    folder: str | Path | None = None,
    processes: int = 1,
    progress: bool = True,
) -> Retrainings:
    """Train again for every entry of a plan, and measure each trained model.

    It is the ground truth for attributions. Before each training, the random numbers of Python,
    NumPy and torch are seeded with the plan's seed; then the functions are called in the order
    ``model``, ``loader``, ``trainer``.

    Args:
        plan: The samples and the seed of each training, such as ``random_subsets(n_train, 50)``.
        model: Returns a new, untrained LightningModule.
        loader: Returns the loader of the full training set. Each training gets one with the same
            settings for its samples. If their weights differ, it draws them in proportion.
        trainer: Returns a new Trainer.
        measure: Returns numbers for a trained model, such as one loss per query, shape
            ``(n_values,)``. The model is in evaluation mode.
        folder: Folder for the results. A call with the same plan, functions and folder continues
            after an interruption. By default, results are only in memory.
        processes: Number of trainings at the same time. With more than one, all functions must be
            importable: defined at the top of a file.
        progress: Show a progress bar with the remaining time.

    Returns:
        The measurements, shape ``(n_trainings, n_values)``. A warning names trainings that gave
        NaN.

    Raises:
        FileExistsError: If the folder holds a recorded run, or the results of another plan or of
            other functions.
        RuntimeError: If a training fails in one of several processes. Finished results are kept.
        ValueError: If the loader has a sampler of an unknown kind, its dataset has another length
            than the plan, a model or trainer is returned again, or ``measure`` returns anything but
            numbers.
    """
    require_kind("plan", plan, Plan, "`random_subsets(n_train, 50)`")
    require_whole("processes", processes, least=1)
    task = _Task(model, loader, trainer, measure)
    for name, function in vars(task).items():
        if isinstance(function, nn.Module) or not callable(function):
            raise ValueError(
                f"`{name}` is a `{type(function).__name__}`; expected a function that is called "
                "for each training, such as the name of a class."
            )
    if processes > 1:
        require_importable(vars(task))
    with TemporaryDirectory() as temporary:
        results = ResultFolder(temporary if folder is None else folder, plan, vars(task))
        missing = results.missing()
        with tqdm(
            total=len(plan),
            initial=len(plan) - len(missing),
            desc="retraining",
            disable=not progress,
        ) as bar:
            for number, values in _run(task, plan, missing, processes):
                results.add(number, values)
                bar.update()
        retrained = results.load()
    _warn_of_nan(retrained)
    return retrained


def _warn_of_nan(retrained: Retrainings) -> None:
    numbers = retrained.values.isnan().any(dim=1).nonzero()[:, 0].tolist()
    if numbers:
        warnings.warn(
            f"`measure` returned NaN after {len(numbers)} of {len(retrained.values)} trainings, "
            f"first after number {numbers[0]}: these may have diverged. Metrics of values that "
            "are NaN are NaN, too. Leave such rows out, or train with a lower learning rate.",
            stacklevel=3,
        )


def _run(task: _Task, plan: Plan, numbers: list[int], processes: int) -> Iterator[_Result]:
    """Yield the measurements of each training, in the order in which they finish."""
    if processes == 1 or len(numbers) < 2:
        for number in numbers:
            with preserved_rng():
                values = _train(task, plan.weights[number], int(plan.seeds[number]))
            yield number, values
        return
    calls = {n: (task, plan.weights[n].numpy(), int(plan.seeds[n])) for n in numbers}
    for number, values in run_in_processes(_train_on_arrays, calls, processes):
        yield number, torch.from_numpy(values)


def _train_on_arrays(task: _Task, weights: Any, seed: int) -> Any:
    # Tensors would be passed through shared memory, which can run out.
    return _train(task, torch.from_numpy(weights), seed).numpy()


def _train(
    task: _Task, weights: Float[Tensor, " n_train"], seed: int
) -> Float[Tensor, " n_values"]:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    module = _new("model", task.model())
    loader = weighted_loader(task.loader(), weights)
    _new("trainer", task.trainer()).fit(module, loader)
    module.eval()
    with torch.no_grad():
        values = task.measure(module)
    if not isinstance(values, Tensor) or values.ndim != 1:
        raise ValueError(
            f"`measure` returned {describe(values)}; expected a tensor of numbers, shape "
            "(n_values,)."
        )
    return values.detach().cpu().double()


def _new(name: str, created: Any) -> Any:
    """Check that no earlier training had this object: it would continue there, or not at all."""
    if created in _used:
        raise ValueError(
            f"`{name}` returned the `{type(created).__name__}` of an earlier training; expected a "
            "new one for each training. Create it inside the function."
        )
    _used.add(created)
    return created


def weighted_loader(loader: DataLoader[Any], weights: Float[Tensor, " n_train"]) -> DataLoader[Any]:
    """Return a loader with the same settings that draws samples by their weights.

    A weight of 0 leaves a sample out. If the others are all equal, each is drawn once per epoch;
    else as many are drawn with replacement, in proportion.

    Raises:
        ValueError: If the loader has another sampler, or its dataset another length.
    """
    if (kind := _other_sampler(loader)) is not None:
        raise ValueError(
            f"`loader` returned a loader with a {kind}; expected a `DataLoader` with or "
            "without `shuffle=True`, whose samples can be replaced by a subset."
        )
    n_samples = len(loader.dataset)  # type: ignore[arg-type]
    if n_samples != len(weights):
        raise ValueError(
            f"`loader` returned a loader of {n_samples} samples; expected {len(weights)}, as in "
            "the plan."
        )
    kept = weights.nonzero()[:, 0]
    factors = weights[kept]
    sampler: Sampler[int] | None = None
    if not torch.equal(factors, factors[:1].expand(len(factors))):
        sampler = WeightedRandomSampler(factors.tolist(), len(kept), generator=loader.generator)
    return DataLoader(
        Subset(loader.dataset, kept.tolist()),
        batch_size=loader.batch_size,
        shuffle=sampler is None and isinstance(loader.sampler, RandomSampler),
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def _other_sampler(loader: Any) -> str | None:
    """Return what determines the samples of a loader, if they cannot be replaced by a subset."""
    if not isinstance(loader, DataLoader) or type(loader.sampler) not in _SAMPLERS:
        return f"`{type(getattr(loader, 'sampler', loader)).__name__}`"
    # With `batch_sampler=`, the loader's own sampler is not used.
    if loader.batch_sampler is not None and loader.batch_size is None:
        return f"`batch_sampler=` ({type(loader.batch_sampler).__name__})"
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler) and sampler.num_samples != len(sampler.data_source):
        return "`RandomSampler` of another number of samples"
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return "`RandomSampler` with replacement"
    return None
