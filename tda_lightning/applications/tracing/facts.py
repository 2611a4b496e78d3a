"""Trace facts: which passages of the training data caused a completion?

Akyürek et al. (2022), "Towards Tracing Knowledge in Language Models Back to the Training Data".
Scores of gradients show what moved the model; :class:`BM25` shows what shares words. A cheap method
ranks all passages, and :func:`rescore` ranks the best of them by an expensive one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tda_lightning.attribution import Attributor, InfluenceFunction
from tda_lightning.attribution.attribute import attribute
from tda_lightning.passes.targets import Loss, Target
from tda_lightning.results.html_tables import ShownInNotebooks
from tda_lightning.results.optional import DataFrame, import_pandas
from tda_lightning.results.ranking import require_rank
from tda_lightning.results.sample_groups import positions_of
from tda_lightning.results.scores import Scores
from tda_lightning.stores.opening import Run, open_run
from tda_lightning.stores.snapshots import Moment

Texts = Mapping[int, str] | Sequence[str]


@dataclass(frozen=True)
class Candidates(ShownInNotebooks):
    """The passages that matter most to each query, most important first.

    Attributes:
        ids: Ids of the passages, shape ``(n_query, k)``.
        scores: Scores of these passages, shape ``(n_query, k)``.
        method: The method that ranked them last.
        texts: The text of the passage with id ``i`` is ``texts[i]``, if they were passed.
        other_ranks: Ranks of the same passages by other methods, from 1, by name; each of shape
            ``(n_query, k)``.
    """

    ids: Int[Tensor, "n_query k"]
    scores: Float[Tensor, "n_query k"]
    method: str
    texts: Texts | None = None
    other_ranks: Mapping[str, Int[Tensor, "n_query k"]] | None = None

    def ranked_by(self, scores: Scores) -> Candidates:
        """Return the same passages, ranked by other scores.

        The ranks by the former method are kept in ``other_ranks``.

        Args:
            scores: Scores of the same queries that cover all candidates.

        Raises:
            ValueError: If the scores are of other queries, or lack a candidate.
        """
        values = self._values_in(scores)
        order = values.argsort(dim=1, descending=True, stable=True)
        former = torch.arange(1, self.ids.shape[1] + 1).expand_as(self.ids)
        ranks = {**(self.other_ranks or {}), self.method: former}
        return replace(
            self,
            ids=self.ids.gather(1, order),
            scores=values.gather(1, order),
            method=scores.method,
            other_ranks={name: rank.gather(1, order) for name, rank in ranks.items()},
        )

    def beside(self, scores: Scores) -> Candidates:
        """Return the same ranking, with each passage's rank by other scores among all passages.

        Args:
            scores: Scores of the same queries that cover all candidates, such as those of ``BM25``.

        Raises:
            ValueError: If the scores are of other queries, or lack a candidate.
        """
        values = self._values_in(scores)
        ranks = 1 + (scores.values[:, None] > values[..., None]).sum(dim=-1)
        return replace(self, other_ranks={**(self.other_ranks or {}), scores.method: ranks})

    def _values_in(self, scores: Scores) -> Float[Tensor, "n_query k"]:
        missing = self.ids[~torch.isin(self.ids, scores.train_ids)]
        if len(scores.values) != len(self.ids) or len(missing):
            raise ValueError(
                f"`scores` are of {len(scores.values)} queries and {len(scores.train_ids):,} "
                f"passages; expected the {len(self.ids)} queries of these candidates, and scores "
                "for each passage among them. Score the same queries and the same data."
            )
        columns = positions_of(scores.train_ids, self.ids.flatten()).view_as(self.ids)
        return scores.values.gather(1, columns)

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per query and rank."""
        pd = import_pandas()
        n_query, k = self.ids.shape
        ranks = pd.MultiIndex.from_product([range(n_query), range(1, k + 1)])
        columns = {"train": self.ids.flatten().numpy(), "score": self.scores.flatten().numpy()}
        for name, other in (self.other_ranks or {}).items():
            columns[f"rank by {name}"] = other.flatten().numpy()
        frame = pd.DataFrame(columns, index=ranks.set_names(["query", "rank"]))
        if self.texts is not None:
            frame["text"] = [self.texts[i] for i in self.ids.flatten().tolist()]
        return frame

    def __repr__(self) -> str:
        lines = [f"Candidates: {self.ids.shape[1]} passages for each query by {self.method}"]
        for query in range(min(len(self.ids), 5)):
            lines.append(f"  query {query}:")
            lines += [self._line(query, rank) for rank in range(min(self.ids.shape[1], 3))]
        return "\n".join([*lines, *(["  ..."] if len(self.ids) > 5 else [])])

    def _line(self, query: int, rank: int) -> str:
        sample_id, score = int(self.ids[query, rank]), float(self.scores[query, rank])
        others = (self.other_ranks or {}).items()
        notes = "".join(f", rank {int(ranks[query, rank])} by {name}" for name, ranks in others)
        text = "" if self.texts is None else f": {' '.join(self.texts[sample_id].split())[:60]}"
        return f"    {sample_id} ({score:+.3g}{notes}){text}"


