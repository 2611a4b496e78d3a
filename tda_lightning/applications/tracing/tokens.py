r"""Token by token: which tokens of a passage taught which tokens of a completion?

A loss over tokens is a sum, and so is its gradient. Let :math:`g_a` be the gradient of the loss at
query token :math:`a`, and :math:`g_b` that at passage token :math:`b`. Entry :math:`(a, b)` is
:math:`\langle g_a, g_b \rangle`, at the model's weights and in the coordinates of the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from tda_lightning.passes.batch_contents import batch_size
from tda_lightning.passes.labelled_logits import IGNORED
from tda_lightning.passes.model_state import warn_of_other_weights
from tda_lightning.passes.outputs import Outputs, outputs_of
from tda_lightning.passes.queries import record_queries
from tda_lightning.passes.targets import Target
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.stores.opening import Run, open_run


def first_entry(batch: Any) -> Tensor:
    """Return the first entry of a batch: its inputs."""
    entry: Tensor = batch[0]
    return entry


@dataclass(frozen=True)
class NextToken:
    """Log-probability of each token given those before it: a target with one number per token.

    Tokens that should not count, such as those of a prompt, have the label -100. Their number is
    zero.

    Attributes:
        outputs: Function of (module, batch) that returns the logits, shape ``(n, T, vocabulary)``.
        tokens: Function of the batch that returns the tokens, shape ``(n, T)``.
    """

    outputs: Outputs = outputs_of
    tokens: Callable[[Any], Tensor] = first_entry

    def __call__(self, module: nn.Module, batch: Any) -> Float[Tensor, "n tokens"]:
        """Return one number for each token after the first."""
        logits = self.outputs(module, batch)[:, :-1]
        labels = self.tokens(batch)[:, 1:]
        counts = labels != IGNORED
        picked = logits.log_softmax(dim=-1).gather(-1, labels.where(counts, 0)[..., None])
        return picked.squeeze(-1) * counts


@dataclass(frozen=True)
class TokenScores(ShownInNotebooks):
    """How much each token of a passage and each token of a query call for the same change.

    Attributes:
        values: Inner products of gradients, shape ``(query_tokens, passage_tokens)``.
        query_tokens: Names of the query's tokens, or their positions.
        passage_tokens: Names of the passage's tokens, or their positions.
    """

    values: Float[Tensor, "query_tokens passage_tokens"]
    query_tokens: tuple[str, ...]
    passage_tokens: tuple[str, ...]

    def by_passage_token(self) -> Float[Tensor, " passage_tokens"]:
        """Return the scores of the passage's tokens for the whole completion."""
        return self.values.sum(dim=0)

    def by_query_token(self) -> Float[Tensor, " query_tokens"]:
        """Return the scores of the whole passage for each token of the query."""
        return self.values.sum(dim=1)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with the query's tokens as rows and the passage's as columns."""
        pd = import_pandas()
        return pd.DataFrame(
            self.values.numpy(), index=list(self.query_tokens), columns=list(self.passage_tokens)
        )

    def __repr__(self) -> str:
        totals = self.by_passage_token()
        best = totals.topk(min(5, len(totals)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        shown = ", ".join(f"{self.passage_tokens[at]!r} ({value:+.3g})" for at, value in pairs)
        n_query, n_passage = self.values.shape
        return f"TokenScores of {n_query} x {n_passage} tokens; strongest in the passage: {shown}"


def trace_tokens(
    run: Run,
    model: nn.Module,
    query: Any,
    passage: Any,
    *,
    target: Target = NextToken(),
    names: Callable[[Any], Sequence[str]] | None = None,
    progress: bool = False,
) -> TokenScores:
    """Compare the tokens of one query with those of one training passage, at the model's weights.

    Args:
        run: The recorded training: its folder or a store.
        model: The trained LightningModule.
        query: A batch of one query: a prompt with its completion.
        passage: A batch of one passage.
        target: Function of (module, batch) that returns one number per token, shape ``(1, T)``.
            Tokens whose gradient is zero, such as masked ones, are left out.
        names: Function from a batch to the names of the tokens that ``target`` counts.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If a batch holds no token that counts, or does not match the run.
    """
    store = open_run(run)
    warn_of_other_weights(model, store.final_fingerprint, remedy="")
    sides = []
    for argument, batch in (("query", query), ("passage", passage)):
        if (n := batch_size(batch, argument)) != 1:
            raise ValueError(f"`{argument}` is a batch of {n} samples; expected a batch of one.")
        with warnings.catch_warnings():
            # Masked tokens are left out below.
            warnings.filterwarnings("ignore", message=r"\d+ of \d+ queries have a gradient of zero")
            rows = record_queries(
                model, batch, like=store, target=target, at="model", progress=progress
            )
        counted = (rows.abs().amax(dim=1) > 0).nonzero()[:, 0]
        if len(counted) == 0:
            raise ValueError(
                f"No token of `{argument}` has a gradient; expected at least one that counts. "
                "Check its labels."
            )
        sides.append((rows[counted], _names(names, batch, counted)))
    (query_rows, query_names), (passage_rows, passage_names) = sides
    return TokenScores((query_rows @ passage_rows.mT).cpu(), query_names, passage_names)


def _names(
    names: Callable[[Any], Sequence[str]] | None, batch: Any, counted: Int[Tensor, " n"]
) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, counted.tolist()))
    all_names = list(names(batch))
    if counted.numel() and len(all_names) <= int(counted.max()):
        raise ValueError(
            f"`names` returned {len(all_names)} names; expected one for each number that the "
            f"target returns, at least {int(counted.max()) + 1}."
        )
    return tuple(all_names[at] for at in counted.tolist())
