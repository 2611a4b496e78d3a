"""Baselines that need no gradients: nearest neighbours and cosines, of inputs and of features.

Every sample is a set of labelled points: one point for an image, one per place for a text. Values
are summed over the points of a training sample, and averaged over the points of a query.
"""

from collections.abc import Iterator, Sequence

import torch
from lds_networks import Network
from torch import Tensor
from torch.nn.functional import cosine_similarity

PAIRS_AT_ONCE = 4_000_000


def features(network: Network, inputs: Tensor) -> Tensor:
    """Return the last layer's input at each point, shape ``(n, points, d)``."""
    with torch.no_grad():
        outputs = network.body(inputs)
    return outputs if outputs.ndim == 3 else outputs[:, None]


def cosine(train: Tensor, queries: Tensor) -> Tensor:
    """Return the cosines of the samples' mean points."""
    return cosine_similarity(queries.mean(dim=1)[:, None], train.mean(dim=1), dim=-1)


def knn_shapley(
    train: Tensor,
    queries: Tensor,
    train_labels: Tensor,
    query_labels: Tensor,
    numbers: Sequence[int],
) -> list[Tensor]:
    """Return exact Shapley values of nearest neighbours' votes, one matrix per entry of `numbers`.

    Jia et al. (2019), "Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms",
    theorem 1.

    Args:
        train: Points of the training samples, shape ``(n_train, points, d)``.
        queries: Points of the queries, shape ``(n_query, points, d)``.
        train_labels: One per point, shape ``(n_train,)`` or ``(n_train, points)``.
        query_labels: One per point, ``(n_query,)`` or ``(n_query, points)``.
        numbers: Numbers of neighbours that vote.

    Returns:
        Values per number of neighbours, shape ``(n_query, n_train)``.
    """
    n_train, points = train.shape[:2]
    flat, labels = train.flatten(0, 1), train_labels.flatten()
    blocks: list[list[Tensor]] = [[] for _ in numbers]
    for block, block_labels in _blocks(queries, query_labels.flatten(), len(flat)):
        order = torch.cdist(block, flat).argsort(dim=1, stable=True)
        agrees = (labels[order] == block_labels[:, None]).float()
        for number, collected in zip(numbers, blocks, strict=True):
            sorted_values = _shapley_along(agrees, number)
            values = torch.zeros_like(agrees).scatter_(1, order, sorted_values)
            collected.append(values.unflatten(1, (n_train, points)).sum(dim=2))
    per_query = (torch.cat(collected) for collected in blocks)
    return [values.unflatten(0, (len(queries), -1)).mean(dim=1) for values in per_query]


def _blocks(queries: Tensor, labels: Tensor, n_points: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, PAIRS_AT_ONCE // n_points)
    yield from zip(queries.flatten(0, 1).split(size), labels.split(size), strict=True)


def _shapley_along(agrees: Tensor, number: int) -> Tensor:
    """Return the values of points in the order of their distance, nearest first."""
    count = agrees.shape[1]
    place = torch.arange(1, count)
    steps = (agrees[:, :-1] - agrees[:, 1:]) / torch.maximum(place, torch.tensor(number))
    furthest = agrees[:, -1:] / max(count, number)
    beyond = steps.flip(1).cumsum(dim=1).flip(1)
    return torch.cat([beyond + furthest, furthest], dim=1)
