"""What does recording cost? Time of a step and memory, relative to training without it.

    python tests/benchmarks/overhead.py
    python tests/benchmarks/overhead.py --models digits resnet --rounds 9 --baselines
    python tests/benchmarks/overhead.py --profile transformer
    python tests/benchmarks/overhead.py --losses

Both sides use a real Trainer. A run is timed from the end of its warm-up until training is over and
every row is sealed on disk. That time is divided by its steps. One-time work is not counted: random
tables, the check of the first step, the first coordinates of an adaptive optimizer. Plain and
recording runs take turns, and each pair gives one ratio. The table has their median, with the
smallest and the largest in brackets.

Memory is the peak of one run in a separate process: of the allocator on a GPU, otherwise of the
resident set. It includes the rows that wait to be sealed, as many as the run's steps accumulate.

`--baselines` adds the cost of other ways to compute per-sample gradients. These are steps of a bare
loop on one batch, as a multiple of its plain steps. They end at the gradients, or at their factors:
nothing is projected or stored. Packages that are not installed are left out: `opacus`, and the
`HookManager` of `dattri-llm`, which needs an environment with an older version of transformers.
"""

import argparse
import gc
import importlib.util
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import get_args

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from tda_lightning import GradientRecorder, HDF5Store, KroneckerCountSketch, LossRecorder
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.row_formats import Storage

# The first 20 steps sample labels. That is one-time work. Of the later steps, one in each block of
# four does.
WARM_UP = 24
NOTHING_ELSE = {"logger": False, "enable_checkpointing": False}
NOTHING_ELSE |= {"enable_progress_bar": False, "enable_model_summary": False}
HEADINGS = (f"{'model':20s}", "parameters", "recorded", "plain step", f"{'recording, x plain':20s}")
HEADINGS += ("peak memory", "of plain peak", "of training's own")
Step = Callable[[Tensor, Tensor], None]


def multilayer_perceptron(*widths: int) -> nn.Module:
    layers = [(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(widths)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


def normed_convolution(before: int, after: int, size: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, after))


class ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        first = normed_convolution(before, after, 3, stride)
        self.body = nn.Sequential(first, nn.ReLU(), normed_convolution(after, after, 3))
        is_same = before == after
        self.shortcut = nn.Identity() if is_same else normed_convolution(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + self.shortcut(x))


def resnet8(width: int) -> nn.Module:
    stem = (normed_convolution(3, width, 3), nn.ReLU(), ResidualBlock(width, width))
    trunk = (ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 4 * width, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(*stem, *trunk, *head)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(wide, nn.GELU(), narrow)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.queries_keys_values(self.before_attention(x))
        three = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*three, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.before_feed_forward(x))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        # One row of positions per sample: inputs of a recorded layer begin with the sample axis.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))


def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.data).float() / 16, torch.tensor(data.target))


def noise(*shape: int) -> TensorDataset:
    return TensorDataset(torch.randn(2048, *shape), torch.randint(10, (2048,)))


def random_tokens(vocabulary: int, length: int) -> TensorDataset:
    tokens = torch.randint(vocabulary, (2048, length + 1))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


@dataclass(frozen=True)
class Case:
    """A model, its data and the number of steps of a run, including the warm-up."""

    title: str
    network: Callable[[], nn.Module]
    dataset: Callable[[], TensorDataset]
    batch_size: int
    optimizer: type[Optimizer]
    steps: int

    def new_optimizer(self, network: nn.Module) -> Optimizer:
        return self.optimizer(network.parameters(), lr=1e-3)


# Runs with short steps fill two segments of the store, so that sealing has its usual share.
CASES = {
    "digits": Case(
        "digits MLP", lambda: multilayer_perceptron(64, 128, 10), digits, 50, SGD, steps=656
    ),
    "mlp": Case(
        "MLP 784-1024-1024-10",
        lambda: multilayer_perceptron(784, 1024, 1024, 10),
        lambda: noise(784),
        batch_size=128,
        optimizer=SGD,
        steps=256,
    ),
    "resnet": Case(
        "ResNet-8/GroupNorm", lambda: resnet8(32), lambda: noise(3, 32, 32), 64, AdamW, steps=52
    ),
    "transformer": Case(
        "transformer d=256",
        lambda: Transformer(5000, length=128, width=256, heads=4, depth=4),
        lambda: random_tokens(5000, length=128),
        batch_size=16,
        optimizer=AdamW,
        steps=36,
    ),
}


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Training(pl.LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.network = case, case.network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return loss_of(self.network(inputs), targets)

    def configure_optimizers(self) -> Optimizer:
        return self.case.new_optimizer(self.network)


@dataclass
class Outcome:
    """Time and memory of one run.

    Attributes:
        step_seconds: Mean over the steps after the warm-up.
        memory_before: Peak in bytes before the first step.
        memory_peak: Peak in bytes at the end.
        recorded_share: Share of the recorded parameters.
    """

    step_seconds: float = 0.0
    memory_before: int = 0
    memory_peak: int = 0
    recorded_share: float = 0.0


class Observer(pl.Callback):
    """Measures one run. It comes before the recorder, whose work thus falls between its hooks."""

    clock: Callable[[], float] = time.perf_counter

    def __init__(self, profiler: profile | None) -> None:
        self.profiler, self.outcome = profiler, Outcome()

    def on_train_start(self, *arguments: object) -> None:
        self.outcome.memory_before = peak_memory()

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: object) -> None:
        if trainer.global_step == WARM_UP:
            if self.profiler is not None:
                self.profiler.start()
            self.start = synchronised_time()

    def on_fit_end(self, trainer: pl.Trainer, *arguments: object) -> None:
        seconds = synchronised_time() - self.start
        self.outcome.step_seconds = seconds / (trainer.global_step - WARM_UP)
        if self.profiler is not None:
            self.profiler.stop()
        self.outcome.memory_peak = peak_memory()


