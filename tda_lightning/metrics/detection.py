r"""Detection: do the highest-ranked training samples share a known property with the query?

Class and subclass detection: Hanawa et al. (2021), "Evaluation of Similarity-based Explanations",
sec. 4.2 and 4.3, with a choice of :math:`k` as in Kwon et al. (2024), "DataInf". Shortcut detection
and mixed data sets: Koh & Liang (2017), Hammoudeh & Lowd (2022), "Identifying a Training-Set
Attack's Target Using Renormalized Influence Estimation", sec. 5.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tda_lightning.metrics.checks import describe, require_mask, require_rankable
from tda_lightning.results.ranking import require_rank


def class_detection(
    scores: Float[Tensor, "n_query n_train"],
    query_labels: Int[Tensor, " n_query"],
    train_labels: Int[Tensor, " n_train"],
    k: int = 5,
) -> float:
    """Return the share of each query's ``k`` proponents that have its label, on average.

    With subclasses as labels, for a model that was trained on superclasses, it is subclass
    detection.

    Args:
        scores: Scores, positive for proponents, shape ``(n_query, n_train)``.
        query_labels: Labels or predictions of the queries, shape ``(n_query,)``.
        train_labels: Labels of the training samples, shape ``(n_train,)``.
        k: Number of proponents per query.

    Raises:
        ValueError: If an argument has another type or shape.

    >>> import torch
    >>> scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    >>> class_detection(scores, torch.tensor([0, 1]), torch.tensor([0, 0, 1]), k=2)
    0.75
    """
    require_rankable("scores", scores, 2, "attribute(...).values")
    require_rank(k, scores.shape[1])
    if (*query_labels.shape, *train_labels.shape) != scores.shape or query_labels.ndim != 1:
        raise ValueError(
            f"`query_labels` is {describe(query_labels)} and `train_labels` "
            f"{describe(train_labels)}; expected the shapes ({scores.shape[0]},) and "
            f"({scores.shape[1]},), one label for each row and column of `scores`."
        )
    nearest = scores.topk(k, dim=1).indices
    return float((train_labels[nearest] == query_labels[:, None]).double().mean())


def group_detection(
    scores: Float[Tensor, "n_query n_train"], members: Bool[Tensor, " n_train"]
) -> Float64[Tensor, " n_query"]:
    """Return how well each query's scores rank a group of training samples above the others.

    Two standard metrics are means of it over some queries. For *shortcut detection*, the group
    consists of the training samples with a shortcut; queries have the shortcut, another class, and
    are predicted as the shortcut's class. For *mixed data sets*, it consists of the adversarial
    samples.

    Args:
        scores: Scores, positive for proponents, shape ``(n_query, n_train)``.
        members: Which training samples are in the group, shape ``(n_train,)``.

    Returns:
        Average precision (area under the precision-recall curve), shape ``(n_query,)``. Samples
        with equal scores share a threshold.

    Raises:
        ValueError: If an argument has another type or shape, or the group is empty.

    >>> import torch
    >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> group_detection(scores, torch.tensor([True, False, True, False]))
    tensor([0.8333], dtype=torch.float64)
    """
    require_rankable("scores", scores, 2, "attribute(...).values")
    require_mask("members", members, (scores.shape[1],))
    if not members.any():
        raise ValueError("`members` is false for all samples; expected some true ones.")
    return torch.stack([_average_precision(row, members) for row in scores])


def _average_precision(
    values: Float[Tensor, " n"], members: Bool[Tensor, " n"]
) -> Float64[Tensor, ""]:
    ordered, order = values.sort(descending=True)
    hits = members[order].double().cumsum(0)
    is_last = torch.ones(len(values), dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]  # of the samples with its score
    thresholds = is_last.nonzero()[:, 0]
    precision = hits[thresholds] / (thresholds + 1)
    recall = hits[thresholds] / members.sum()
    gains = recall.diff(prepend=recall.new_zeros(1))
    return (gains * precision).sum()
