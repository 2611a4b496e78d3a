"""Groups: how groups of training samples influence groups of queries, or one summary of them.

A summary turns many queries into one: their mean loss, the loss of the worst group, or the gap
between two groups. Its gradient is a weighted sum of the queries' gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from tda_lightning.attribution import Attributor, Averaged
from tda_lightning.passes.model_state import warn_of_other_weights
from tda_lightning.passes.queries import identified_rows
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import describe, require_kind
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.precision import with_double_precision

Groups = Sequence[Hashable] | np.ndarray | Tensor


@dataclass(frozen=True)
class GroupInfluence(ShownInNotebooks):
    """Influence of training groups (columns) on query groups (rows).

    Attributes:
        values: Sum of the scores of each training group, averaged over each query group, shape
            ``(query_groups, train_groups)``. Positive if the group lowered the loss.
        query_groups: Names of the rows.
        train_groups: Names of the columns.
        train_sizes: Number of samples in each training group.
    """

    values: Float[Tensor, "query_groups train_groups"]
    query_groups: tuple[Hashable, ...]
    train_groups: tuple[Hashable, ...]
    train_sizes: Int64[Tensor, " train_groups"]

    def per_sample(self) -> Float[Tensor, "query_groups train_groups"]:
        """Return the mean influence of one training sample of each group."""
        return self.values / self.train_sizes

    def to_pandas(self) -> DataFrame:
        """Return a data frame with query groups as rows and training groups as columns."""
        pd = import_pandas()
        index = pd.Index(list(self.query_groups), name="query_group")
        columns = pd.Index(list(self.train_groups), name="train_group")
        return pd.DataFrame(self.values.numpy(), index=index, columns=columns)

    def __repr__(self) -> str:
        lines = [
            f"  {group}: "
            + ", ".join(f"{n} {v:+.3g}" for n, v in zip(self.train_groups, row, strict=True))
            for group, row in zip(self.query_groups, self.values.tolist(), strict=True)
        ]
        head = "GroupInfluence of training groups on the mean query of each group"
        return "\n".join([head, *lines])


def influence_by_group(
    scores: Scores, train_groups: Groups, query_groups: Groups
) -> GroupInfluence:
    """Sum scores over training groups and average them over query groups.

    Args:
        scores: Scores of some queries.
        train_groups: Group of each training sample, in the order of ``scores.train_ids``.
        query_groups: Group of each query, in the order of ``scores.query_ids``.

    Raises:
        ValueError: If there is not one group per training sample and per query.
    """
    columns, of_train = number_groups(train_groups, len(scores.train_ids), "train_groups")
    rows, of_query = number_groups(query_groups, len(scores.query_ids), "query_groups")
    by_train = torch.zeros(len(of_query), len(columns), dtype=torch.float64)
    by_train.index_add_(1, of_train, scores.values.double())
    values = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    values.index_add_(0, of_query, by_train)
    counts = torch.bincount(of_query, minlength=len(rows))
    sizes = torch.bincount(of_train, minlength=len(columns))
    return GroupInfluence(values / counts[:, None], rows, columns, sizes)


class Summary(ABC):
    """One number for all queries of a loader, as a target of attribution."""

    @abstractmethod
    def weights(self, losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the derivative of the summary with respect to each query's loss."""


