r"""Trace words to passages through the last layer, exactly.

With features :math:`h` and logits :math:`z` at the tokens of a passage :math:`i` and of a query,

.. math:: s(q, i) = -\sum_{t, a} \big\langle \frac{\partial L_i}{\partial z_t},
   \frac{\partial f_q}{\partial z_a} \big\rangle \, \langle h_t, h_a \rangle

It is TracIn of the last layer at the model's weights: Pruthi et al. (2020), "Estimating Training
Data Influence by Tracing Gradient Descent", sec. 4. Few passages hold a rare word, so their share
of the last layer's gradient is large at its row, and tiny everywhere else. A sketch of the whole
model hides it; these products do not.

Of several snapshots, the highest score counts, not the sum as in TracIn. A passage raises the
completion most while its fact is being learned. Once it is known by heart, its gradient is small,
and steps on other passages with similar features outweigh it in a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tda_lightning.passes.batch_contents import batch_size, part_of
from tda_lightning.passes.batches import (
    columns_by_id,
    loss_of,
    named_batches,
    require_loader,
    transfer,
)
from tda_lightning.passes.model_state import (
    fingerprint,
    preserved_state,
    require_model,
    swapped_weights,
)
from tda_lightning.passes.query_batches import batches_in_memory, identified
from tda_lightning.passes.targets import Logit, Loss, Target, per_sample, queried_tokens
from tda_lightning.recording.sample_ids import IdSource, SampleLedger
from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import describe
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.snapshots import MAX_SNAPSHOTS, describe_snapshots, own_snapshots, spread


def last_layer_scores(
    model: nn.Module,
    train_loader: DataLoader[Any],
    queries: Any,
    *,
    run: Run | None = None,
    target: Target = Logit(shift=True),
    layer: str | None = None,
    sample_ids: IdSource | None = None,
    progress: bool = True,
) -> Scores:
    """Score passages by how much a step on each raises the logits of a completion.

    It also finds the source of facts in other words than those of the passage, which
    :func:`trace_facts` misses. No recorded run is needed, but one with snapshots is better: the
    features of both wordings are most alike while the fact is being learned.

    Args:
        model: The trained LightningModule. It is left unchanged.
        train_loader: The passages, in any order. The loss of a batch must be a mean.
        queries: A batch of prompts with their completions, or a ``DataLoader`` of such batches.
            Label the completion, and all other tokens -100.
        run: The recorded training with snapshots: its folder or a store; see
            ``GradientRecorder(snapshots=...)``. The highest score of at most ten of them counts. By
            default, scores are those at the model's current weights.
        target: The quantity to raise; its sum over the tokens of a query counts. Logits of the
            completion point to it. Its loss also points to what the model predicts instead.
        layer: Name of the layer; by default the last ``Linear`` that is called.
        sample_ids: See :class:`~tda_lightning.GradientRecorder`.
        progress: Show progress bars.

    Returns:
        Scores, shape ``(n_query, n_train)``, for :func:`candidates_of`. Memory holds the features
        and the gradients at the logits of one batch of passages, and of all completions.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the layer or the ids cannot be found, no token of the queries counts, or the
            run has no snapshots.
    """
    require_model(model)
    require_loader(train_loader, "train_loader")
    query_batches = batches_in_memory(queries)
    store = None if run is None else open_run(run)
    snapshots = [] if store is None else spread(own_snapshots(store), MAX_SNAPSHOTS)
    weights = [model.state_dict()] if store is None else map(store.weights_at, snapshots)
    parts = []
    with _LastCall.watched(model, layer) as calls, preserved_state(model, "eval"):
        for state in weights:
            with swapped_weights(model, state):
                query = _query_tokens(model, query_batches, target, calls)
                parts.append(_scores_now(model, train_loader, query, calls, sample_ids, progress))
    train_ids = parts[0][0]
    if not all(torch.equal(ids, train_ids) for ids, _ in parts):
        raise ValueError(
            "`train_loader` does not draw the same samples in every pass; expected the same, one "
            "pass for each snapshot. Pass a loader of all samples."
        )
    return Scores(
        values=torch.stack([values for _, values in parts]).amax(dim=0),
        query_ids=torch.arange(query.n),
        train_ids=train_ids,
        method=f"TracIn of `{calls.name}`" + (", highest" if len(parts) > 1 else ""),
        provenance={
            "model": type(model).__name__,
            "weights": describe_snapshots(snapshots) if snapshots else fingerprint(model),
            "mode": "eval",
        },
    )


def _scores_now(
    model: nn.Module,
    train_loader: DataLoader[Any],
    query: _Tokens,
    calls: _LastCall,
    sample_ids: IdSource | None,
    progress: bool,
) -> tuple[Int[Tensor, " n_train"], Float[Tensor, "n_query n_train"]]:
    """Return the sorted ids of all passages, and their scores at the model's weights."""
    parts = []
    ledger = SampleLedger(sample_ids)
    with named_batches(ledger, train_loader, "passages", progress) as batches:
        for batch_ids, batch in batches:
            parts.append((batch_ids, _scores_of(model, batch, query, calls)))
    return columns_by_id(parts)


