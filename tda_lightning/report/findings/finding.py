"""Finding: one thing that a person should look at, in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weight = Literal["attention", "fine", "unknown"]
MAX_SHOWN = 12


@dataclass(frozen=True)
class Case:
    """A query, and the training samples behind its answer.

    Attributes:
        query: Position of the query.
        samples: Ids of the training samples, the strongest first.
    """

    query: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Finding:
    """One finding of a report.

    Attributes:
        title: A few words.
        sentences: The finding, its possible meaning, and the remedy. The first one is also shown
            below the title of the page, if the finding needs attention.
        weight: Whether it needs attention, is fine, or could not be examined.
        samples: Ids of the training samples that it is about, most important first.
        cases: Queries that it is about, each with the training samples behind it.
    """

    title: str
    sentences: tuple[str, ...]
    weight: Weight
    samples: tuple[int, ...] = ()
    cases: tuple[Case, ...] = ()
