"""A second front door: ask a model itself, where no training was recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from tda_lightning.arguments import require_kind
from tda_lightning.features.attributor import LayerFeatureAttributor
from tda_lightning.features.extraction import query_features, train_features
from tda_lightning.features.representer import RepresenterPoint, Representers
from tda_lightning.features.similarity import FeatureSimilarity
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.provenance import fingerprint
from tda_lightning.results.scores import Scores


def attribute_by_features(
    model: nn.Module,
    train_loader: DataLoader[Any],
    queries: Any,
    *,
    method: LayerFeatureAttributor = FeatureSimilarity(),
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> Scores:
    """Say which training samples a model takes for like the queries, or builds its outputs from.

    Nothing needs to have been recorded: it costs one pass over the training data, in evaluation
    mode, through the model's own ``training_step``; two for methods that need to know its loss.

    Args:
        model: The LightningModule that was trained, with the weights to ask about. It is left as
            it was.
        train_loader: The training data, in any order.
        queries: A batch as the training loader yields them, or a ``DataLoader`` of such batches.
        method: How to attribute: ``FeatureSimilarity()`` or ``RepresenterPoint()``, say.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``. Memory: these, and the features of all samples.

    Raises:
        ValueError: If the layer or the ids cannot be found, the data do not fit the model, or
            what the layer sees is not finite.
    """
    if not isinstance(method, LayerFeatureAttributor):
        raise ValueError(
            f"`method` is {method!r}; expected one that reads features, `FeatureSimilarity()` say. "
            "Methods that read a recorded run are asked by `attribute`."
        )
    layer, reads = method.layer, method.reads
    train = train_features(
        model, train_loader, layer=layer, reads=reads, sample_ids=sample_ids, progress=progress
    )
    asked = query_features(model, queries, layer=layer, reads=reads, progress=progress)
    scores = method.attribute(train, asked)
    facts = {"model": type(model).__name__, "weights": fingerprint(model), "mode": "eval"}
    return replace(scores, provenance={**scores.provenance, **facts})


def representers(
    model: nn.Module,
    train_loader: DataLoader[Any],
    *,
    method: RepresenterPoint = RepresenterPoint(),
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> Representers:
    """Decompose a model's last layer once, for all queries to come.

    Args:
        model: The LightningModule that was trained. It is left as it was: the refit is a copy's.
        train_loader: The training data, in any order.
        method: How to decompose.
        sample_ids: Where a batch has its samples' ids; by default learnt from the sampler.
        progress: Show a progress bar.

    Returns:
        The training samples' features and representer values. Queries are asked by
        ``.attribute(query_features(model, queries, reads="head"))``.

    Raises:
        ValueError: If the layer or the ids cannot be found, the data do not fit the model, the loss
            is neither a softmax cross-entropy nor a squared error, or the refit does not arrive.
    """
    require_kind("method", method, RepresenterPoint, "`RepresenterPoint()`")
    train = train_features(
        model,
        train_loader,
        layer=method.layer,
        reads="head",
        sample_ids=sample_ids,
        progress=progress,
    )
    return method.fit(train)
