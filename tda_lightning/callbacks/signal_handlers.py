"""Exceptions that a signal handler raises: they may interrupt any line, and must not be caught."""

from __future__ import annotations

import signal
import traceback
from typing import Any


def is_from_signal_handler(error: BaseException) -> bool:
    """Return whether an exception comes from a signal handler, which may interrupt any line."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {_code_of(handler) for handler in handlers if callable(handler)} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _code_of(handler: Any) -> Any:
    """Return the code of a function, a method or a callable object."""
    return getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
