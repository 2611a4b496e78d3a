"""Compare what runs are used for, and more kinds of trainings, on both devices; run as a script.

Its argument is `cuda` or `apple`.

Each case returns all numbers of a result in one tensor.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import emulated_device
import lean_lightning  # noqa: F401, before Lightning
import torch
from emulated_trainings import KINDS, Setup, compare
from lightning_models import Plain, loader, mlp
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import tda_lightning as tda
from tda_lightning import applications as uses
from tda_lightning.report import report


class Joined(Plain):
    """Each sample is a set of vectors; the loss is the mean of the samples' mean losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        vectors, labels, owners = batch
        losses = functional.cross_entropy(self.net(vectors), labels, reduction="none")
        zeros = losses.new_zeros(int(owners.max()) + 1)
        sums = zeros.index_add(0, owners, losses)
        return (sums / zeros.index_add(0, owners, torch.ones_like(losses))).mean()


class TwoViews(Plain):
    """A contrastive loss of two views of each sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        n, x = len(batch[0]), torch.cat([batch[0], 1.1 * batch[0] + 0.1])
        z = functional.normalize(self.net(x), dim=1)
        own = torch.eye(2 * n, dtype=torch.bool, device=z.device)
        others = torch.arange(n, 3 * n, device=z.device) % (2 * n)
        return functional.cross_entropy((2 * z @ z.mT).masked_fill(own, -1e9), others)


class Manual(Plain):
    """Manual optimization."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self.net(batch[0]), batch[1]))
        optimizer.step()


class Experts(nn.Module):
    """Tokens are gathered for two experts; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(7, 6, padding_idx=0), nn.Linear(6, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(tokens))).flatten(0, 1)
        outputs = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (tokens.flatten() % 2 == number).nonzero().squeeze(1)
            outputs = outputs.index_add(0, chosen, expert(hidden[chosen]))
        return self.head(outputs.unflatten(0, tokens.shape))


class NextToken(Plain):
    """A language model."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0][:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