def synchronised_time() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Observer.clock()


def peak_memory() -> int:
    """Return bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def be_quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Including the recorder's about layers that are left out.


def train(
    case_name: str,
    record: bool,
    steps: int,
    options: argparse.Namespace,
    profiler: profile | None = None,
) -> Outcome:
    """Train from the same seed, with or without the recorder."""
    case, observer = CASES[case_name], Observer(profiler)
    gc.collect()
    torch.manual_seed(0)
    loader = DataLoader(case.dataset(), case.batch_size, shuffle=True, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        recorder = new_recorder(Path(folder) / "run.tda", options)
        callbacks = [observer, recorder] if record else [observer]
        limits = {"accelerator": options.device, "devices": 1, "max_epochs": -1, "max_steps": steps}
        pl.Trainer(callbacks=callbacks, **limits, **NOTHING_ELSE).fit(Training(case), loader)
        if record:
            observer.outcome.recorded_share = recorded_share(recorder.store.recipe)
    return observer.outcome


def new_recorder(folder: Path, options: argparse.Namespace) -> GradientRecorder | LossRecorder:
    store = HDF5Store(folder, storage=options.storage)
    if options.losses:
        return LossRecorder(store)
    return GradientRecorder(
        store,
        projector=KroneckerCountSketch(options.dimension),
        curvature=options.curvature,
        curvature_share=options.share,
    )


def recorded_share(recipe: Recipe) -> float:
    recorded = sum(block.size for block in recipe.blocks)
    return recorded / max(1, recorded + sum(entry.size for entry in recipe.left_out))


def train_in_own_process(
    case_name: str, record: bool, steps: int, options: argparse.Namespace
) -> Outcome:
    """Train in a new process, because a process cannot reset its peak memory."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=be_quiet) as pool:
        return pool.submit(train, case_name, record, steps, options).result()


def backward_step(network: nn.Module, optimizer: Optimizer) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> None:
        network.zero_grad()
        loss_of(network(inputs), targets).backward()
        optimizer.step()

    return step


def opacus_step(network: nn.Module, optimizer: Optimizer) -> Step:
    from opacus import GradSampleModule

    return backward_step(GradSampleModule(network), optimizer)


