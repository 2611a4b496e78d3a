"""Trace planted facts: a part of the benchmark `uses.py`."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from uses_data import batches_of, fit
from uses_data_text import Corpus, LanguageModel, corpus

from tda_lightning import (
    GradientSimilarity,
    HDF5Store,
    InfluenceFunction,
    Logit,
    Scores,
    TracIn,
    Unrolled,
    attribute,
    attribute_by_gradients,
    self_influence,
)
from tda_lightning.applications import BM25, last_layer_scores
from tda_lightning.attribution import Averaged
from tda_lightning.full_influence import FullInfluenceFunction
from tda_lightning.passes.targets import Loss

BATCH_SIZE, SNAPSHOTS = 16, 19
Rows = Iterator[tuple[str, float]]


def reciprocal_rank(scores: Scores, answers: Sequence[int]) -> float:
    """Return the mean reciprocal rank of the right passages; ties count half."""
    at = torch.searchsorted(scores.train_ids, torch.tensor(answers))[:, None]
    right = scores.values.gather(1, at)
    above, equal = (scores.values > right).sum(dim=1), (scores.values == right).sum(dim=1)
    return float((1 / (1 + above + (equal - 1) / 2)).mean())


def facts(seed: int, epochs: int) -> Rows:
    """Trace planted facts to their passages among 300."""
    texts = corpus(seed)
    torch.manual_seed(seed)
    model = LanguageModel(len(texts.vocabulary))
    batches = batches_of(len(texts.passages), epochs, seed, BATCH_SIZE)
    run = fit(model, texts.train, batches, curvature="fisher", snapshots=SNAPSHOTS)
    for kind, queries in texts.queries.items():
        loader = DataLoader(queries, 1)
        with torch.no_grad():
            losses = [float(model.training_step(batch, 0)) for batch in loader]
        yield f"{kind}: loss of the completion", sum(losses) / len(losses)
        yield from by_last_layer(run, model, texts, kind)
        overlap = BM25().scores(texts.texts[kind], texts.passages)
        yield f"{kind}: BM25", reciprocal_rank(overlap, texts.answers)
        for method in (
            GradientSimilarity(),
            InfluenceFunction(),
            Averaged(),
            Unrolled(),
            TracIn(),
        ):
            scores = attribute(run, model, loader, method=method, progress=False)
            name = repr(method).split("(")[0]
            yield f"{kind}: {name}", reciprocal_rank(scores, texts.answers)
            if isinstance(method, InfluenceFunction):
                influence = self_influence(run, method=method, progress=False).values
                relative = replace(scores, values=scores.values / influence.clamp_min(1e-12).sqrt())
                yield f"{kind}: relative {name}", reciprocal_rank(relative, texts.answers)


def trained(texts: Corpus, seed: int, epochs: int, left_out: int | None = None) -> LanguageModel:
    """Train without a recorder, and without one passage."""
    torch.manual_seed(seed)
    model = LanguageModel(len(texts.vocabulary))
    optimizer = model.configure_optimizers()
    for batch in batches_of(len(texts.passages), epochs, seed, BATCH_SIZE):
        kept = [i for i in batch if i != left_out]
        if kept:
            optimizer.zero_grad()
            model.training_step(list(texts.train[kept]), 0).backward()
            optimizer.step()
    return model


@torch.no_grad()
def completion_losses(model: LanguageModel, texts: Corpus, kind: str) -> Tensor:
    tokens, labels = texts.queries[kind].tensors
    counted = labels[:, 1:] != -100
    log_p = model(tokens)[:, :-1].log_softmax(-1)
    picked = log_p.gather(-1, labels[:, 1:].clamp_min(0)[..., None]).squeeze(-1)
    return -(picked * counted).sum(dim=1)


def by_last_layer(run: HDF5Store, model: LanguageModel, texts: Corpus, kind: str) -> Rows:
    passages, queries = DataLoader(texts.train, 30), DataLoader(texts.queries[kind], 1)
    for name, chosen in (("at the end", None), ("at snapshots", run)):
        scores = last_layer_scores(model, passages, queries, run=chosen, progress=False)
        yield f"{kind}: last_layer_scores {name}", reciprocal_rank(scores, texts.answers)


def words(seed: int, epochs: int) -> Rows:
    """Trace the facts through the last layer only."""
    texts = corpus(seed)
    torch.manual_seed(seed)
    model = LanguageModel(len(texts.vocabulary))
    batches = batches_of(len(texts.passages), epochs, seed, BATCH_SIZE)
    run = fit(model, texts.train, batches, layers=["head"], snapshots=SNAPSHOTS)
    for kind in texts.queries:
        yield f"{kind}: loss of the completion", float(completion_losses(model, texts, kind).mean())
        yield from by_last_layer(run, model, texts, kind)


def full_gradients(seed: int, epochs: int) -> Rows:
    """Trace the facts by influence functions of full gradients, of the last layer and of all."""
    texts = corpus(seed)
    model = trained(texts, seed, epochs)
    passages, targets = DataLoader(texts.train, 30), (Logit(shift=True), Loss())
    for layers, target in itertools.product((["head"], None), targets):
        method = FullInfluenceFunction(layers=layers)
        for kind, queries in texts.queries.items():
            scores = attribute_by_gradients(
                model,
                passages,
                DataLoader(queries, len(queries)),
                method=method,
                target=target,
                progress=False,
            )
            name = f"{'all' if layers is None else 'last'}, {type(target).__name__}"
            yield f"{kind}: {name}", reciprocal_rank(scores, texts.answers)


def retrained(seed: int, epochs: int, others: int = 10) -> Rows:
    """Train again without each passage with a fact, and without some others: what is there?"""
    texts = corpus(seed)
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts.passages), generator=chance).tolist()
    passages = [*texts.answers, *[i for i in order if i not in texts.answers][:others]]
    before = trained(texts, seed, epochs)
    models = [trained(texts, seed, epochs, left_out=passage) for passage in passages]
    for kind in texts.queries:
        losses = completion_losses(before, texts, kind)
        rises = torch.stack([completion_losses(m, texts, kind) - losses for m in models], dim=1)
        right = rises.diagonal()
        yield f"{kind}: rise in loss without the right passage", float(right.mean())
        yield f"{kind}: rise in loss without another one", float(rises[:, len(right) :].mean())
        ranks = 1 + (rises > right[:, None]).sum(dim=1)
        yield f"{kind}: reciprocal rank among {len(passages)}", float((1 / ranks).mean())


USES: dict[str, tuple[str, Callable[[int], Rows]]] = {
    "facts-early": ("facts, 6 epochs: mean reciprocal rank", lambda seed: facts(seed, 6)),
    "facts-late": ("facts, 25 epochs: mean reciprocal rank", lambda seed: facts(seed, 25)),
    "words-early": ("facts by the last layer, 6 epochs", lambda seed: words(seed, 6)),
    "words-late": ("facts by the last layer, 25 epochs", lambda seed: words(seed, 25)),
    "facts-full": ("facts by full gradients, 6 epochs", lambda seed: full_gradients(seed, 6)),
    "facts-retrained": ("facts, 6 epochs: retraining", lambda seed: retrained(seed, 6)),
}
