"""Unlearn: a part of the benchmark `uses.py`."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from uses_data import N_TRAIN, Classifier, batches_of, digits, fit, retrain

from tda_lightning import Identity
from tda_lightning.applications import Replay, SecondOrder, UnrolledUpdate, unlearn

N_FORGET = 12
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
    for update in (SecondOrder(), UnrolledUpdate(), Replay(), Replay(0.5)):
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
        name = f"Replay({update.share})" if isinstance(update, Replay) else type(update).__name__
        for kind, key in (("forgotten", "forget"), ("test", "holdout")):
            yield f"{name}: distance, {kind}", 100 * result.distances[key]["after"]
        auc = result.membership_auc
        yield f"{name}: membership AUC minus retrained", abs(auc["after"] - auc["retrained"])
    yield "nothing: membership AUC minus retrained", abs(auc["before"] - auc["retrained"])


STEADY_SGD = Setting(partial(SGD, lr=0.02, momentum=0.9), 20)
STEADY_ADAMW = Setting(partial(AdamW, lr=1e-3), 20)
FAST_SGD = Setting(partial(SGD, lr=0.1, momentum=0.9), 10)
FAST_ADAMW = Setting(partial(AdamW, lr=3e-3), 10)
USES: dict[str, tuple[str, Callable[[int], Rows]]] = {
    "unlearn-sgd": ("1 % of digits, SGD .02", partial(unlearning, setting=STEADY_SGD)),
    "unlearn-adamw": ("1 % of digits, AdamW .001", partial(unlearning, setting=STEADY_ADAMW)),
    "unlearn-fast-sgd": ("1 % of digits, SGD .1", partial(unlearning, setting=FAST_SGD)),
    "unlearn-fast-adamw": ("1 % of digits, AdamW .003", partial(unlearning, setting=FAST_ADAMW)),
    "unlearn-limits": (
        "1 % of digits, SGD .1, no update",
        partial(unlearning, setting=FAST_SGD, updates=False),
    ),
}
