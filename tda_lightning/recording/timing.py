"""Timing: measure a batch and the time that recording adds, and choose a stride from them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The first pass of either kind is the slowest: memory is allocated, kernels are loaded.
_N_TRIES = 2


@dataclass(frozen=True)
class BatchTiming:
    """The seconds of the forward and backward pass of a batch, and those that recording adds."""

    batch: float
    recording: float

    @property
    def overhead(self) -> float:
        """Time that recording adds, as a share of the time without it."""
        return self.recording / self.batch

    def stride_within(self, max_overhead: float) -> int:
        """Return the smallest stride at which recording adds at most this share of the time.

        >>> BatchTiming(batch=0.012, recording=0.004).stride_within(0.1)
        4
        """
        return max(1, math.ceil(self.overhead / max_overhead))

    def describe(self) -> str:
        """Return both times as text.

        >>> BatchTiming(batch=1.5, recording=0.004).describe()
        'a batch takes about 1.5 s, recording it adds about 4.0 ms (0 %)'
        """
        share = f"{100 * self.overhead:.0f} %"
        return (
            f"a batch takes about {_format_seconds(self.batch)}, recording it adds about "
            f"{_format_seconds(self.recording)} ({share})"
        )


class Stopwatch:
    """Measures the time of work on one device, and waits for it to finish."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def seconds(self) -> float:
        """Return the seconds since the stopwatch was created."""
        return self._now() - self._start

    def _now(self) -> float:
        wait = getattr(getattr(torch, self._device.type, None), "synchronize", _do_nothing)
        wait()
        return time.perf_counter()


def measure(
    forward: float,
    plain: Callable[[], None],
    recorded: Callable[[], None],
    row_seconds: Callable[[], float],
    device: torch.device,
) -> BatchTiming:
    """Return the timing of a batch from the seconds of its forward pass and three backward passes.

    All of them retain the graph. ``row_seconds`` runs a recorded one and returns the seconds spent
    on rows.
    """
    times = [(_time(plain, device), _time(recorded, device)) for _ in range(_N_TRIES)]
    backward, with_recording = (min(tries) for tries in zip(*times, strict=True))
    # On a busy machine a difference of two times is noise; the time spent on rows is not.
    recording = max(with_recording - backward, row_seconds())
    # Cap the forward time at the backward time: the only one measured may include warm-up.
    return BatchTiming(min(forward, backward) + backward, recording)


def _time(work: Callable[[], None], device: torch.device) -> float:
    stopwatch = Stopwatch(device)
    work()
    return stopwatch.seconds()


def _do_nothing() -> None:
    """Return at once: a device without ``synchronize`` does not run asynchronously."""


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