def trace_facts(
    run: Run,
    model: nn.Module,
    queries: Any,
    *,
    k: int = 10,
    method: Attributor = InfluenceFunction(),
    target: Target = Loss(),
    at: Moment | None = None,
    texts: Texts | None = None,
    progress: bool = True,
) -> Candidates:
    """Return the training passages that matter most to each completion.

    A query is a prompt with its completion, as the training loader yields passages. Only the
    completion should count for its loss: mask the labels of the prompt, or pass a ``target``.

    Args:
        run: The recorded training: its folder or a store.
        model: The trained LightningModule.
        queries: A batch as the training loader yields it, or a ``DataLoader`` of such batches.
        k: Number of passages for each query.
        method: The attribution method. The default found planted facts best; record the run with
            ``curvature="fisher"`` for it. ``GradientSimilarity()`` is the cheapest first stage.
        target: See :func:`~tda_lightning.attribute`.
        at: See :func:`~tda_lightning.attribute`.
        texts: The passages, for tables: the text of the passage with id ``i`` is ``texts[i]``.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the model, the queries or the texts do not match the run.
    """
    _require_texts(texts, open_run(run).train_ids())
    scores = attribute(run, model, queries, method=method, target=target, at=at, progress=progress)
    return candidates_of(scores, k, texts)


def candidates_of(scores: Scores, k: int = 10, texts: Texts | None = None) -> Candidates:
    """Return the passages with the highest scores.

    Args:
        scores: Scores of any method, such as :class:`BM25`.
        k: Number of passages for each query.
        texts: The passages, for tables.

    Raises:
        ValueError: If there are fewer than ``k`` passages, or one has no text.
    """
    _require_texts(texts, scores.train_ids)
    top = scores.proponents(require_rank(k, len(scores.train_ids)))
    return Candidates(top.ids, top.values, scores.method, texts)


def _require_texts(texts: Texts | None, train_ids: Int[Tensor, " n_train"]) -> None:
    """Check that there is a text for each passage."""
    if texts is None:
        return
    known = texts if isinstance(texts, Mapping) else range(len(texts))
    missing = [sample_id for sample_id in train_ids.tolist() if sample_id not in known]
    if missing:
        raise ValueError(
            f"`texts` has no text for the passage with id {missing[0]}, and lacks {len(missing):,} "
            f"of {len(train_ids):,} in all; expected one for each training sample. Pass a list in "
            "the order of the dataset, or a mapping from ids."
        )


def rescore(
    candidates: Candidates,
    run: Run,
    model: nn.Module,
    queries: Any,
    *,
    method: Attributor,
    target: Target = Loss(),
    at: Moment | None = None,
    progress: bool = True,
) -> Candidates:
    """Rank candidates by another method; the former ranks stay beside.

    For methods that take data instead of a run, pass their scores to ``candidates.ranked_by``, from
    a loader of the candidates only: :func:`~tda_lightning.attribute_by_gradients`.

    Args:
        candidates: Result of :func:`trace_facts` or :func:`candidates_of` for the same queries.
        run: See :func:`trace_facts`, as for all arguments that are not listed here.
        model: See :func:`trace_facts`.
        queries: See :func:`trace_facts`.
        method: The attribution method.
        target: See :func:`trace_facts`.
        at: See :func:`trace_facts`.
        progress: Show progress bars.

    Raises:
        FileNotFoundError: If there is no run at the path.
        ValueError: If the queries are others.
    """
    scores = attribute(run, model, queries, method=method, target=target, at=at, progress=progress)
    return candidates.ranked_by(scores)