def vmap_step(network: nn.Module, optimizer: Optimizer) -> Step:
    def loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return loss_of(functional_call(network, values, (sample[None],)), target[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    parameters = dict(network.named_parameters())
    values = {name: parameter.detach() for name, parameter in parameters.items()}

    def step(inputs: Tensor, targets: Tensor) -> None:
        for name, gradients in per_sample(values, inputs, targets).items():
            parameters[name].grad = gradients.mean(dim=0)
        optimizer.step()

    return step


def dattri_step(network: nn.Module, optimizer: Optimizer) -> Step:
    from dattri_llm.gradient.callbacks import CaptureCallback
    from dattri_llm.gradient.hooks import HookManager

    collection = HookManager(network, callbacks=[CaptureCallback()]).collect()
    collection.__enter__()
    take_step = backward_step(network, optimizer)

    def step(inputs: Tensor, targets: Tensor) -> None:
        assert collection  # It collects for as long as it is alive.
        take_step(inputs, targets)

    return step


# The ways, with the packages that they need.
WAYS: dict[str, tuple[str, Callable[[nn.Module, Optimizer], Step]]] = {
    "plain": ("torch", backward_step),
    "opacus": ("opacus", opacus_step),
    "vmap(grad)": ("torch", vmap_step),
    "dattri-llm": ("dattri_llm", dattri_step),
}
BASELINES = tuple(way for way in WAYS if way != "plain")


def measure_baselines(case: Case, rounds: int, steps: int, device: str) -> dict[str, float]:
    """Return the step time of each baseline as a multiple of a plain step."""
    batch = [tensor.to(device) for tensor in case.dataset()[: case.batch_size]]
    ways: dict[str, Step] = {}
    for way, (package, make) in WAYS.items():
        if importlib.util.find_spec(package) is None:
            continue
        network = case.network().to(device)
        ways[way] = make(network, case.new_optimizer(network))
        ways[way](*batch)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way, step in list(ways.items()) * rounds:
        start = synchronised_time()
        for _ in range(steps):
            step(*batch)
        seconds[way].append(synchronised_time() - start)
    return {way: median(ratios(seconds["plain"], seconds[way])) for way in ways}


def ratios(plain: Sequence[float], other: Sequence[float]) -> list[float]:
    return [after / before for before, after in zip(plain, other, strict=True)]


def measure(case_name: str, memory: Sequence[Outcome], options: argparse.Namespace) -> list[str]:
    """Return one line of the table."""
    case = CASES[case_name]
    steps = options.steps or case.steps
    seconds: tuple[list[float], list[float]] = ([], [])
    for record in (False, True) * options.rounds:
        seconds[record].append(train(case_name, record, steps, options).step_seconds)
    multiples = ratios(*seconds)
    plain, recording = memory
    extra = recording.memory_peak - plain.memory_peak
    cells = [
        case.title,
        f"{sum(parameter.numel() for parameter in case.network().parameters()):,}",
        f"{recording.recorded_share:.1%}",
        f"{1000 * median(seconds[False]):.1f} ms",
        f"{median(multiples):.2f} ({min(multiples):.2f} to {max(multiples):.2f})",
        f"{extra / 2**20:+.0f} MiB",
        f"{extra / plain.memory_peak:+.0%}",
        f"{extra / max(1, plain.memory_peak - plain.memory_before):+.0%}",
    ]
    if options.baselines:
        factors = measure_baselines(case, options.rounds, max(2, steps // 10), options.device)
        cells += [f"{factors[way]:.2f}" if way in factors else "-" for way in BASELINES]
    return cells


def print_table(options: argparse.Namespace) -> None:
    # Memory first: on Linux the peak of a process is at least that of its parent at its start.
    memory = {
        name: [
            train_in_own_process(name, record, options.steps or CASES[name].steps, options)
            for record in (False, True)
        ]
        for name in options.models
    }
    headings = [*HEADINGS, *(f"{way}, x plain" for way in BASELINES if options.baselines)]
    print_row(headings, headings)
    print_row(["-" * len(heading) for heading in headings], headings)
    for name in options.models:
        print_row(measure(name, memory[name], options), headings)


def print_row(cells: Sequence[str], headings: Sequence[str]) -> None:
    padded = (cell.ljust(len(heading)) for cell, heading in zip(cells, headings, strict=True))
    print(f"| {' | '.join(padded)} |", flush=True)


def print_profile(case_name: str, steps: int, options: argparse.Namespace) -> None:
    """Print the operations that take most time in recording, and their time in plain training."""
    tables = []
    for record in (False, True):
        profiler = profile(activities=[ProfilerActivity.CPU])
        train(case_name, record, steps, options, profiler)
        tables.append({operation.key: operation for operation in profiler.key_averages()})
    print(f"{CASES[case_name].title}: self CPU time in ms, and calls, per step")
    print(f"{'operation':50s} {'recording':>10s} {'plain':>10s} {'calls':>10s} {'plain':>10s}")
    plain, recording = tables
    for operation in sorted(recording.values(), key=lambda event: -event.self_cpu_time_total)[:25]:
        pair = [operation, plain.get(operation.key)]
        times = [event.self_cpu_time_total / 1000 if event else 0.0 for event in pair]
        counts = [event.count if event else 0 for event in pair]
        columns = " ".join(f"{number / (steps - WARM_UP):10.3f}" for number in times + counts)
        print(f"{operation.key[:50]:50s} {columns}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs per model")
    parser.add_argument("--steps", type=int, help="steps of a run; by default the model's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--losses", action="store_true", help="record losses, without gradients")
    parser.add_argument("--curvature", choices=("none", "fisher"), default="none")
    parser.add_argument("--share", type=float, default=1.0, help="of sampled labels")
    parser.add_argument("--dimension", type=int, default=KroneckerCountSketch().dimension)
    parser.add_argument("--storage", choices=get_args(Storage), default=get_args(Storage)[0])
    parser.add_argument("--baselines", action="store_true", help=f"compare with {BASELINES}")
    parser.add_argument("--record", action="store_true", help="only record each model once")
    parser.add_argument("--profile", choices=CASES, metavar="MODEL", help="only profile a model")
    parser.add_argument("--cpu-time", action="store_true", help="of the process; for busy machines")
    options = parser.parse_args()
    if options.cpu_time:
        Observer.clock = time.process_time
    if options.steps is not None and options.steps <= WARM_UP:
        parser.error(f"--steps must exceed the warm-up of {WARM_UP}")
    be_quiet()
    if options.profile:
        steps = options.steps or min(CASES[options.profile].steps, 32)
        print_profile(options.profile, steps, options)
    elif options.record:
        for name in options.models:
            train(name, True, options.steps or CASES[name].steps, options)
    else:
        print_table(options)


if __name__ == "__main__":
    main()