def sets() -> DataLoader[Any]:
    """Return batches of joined sets, with the number of the set of each vector."""
    generator = torch.Generator().manual_seed(1)
    samples = [
        (torch.randn(size, 7, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in (4, 2, 5, 3, 1, 6, 2, 2, 7, 3, 5, 1, 4)
    ]

    def join(batch: Any) -> Any:
        vectors, labels = (torch.cat(parts) for parts in zip(*batch, strict=True))
        lengths = torch.tensor([len(part) for part, _ in batch])
        return vectors, labels, torch.repeat_interleave(torch.arange(len(batch)), lengths)

    return DataLoader(samples, batch_size=5, collate_fn=join)  # type: ignore[arg-type]


def logits(module: Any, batch: Any) -> Tensor:
    return module.net(batch[0])


def labels(batch: Any) -> Tensor:
    return batch[1]


def numbers_in(result: Any) -> Iterator[Tensor]:
    """Yield all numbers of a result, flattened, in single precision, on the CPU."""
    if isinstance(result, Tensor):
        yield result.detach().cpu().float().flatten().nan_to_num(-1)
    elif isinstance(result, nn.Module):
        yield from numbers_in(list(result.parameters()))
    elif is_dataclass(result):
        yield from numbers_in([getattr(result, field.name) for field in fields(result)])
    elif isinstance(result, list | tuple):
        for part in result:
            yield from numbers_in(part)


def of(use: Callable[..., Any], *arguments: Any, **settings: Any) -> Callable[[Setup], Tensor]:
    """Return a function that uses the recorded run."""
    return lambda s: torch.cat([*numbers_in(use(s.run, *arguments, **settings))])


def with_model(use: Callable[..., Any], data: Any, **settings: Any) -> Callable[[Setup], Tensor]:
    """Return a function that uses the recorded run, the model and data."""

    def numbers(s: Setup) -> Tensor:
        result = use(s.run, s.model, data(s), progress=False, **settings)
        return torch.cat([*numbers_in(result)])

    return numbers


def unlearned(update: Any) -> Callable[[Setup], Tensor]:
    def numbers(s: Setup) -> Tensor:
        holdout = loader(TensorDataset(*s.queries), shuffle=False)
        settings = {"update": update, "holdout": holdout, "outputs": logits, "progress": False}
        result = uses.unlearn(s.model, s.run, s.batches(), [1, 2], **settings)
        return torch.cat([*numbers_in(result)])

    return numbers


def trained(model: Callable[[], Plain], **settings: Any) -> Callable[[Setup], Tensor]:
    return lambda s: s.rows(model(), loader(s.vectors), **settings)


def adam() -> Plain:
    return Plain(mlp(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))


def last_layer(s: Setup) -> Tensor:
    target = tda.Logit(1, outputs=logits)
    batches, settings = s.batches(), {"target": target, "progress": False}
    return uses.last_layer_scores(s.model, batches, s.queries, run=s.run, **settings).values


def losses_of_a_training(s: Setup) -> Tensor:
    path = s.path(".tda")
    torch.manual_seed(0)
    s.place.trainer(tda.LossRecorder(path)).fit(adam(), loader(s.vectors))
    return torch.cat([*numbers_in(uses.loss_history(path))])


def length_of_report(s: Setup) -> Tensor:
    queries, page = loader(TensorDataset(*s.queries), shuffle=False), s.path(".html")
    report(s.run, s.model, queries, train=s.vectors, out=page, outputs=logits, progress=False)
    return torch.tensor([float("proponents" in page.read_text())])


def all_data(s: Setup) -> Any:
    return s.batches()


def queries(s: Setup) -> Any:
    return s.queries


CLASSES = {"outputs": logits, "labels": labels}
EVEN = torch.arange(23) % 2 == 0
USES: dict[str, Callable[[Setup], Tensor]] = {
    "joined sets": lambda s: s.rows(Joined(mlp()), sets()),
    "two views": lambda s: s.rows(TwoViews(mlp()), loader(s.vectors)),
    "manual optimization": lambda s: s.rows(Manual(mlp()), loader(s.vectors)),
    "experts, tied weights": lambda s: s.rows(NextToken(Experts()), loader(s.tokens)),
    "accumulated, clipped": trained(adam, accumulate_grad_batches=2, gradient_clip_val=0.1),
    "clipped by value": trained(adam, gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "bf16": trained(adam, precision="bf16-true"),
    "LossRecorder": losses_of_a_training,
    "report": length_of_report,
    "find_mislabeled": with_model(uses.find_mislabeled, all_data, **CLASSES),
    "find_mislabeled, without a model": of(uses.find_mislabeled, progress=False),
    "explain_errors": with_model(uses.explain_errors, all_data, **CLASSES),
    "out_of_sample_probabilities": with_model(
        uses.out_of_sample_probabilities, all_data, **CLASSES
    ),
    "find_duplicates": of(uses.find_duplicates, progress=False),
    "find_outliers": of(uses.find_outliers),
    "find_shortcut": lambda s: torch.cat(
        [*numbers_in(uses.find_shortcut(s.run, s.model, s.queries, {"even": EVEN}, outputs=logits))]
    ),
    "attribute_summary": with_model(uses.attribute_summary, all_data),
    "attribute_summary of groups": with_model(
        uses.attribute_summary, all_data, summary=uses.WorstGroupLoss(EVEN.long())
    ),
    "prune": of(uses.prune, 0.5),
    "coreset": of(uses.coreset, 0.5),
    "select": with_model(uses.select, queries, n=5),
    "trace_facts": with_model(uses.trace_facts, queries, k=3),
    "last_layer_scores": last_layer,
    "unlearn, FirstOrder": unlearned(uses.FirstOrder(0.1)),
    "unlearn, SecondOrder": unlearned(uses.SecondOrder()),
    "unlearn, Replay": unlearned(uses.Replay()),
    "sample_losses": lambda s: tda.sample_losses(s.model, s.batches(), progress=False).values,
    "rows of another pass": lambda s: torch.cat(
        [x.sketch for x in tda.record(s.model, s.batches(), like=s.run, progress=False)]
    ),
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    libraries = emulated_device.install(KINDS[sys.argv[1]])
    with tempfile.TemporaryDirectory() as workspace:
        compare(USES, Path(workspace))
