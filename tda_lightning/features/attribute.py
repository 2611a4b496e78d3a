"""Entry points for attribution from the features of one layer; no recorded run is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from tda_lightning.features.extraction import query_features, train_features
from tda_lightning.features.layer_features import LayerFeatureAttributor
from tda_lightning.features.representer import RepresenterPoint, Representers
from tda_lightning.features.similarity import FeatureSimilarity
from tda_lightning.passes.model_state import fingerprint
from tda_lightning.recording.sample_ids import IdSource
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import require_kind, require_object


def attribute_by_features(
    model: nn.Module,
    train_loader: DataLoader[Any],
    queries: Any,
    *,
    method: LayerFeatureAttributor = FeatureSimilarity(),
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> Scores:
    """Score every training sample for every query from the features of one layer.

    No recorded run is needed. The training data pass through the model's ``training_step`` once, in
    evaluation mode; twice for methods that infer the loss.

    Args:
        model: The trained LightningModule, with the weights to use. It is left unchanged.
        train_loader: The training data, in any order.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches.
        method: The attribution method, such as ``FeatureSimilarity()`` or ``RepresenterPoint()``.
        sample_ids: A key of the batch that holds the sample ids, or a function from the batch to
            ids. By default, ids come from the loader's sampler.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``. Memory holds them and the features of all samples.

    Raises:
        ValueError: If the layer or the ids cannot be found, the data do not fit the model, or the
            features are not finite.
    """
    require_object("method", method)
    if not isinstance(method, LayerFeatureAttributor):
        raise ValueError(
            f"`method` is {method!r}; expected one that reads layer features, such as "
            "`FeatureSimilarity()`. For methods that read a recorded run, call `attribute`."
        )
    layer, reads = method.layer, method.reads
    train = train_features(
        model, train_loader, layer=layer, reads=reads, sample_ids=sample_ids, progress=progress
    )
    query = query_features(model, queries, layer=layer, reads=reads, progress=progress)
    scores = method.attribute(train, query)
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
    """Decompose a model's last layer once, for use with any number of queries.

    Args:
        model: The trained LightningModule. It is left unchanged: a copy of the layer is refitted.
        train_loader: The training data, in any order.
        method: The method with its hyper-parameters.
        sample_ids: A key of the batch that holds the sample ids, or a function from the batch to
            ids. By default, ids come from the loader's sampler.
        progress: Show a progress bar.

    Returns:
        The training samples' features and representer values. Score queries with
        ``.attribute(query_features(model, queries, reads="head"))``.

    Raises:
        ValueError: If the layer or the ids cannot be found, or the data do not fit the model. If
            the loss is neither a softmax cross-entropy nor a squared error. If the refit does not
            converge.
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