def _scores_of(
    model: nn.Module, batch: Any, query: _Tokens, calls: _LastCall
) -> Float[Tensor, "n_query n"]:
    """Return the scores of the passages of a batch.

    A mean over all tokens of a batch weighs passages by their numbers of tokens, unless these are
    equal. So passages of different lengths pass one at a time.
    """
    n = batch_size(batch, "train_loader")
    passages = calls.tokens(n * loss_of(model, transfer(model, batch)), n)
    if len(torch.unique(torch.bincount(passages.owners, minlength=n))) == 1:
        return query.scores(passages)
    singles = (part_of(batch, n, slice(row, row + 1)) for row in range(n))
    losses = (loss_of(model, transfer(model, single)) for single in singles)
    return torch.cat([query.scores(calls.tokens(loss, 1)) for loss in losses], dim=1)


@dataclass(frozen=True)
class _Tokens:
    """Tokens with their features, and the gradients of a number at their logits.

    Attributes:
        features: Inputs of the layer, shape ``(tokens, d)``.
        gradients: Gradients at its outputs, shape ``(tokens, c)``.
        owners: The sample of each token, shape ``(tokens,)``.
        n: Number of samples.
        bias: 1 if the layer has a bias, else 0: the weight of a feature that is always one.
    """

    features: Float[Tensor, "tokens d"]
    gradients: Float[Tensor, "tokens c"]
    owners: Int[Tensor, " tokens"]
    n: int
    bias: float

    def scores(self, passages: _Tokens) -> Float[Tensor, "n_query n"]:
        """Return the scores of passages for these queries."""
        agreement = self.gradients @ passages.gradients.mT
        products = -agreement * (self.features @ passages.features.mT + self.bias)
        by_query = products.new_zeros(self.n, len(passages.owners))
        by_query.index_add_(0, self.owners, products)
        totals = products.new_zeros(self.n, passages.n)
        return totals.index_add_(1, passages.owners, by_query).cpu()


class _LastCall:
    """Hooks on the candidate layers; holds the last one that was called."""

    def __init__(self) -> None:
        self.name = ""
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        self._bias = 0.0

    @classmethod
    @contextmanager
    def watched(cls, model: nn.Module, layer: str | None) -> Iterator[_LastCall]:
        """Watch a layer, or all ``Linear`` layers, of a model."""
        modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if layer is not None and layer not in modules:
            raise ValueError(
                f"`layer` is {layer!r}; expected a `Linear` of `{type(model).__name__}`: one of "
                f"{list(modules)}."
            )
        calls = cls()
        chosen = modules if layer is None else {layer: modules[layer]}
        handles = [m.register_forward_hook(calls._hook(n)) for n, m in chosen.items()]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.name, self._inputs, self._outputs = name, inputs[0].detach(), output
            self._bias = 0.0 if module.bias is None else 1.0

        return hook

    def tokens(self, value: Tensor, n: int) -> _Tokens:
        """Return the tokens of the last call whose gradient of ``value`` is not zero."""
        if self._inputs is None or self._outputs is None or len(self._inputs) != n:
            raise ValueError(
                f"The last `Linear` received {describe(self._inputs)} in a batch of {n} samples; "
                "expected the samples along its first axis. Name another one with `layer=`."
            )
        (gradients,) = torch.autograd.grad(value, self._outputs)
        features = self._inputs.reshape(-1, self._inputs.shape[-1])
        gradients = gradients.reshape(len(features), -1)
        owners = torch.arange(n, device=features.device).repeat_interleave(len(features) // n)
        self._inputs = self._outputs = None
        counted = (gradients != 0).any(dim=1)
        return _Tokens(features[counted], gradients[counted], owners[counted], n, self._bias)


def _query_tokens(model: nn.Module, queries: Any, target: Target, calls: _LastCall) -> _Tokens:
    """Return the tokens of all queries that count, with the gradients of the target."""
    parts: list[_Tokens] = []
    n_before: list[int] = []
    for ids, batch in identified(queries):
        n = batch_size(batch, "queries", ids)
        value = _summed(model, transfer(model, batch), target, n)
        n_before.append(sum(part.n for part in parts))
        parts.append(calls.tokens(value, n))
    if not sum(len(part.owners) for part in parts):
        raise ValueError(
            "No token of `queries` counts; expected at least one label that is not -100. Label the "
            "completions."
        )
    owners = [part.owners + before for part, before in zip(parts, n_before, strict=True)]
    return _Tokens(
        torch.cat([part.features for part in parts]),
        torch.cat([part.gradients for part in parts]),
        torch.cat(owners),
        sum(part.n for part in parts),
        parts[0].bias,
    )


def _summed(model: nn.Module, batch: Any, target: Target, n: int) -> Tensor:
    """Return the sum of a target over all tokens that count."""
    with torch.enable_grad():
        if isinstance(target, Loss):
            return -n * loss_of(model, batch)
        values, _ = per_sample(target, model, batch, n)
        return values[queried_tokens(target, batch, values)].sum()
