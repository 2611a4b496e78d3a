"""Tracing facts: the passages, and the tokens, that caused a completion of a language model."""

from tda_lightning.applications.tracing.bm25 import BM25
from tda_lightning.applications.tracing.facts import Candidates, candidates_of, rescore, trace_facts
from tda_lightning.applications.tracing.last_layer import last_layer_scores
from tda_lightning.applications.tracing.tokens import NextToken, TokenScores, trace_tokens

__all__ = [
    "BM25",
    "Candidates",
    "NextToken",
    "TokenScores",
    "candidates_of",
    "last_layer_scores",
    "rescore",
    "trace_facts",
    "trace_tokens",
]
