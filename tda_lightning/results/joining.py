"""Join scores: check that they match, and merge their methods and provenances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tda_lightning.results.scores import Scores


def require_same_ids(scores: Sequence[Scores], names: tuple[str, ...], kind: type) -> Scores:
    """Return the first of several scores of a kind, if they have the same ids."""
    is_list = isinstance(scores, list | tuple) and all(isinstance(item, kind) for item in scores)
    if not is_list or not scores:
        raise ValueError(
            f"`scores` is {scores!r}; expected at least one `Scores`, in a list: "
            "`Scores.mean([a, b])`. For a mean over queries: `scores.values.mean(dim=0)`."
        )
    first: Scores = scores[0]
    for name in names:
        if not all(torch.equal(getattr(item, name), getattr(first, name)) for item in scores):
            raise ValueError(
                f"`scores` differ in their `{name}`; expected the same in all of them. Attribute "
                "the same queries to the same training set."
            )
    return first


def joined_provenance(scores: Sequence[Scores], operation: str) -> dict[str, Any]:
    """Return the method and the provenance of several scores, with all differing values listed."""
    methods = list(dict.fromkeys(item.method for item in scores))
    method = methods[0] if len(methods) == 1 else f"{operation} of {', '.join(methods)}"
    keys = dict.fromkeys(key for item in scores for key in item.provenance)
    distinct = {
        key: dict.fromkeys(item.provenance.get(key, "unknown") for item in scores) for key in keys
    }
    provenance = {key: "; ".join(values) for key, values in distinct.items()}
    if len(scores) > 1:
        provenance[operation] = f"of {len(scores)}"
    return {"method": method, "provenance": provenance}
