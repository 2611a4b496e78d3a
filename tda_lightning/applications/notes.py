"""Notes: what limits an answer, and what to do about it, apart from each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A limit of an answer.

    >>> str(Note("Ten samples are few.", remedy="Record more of them."))
    'Ten samples are few. Record more of them.'

    Attributes:
        reason: What may be wrong or missing, in sentences.
        remedy: What the caller can do about it, in sentences; empty if nothing can be done.
    """

    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the reason, followed by the remedy."""
        return f"{self.reason} {self.remedy}".rstrip()
