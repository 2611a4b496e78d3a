"""Pace: how long a batch takes, what recording it adds, and the stride that is quick enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The first pass of either kind is slower than those that follow: memory is found, code is made.
_TRIES = 2


@dataclass(frozen=True)
class BatchTiming:
    """Seconds of a batch.

    Attributes:
        batch: Its forward and backward pass.
        recording: What recording them adds.
    """

    batch: float
    recording: float

    @property
    def overhead(self) -> float:
        """What recording adds, as a share of the time without it."""
        return self.recording / self.batch

    def stride_within(self, max_overhead: float) -> int:
        """Return the smallest stride at which recording adds no more than a share of the time.

        >>> BatchTiming(batch=0.012, recording=0.004).stride_within(0.1)
        4
        """
        return max(1, math.ceil(self.overhead / max_overhead))

    def describe(self) -> str:
        """Say it in half a sentence.

        >>> BatchTiming(batch=1.5, recording=0.004).describe()
        'a batch takes about 1.5 s, recording it adds about 4.0 ms (0 %)'
        """
        share = f"{100 * self.overhead:.0f} %"
        return (
            f"a batch takes about {_spoken(self.batch)}, recording it adds about "
            f"{_spoken(self.recording)} ({share})"
        )


class Stopwatch:
    """Takes the time of work on one device.

    Args:
        device: The device, which may lag behind the program.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = self._now()

    def seconds(self) -> float:
        """Return the time since the watch was made."""
        return self._now() - self._begun

    def _now(self) -> float:
        wait = getattr(getattr(torch, self._device.type, None), "synchronize", _nothing)
        wait()
        return time.perf_counter()


def take_pace(
    forward: float,
    plain: Callable[[], None],
    recorded: Callable[[], None],
    made: Callable[[], float],
    device: torch.device,
) -> BatchTiming:
    """Take the time of both kinds of backward pass, and return what follows from it.

    Args:
        forward: Seconds that the forward pass took.
        plain: Goes back through the graph of a loss, and keeps it.
        recorded: Does the same, and records.
        made: Does so once more, and returns the seconds that making rows took.
        device: Where they do so.
    """
    times = [(_time(plain, device), _time(recorded, device)) for _ in range(_TRIES)]
    backward, with_recording = (min(found) for found in zip(*times, strict=True))
    # The one forward pass there is may have been a slow first one, and a budget is to be kept: none
    # takes longer than its way back.
    # A difference of two times is noise where others use the machine too; its largest part is not.
    recording = max(with_recording - backward, made())
    return BatchTiming(min(forward, backward) + backward, recording)


def _time(work: Callable[[], None], device: torch.device) -> float:
    watch = Stopwatch(device)
    work()
    return watch.seconds()


def _nothing() -> None:
    """Wait for a device that does not lag behind, as far as torch says."""


def _spoken(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