@dataclass(frozen=True)
class MeanLoss(Summary):
    """The mean loss."""

    def weights(self, losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return 1 / n for each query."""
        return torch.full_like(losses, 1 / len(losses))


@dataclass(frozen=True)
class WorstGroupLoss(Summary):
    """The mean loss of the group in which it is largest.

    Attributes:
        groups: Group of each query, in the order of the loader.
    """

    groups: Groups

    def weights(self, losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return 1 / (size of the worst group) for its queries, and 0 for the others."""
        names, numbers = number_groups(self.groups, len(losses), "groups")
        if losses.isnan().any():
            raise ValueError(
                "The losses of some queries are unknown; expected those of all, to find the worst "
                "group. Use a common loss function, or name it: `Gap(groups, worse, better)`."
            )
        members = torch.stack([numbers == number for number in range(len(names))])
        means = torch.stack([losses[mask].mean() for mask in members])
        worst = members[means.argmax()]
        return worst.to(losses) / worst.sum()


@dataclass(frozen=True)
class Gap(Summary):
    """The mean loss of one group minus that of another: proponents made the gap smaller.

    Attributes:
        groups: Group of each query, in the order of the loader.
        worse: The group whose loss is higher.
        better: The group whose loss is lower.
    """

    groups: Groups
    worse: Hashable
    better: Hashable

    def weights(self, losses: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return 1 / n for one group and -1 / n for the other, with their sizes n."""
        names, numbers = number_groups(self.groups, len(losses), "groups")
        weights = torch.zeros_like(losses)
        for name, sign in ((self.worse, 1.0), (self.better, -1.0)):
            if name not in names:
                raise ValueError(f"There is no group {name!r}; expected one of {list(names)}.")
            mask = numbers == names.index(name)
            weights[mask] += sign / mask.sum()
        return weights


def attribute_summary(
    run: Run,
    model: nn.Module,
    loader: DataLoader[Any],
    summary: Summary = MeanLoss(),
    *,
    method: Attributor = Averaged(),
    progress: bool = True,
) -> Scores:
    """Score every training sample by its effect on one number over a whole loader.

    Args:
        run: A recorded training: its folder or a store.
        model: The trained LightningModule.
        loader: The queries, not shuffled.
        summary: The number: ``MeanLoss()``, ``WorstGroupLoss(groups)`` or ``Gap(groups, a, b)``.
        method: The attribution method; its scores must be linear in the query.
        progress: Show progress bars.

    Returns:
        Scores of a single query, shape ``(1, n_train)``. Proponents lowered the number.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the method is not linear, an argument does not match the loader, the loader
            shuffles queries that have groups, or the summary needs losses that are unknown.
    """
    require_kind("summary", summary, Summary, "`MeanLoss()`")
    require_kind("method", method, Attributor, "`Averaged()`")
    if not method.is_linear():
        raise ValueError(
            f"`{method!r}` is not linear in the query; expected a method that is, such as "
            "`Unrolled()` or `TracIn()`, since a summary adds up queries."
        )
    if hasattr(summary, "groups") and isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError(
            "`loader` shuffles, so that the groups of the summary belong to other queries; "
            "expected one group for each query in the order of the loader. Pass a loader without "
            "`shuffle=True`."
        )
    store = open_run(run)
    warn_of_other_weights(model, store.final_fingerprint, remedy="")
    queries = identified_rows(
        model,
        loader,
        store.recipe,
        preconditioner=store.preconditioner(),
        labels="given",
        progress=progress,
    )
    losses = queries.losses
    if losses is None:  # Only some summaries depend on them.
        losses = torch.full((len(queries.rows),), torch.nan)
    weights = summary.weights(losses.double())
    row = (weights.to(queries.rows) @ queries.rows)[None]
    device = with_double_precision(next(model.parameters()).device)
    return method.attribute(store, row.to(device), progress=progress)


def number_groups(
    groups: Groups, n: int, name: str
) -> tuple[tuple[Hashable, ...], Int64[Tensor, " n"]]:
    """Return the names of the groups, sorted, and the number of each entry's group.

    Raises:
        ValueError: If there is not one group for each of ``n`` samples.
    """
    values = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else groups
    # Tensors with equal values are not equal as keys.
    entries = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    if len(entries) != n:
        raise ValueError(
            f"`{name}` has {len(entries)} entries; expected {n}, one group for each in order."
        )
    if any(not isinstance(entry, Hashable) for entry in entries):
        raise ValueError(
            f"`{name}` holds {describe(entries[0])}; expected one group for each in order: a "
            "number or a text."
        )
    names = tuple(sorted(set(entries), key=lambda entry: (str(type(entry)), entry)))
    numbers = {entry: number for number, entry in enumerate(names)}
    return names, torch.tensor([numbers[entry] for entry in entries], dtype=torch.int64)
