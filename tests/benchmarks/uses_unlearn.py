"""Unlearn: a part of the benchmark `uses.py`."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from uses_data import N_TRAIN, Classifier, batches_of, digits, fit, retrain

from tda_lightning import Identity
from tda_lightning.applications import (
    Replay,
    SampledRetraining,
    SecondOrder,
    UnrolledUpdate,
    unlearn,
)

N_FORGET = 12
UPDATES = (
    SecondOrder(),
    UnrolledUpdate(),
    Replay(),
    Replay(0.5),
    SampledRetraining(0.25),
    SampledRetraining(),
)
RATES = (1e-5, 1e-4, 1e-3)
Rows = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Setting:
    """How the model is trained.

    Attributes:
        optimizer: Creates the optimizer.
        epochs: Passes over the data.
    """

    optimizer: Callable[..., Optimizer]
    epochs: int


class Trained(Classifier):
    """The classifier, with the optimizer of a setting."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(width=32)
        self.setting = setting

    def configure_optimizers(self) -> Optimizer:
        return self.setting.optimizer(self.parameters())


def with_weight_zero(
    model: Trained, x: Tensor, y: Tensor, batches: list[list[int]], forgotten: set[int]
) -> Trained:
    """Train without some samples; their places in the mean of a batch stay."""
    optimizer = model.configure_optimizers()
    for batch in batches:
        kept = [i for i in batch if i not in forgotten]
        optimizer.zero_grad()
        (cross_entropy(model(x[kept]), y[kept], reduction="sum") / len(batch)).backward()
        optimizer.step()
    return model


def distance(one: Trained, other: Trained, inputs: Tensor) -> float:
    """Return the mean total variation of class probabilities, in percent."""
    with torch.no_grad():
        gaps = (one(inputs).softmax(dim=1) - other(inputs).softmax(dim=1)).abs().sum(dim=1)
    return 50 * float(gaps.mean())


def unlearning(seed: int, setting: Setting, updates: bool = True) -> Rows:
    """Unlearn 12 of 1,200 digits; the truth is the same training without them."""
    x, y, *test = digits(seed)
    batches = batches_of(N_TRAIN, setting.epochs, seed)
    torch.manual_seed(seed)
    initial = Trained(setting)
    forget = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))[:N_FORGET]
    forgotten = set(forget.tolist())
    rest = [[i for i in batch if i not in forgotten] for batch in batches]
    truth = retrain(copy.deepcopy(initial), x, y, rest)
    twin = with_weight_zero(copy.deepcopy(initial), x, y, batches, forgotten)
    plain = retrain(copy.deepcopy(initial), x, y, batches)
    for kind, inputs in (("forgotten", x[forget]), ("test", test[0])):
        yield f"nothing: distance, {kind}", distance(plain, truth, inputs)
        yield f"another exact retraining: distance, {kind}", distance(twin, truth, inputs)
    if not updates:
        return
    data, model = TensorDataset(x, y), copy.deepcopy(initial)
    run = fit(model, data, batches, projector=Identity(), curvature="fisher", snapshots=24)
    loaders = DataLoader(data, 100), DataLoader(TensorDataset(*test), 100)
    for update in UPDATES:
        result = unlearn(
            model,
            run,
            loaders[0],
            forget,
            update=update,
            holdout=loaders[1],
            retrained=truth,
            progress=False,
        )
        share = getattr(update, "share", None)
        name = type(update).__name__ + (f"({share})" if share else "")
        for kind, key in (("forgotten", "forget"), ("test", "holdout")):
            yield f"{name}: distance, {kind}", 100 * result.distances[key]["after"]
        auc = result.membership_auc
        yield f"{name}: membership AUC minus retrained", abs(auc["after"] - auc["retrained"])
    yield "nothing: membership AUC minus retrained", abs(auc["before"] - auc["retrained"])


def steps(
    model: Trained, x: Tensor, y: Tensor, batches: list[list[int]], weights: Tensor
) -> Iterator[Trained]:
    """Train with a weight per sample, and yield after every step."""
    optimizer = model.configure_optimizers()
    for batch in batches:
        optimizer.zero_grad()
        losses = cross_entropy(model(x[batch]), y[batch], reduction="none")
        ((losses * weights[batch]).sum() / weights[batch].sum()).backward()
        optimizer.step()
        yield model


def without_later(
    initial: Trained, x: Tensor, y: Tensor, batches: list[list[int]], forget: Tensor
) -> Trained:
    """Train on all, and from the half of the training on without some samples."""
    weights = torch.ones(len(y))
    model = copy.deepcopy(initial)
    for number, _ in enumerate(steps(model, x, y, batches, weights), 1):
        if 2 * number >= len(batches):
            weights[forget] = 0
    return model


