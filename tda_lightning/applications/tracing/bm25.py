r"""Okapi BM25: which passages share rare words with the query?

.. math:: s(q, d) = \sum_{w \in q} \log\left(1 + \frac{N - n_w + 0.5}{n_w + 0.5}\right)
   \frac{f_{w, d} \, (k_1 + 1)}{f_{w, d} + k_1 (1 - b + b \, |d| / \overline{|d|})}

Robertson & Zaragoza (2009), "The Probabilistic Relevance Framework: BM25 and Beyond". Here
:math:`f_{w, d}` counts the word in the passage, and :math:`n_w` the passages with the word, of
:math:`N`. Word overlap often finds the passage that states a fact. It does not show that the
passage moved the model; compare it with gradients.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tda_lightning.results.scores import Scores
from tda_lightning.stores.arguments import require_not_negative

Words = Callable[[str], Sequence[Hashable]]


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words.

    >>> words_of("Who designed the Zorvik-7?")
    ['who', 'designed', 'the', 'zorvik', '7']
    """
    return re.findall(r"\w+", text.lower())


@dataclass(frozen=True)
class BM25:
    """Word overlap, weighted by the rarity of the words.

    Attributes:
        k1: How slowly repetitions of a word saturate.
        b: How much long passages are discounted, from 0 to 1.
        words: Splits a text into words.
    """

    k1: float = 1.5
    b: float = 0.75
    words: Words = words_of

    def __post_init__(self) -> None:
        require_not_negative("k1", self.k1)
        require_not_negative("b", self.b)
        if self.b > 1:
            raise ValueError(f"`b` is {self.b}; expected a number from 0 to 1.")

    def scores(self, queries: Sequence[str], passages: Mapping[int, str] | Sequence[str]) -> Scores:
        """Score every passage for every query.

        Args:
            queries: The texts of the queries.
            passages: The texts of the passages: a sequence, or a mapping from their ids.

        Raises:
            ValueError: If there are no passages, or an argument is a single text.
        """
        for name, texts in (("queries", queries), ("passages", passages)):
            if isinstance(texts, str):
                raise ValueError(f"`{name}` is one text; expected a list of texts: `[text]`.")
        by_id = dict(passages) if isinstance(passages, Mapping) else dict(enumerate(passages))
        if not by_id:
            raise ValueError("`passages` is empty; expected at least one text.")
        ids = sorted(by_id)
        counts = [Counter(self.words(by_id[i])) for i in ids]
        frequencies = Counter(word for count in counts for word in count)
        lengths = [sum(count.values()) for count in counts]
        mean_length = max(sum(lengths) / len(ids), 1.0)
        values = torch.zeros(len(queries), len(ids))
        for row, query in enumerate(queries):
            for word in self.words(query):
                rarity = _rarity(len(ids), frequencies[word])
                for column, count in enumerate(counts):
                    if word in count:
                        saturation = self._saturation(count[word], lengths[column] / mean_length)
                        values[row, column] += rarity * saturation
        return Scores(
            values=values,
            query_ids=torch.arange(len(queries)),
            train_ids=torch.tensor(ids),
            method=f"BM25(k1={self.k1}, b={self.b})",
        )

    def _saturation(self, count: int, relative_length: float) -> float:
        discount = self.k1 * (1 - self.b + self.b * relative_length)
        return count * (self.k1 + 1) / (count + discount)


def _rarity(n_passages: int, n_with_word: int) -> float:
    return math.log(1 + (n_passages - n_with_word + 0.5) / (n_with_word + 0.5))