def along_derivative(
    initial: Trained, x: Tensor, y: Tensor, batches: list[list[int]], forget: Tensor
) -> Trained:
    """Move the trained weights along their derivative by the weight of the forgotten samples.

    It is the limit of all updates that are linear in the removed samples, however exact: the
    difference to a training that gives them 1 % less weight, times 100.
    """
    ends = []
    for weight in (1.0, 0.99):
        weights = torch.ones(len(y), dtype=torch.float64)
        weights[forget] = weight
        *_, model = steps(copy.deepcopy(initial).double(), x.double(), y, batches, weights)
        ends.append(parameters_to_vector(model.parameters()).detach())
    moved = copy.deepcopy(initial)
    vector_to_parameters((ends[0] + 100 * (ends[1] - ends[0])).float(), moved.parameters())
    return moved


def tuned(
    model: Trained, x: Tensor, y: Tensor, forget: Tensor, rate: float, ascent: float
) -> Trained:
    """Train one more epoch on the rest, against the loss of the forgotten samples."""
    model, retained = copy.deepcopy(model), torch.ones(len(y), dtype=torch.bool)
    retained[forget] = False
    optimizer = AdamW(model.parameters(), lr=rate)
    order = retained.nonzero()[:, 0][torch.randperm(int(retained.sum()))]
    for batch in order.split(50):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch])
        (loss - ascent * cross_entropy(model(x[forget]), y[forget])).backward()
        optimizer.step()
    return model


def on_halves(initial: Trained, x: Tensor, y: Tensor, batches: list[list[int]]) -> Trained:
    """Train on a random half of each batch."""
    chance = torch.Generator().manual_seed(7)
    halves = [
        torch.tensor(batch)[torch.randperm(len(batch), generator=chance)[: round(len(batch) / 2)]]
        for batch in batches
    ]
    return retrain(copy.deepcopy(initial), x, y, [half.tolist() for half in halves])


def baselines(seed: int, setting: Setting) -> Rows:
    """Compare with other ways to forget; the rates are chosen by the truth."""
    x, y, *test = digits(seed)
    batches = batches_of(N_TRAIN, setting.epochs, seed)
    torch.manual_seed(seed)
    initial = Trained(setting)
    forget = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))[:N_FORGET]
    arguments = initial, x, y, batches
    plain = retrain(copy.deepcopy(initial), x, y, batches)
    forgotten = set(forget.tolist())
    rest = [[i for i in batch if i not in forgotten] for batch in batches]
    truth = retrain(copy.deepcopy(initial), x, y, rest)
    tried = {
        "exact from a half on": [without_later(*arguments, forget)],
        "retraining on half of each batch": [on_halves(initial, x, y, rest)],
        "along the exact derivative": [along_derivative(*arguments, forget)],
        "an epoch on the rest": [tuned(plain, x, y, forget, rate, 0.0) for rate in RATES],
        "and ascent on the forgotten": [tuned(plain, x, y, forget, rate, 0.1) for rate in RATES],
    }
    for kind, inputs in (("forgotten", x[forget]), ("test", test[0])):
        for name, models in {"nothing": [plain], **tried}.items():
            yield f"{name}: distance, {kind}", min(distance(m, truth, inputs) for m in models)


STEADY_SGD = Setting(partial(SGD, lr=0.02, momentum=0.9), 20)
STEADY_ADAMW = Setting(partial(AdamW, lr=1e-3), 20)
FAST_SGD = Setting(partial(SGD, lr=0.1, momentum=0.9), 10)
FAST_ADAMW = Setting(partial(AdamW, lr=3e-3), 10)
USES: dict[str, tuple[str, Callable[[int], Rows]]] = {
    "unlearn-sgd": ("1 % of digits, SGD .02", partial(unlearning, setting=STEADY_SGD)),
    "unlearn-adamw": ("1 % of digits, AdamW .001", partial(unlearning, setting=STEADY_ADAMW)),
    "unlearn-fast-sgd": ("1 % of digits, SGD .1", partial(unlearning, setting=FAST_SGD)),
    "unlearn-fast-adamw": ("1 % of digits, AdamW .003", partial(unlearning, setting=FAST_ADAMW)),
    "unlearn-others": ("1 % of digits, AdamW .001", partial(baselines, setting=STEADY_ADAMW)),
    "unlearn-others-sgd": ("1 % of digits, SGD .02", partial(baselines, setting=STEADY_SGD)),
    "unlearn-limits": (
        "1 % of digits, SGD .1, no update",
        partial(unlearning, setting=FAST_SGD, updates=False),
    ),
}
