"""Messages: the logger of the package, which writes one paragraph per training by default.

``logging.getLogger("tda_lightning").setLevel("WARNING")`` silences it, and ``"DEBUG"`` adds the
times of the first batch. Only the first process writes.
"""

from __future__ import annotations

import logging
import sys

from pytorch_lightning.utilities import rank_zero_only

LOGGER = logging.getLogger("tda_lightning")


class _Fallback(logging.Handler):
    """Writes to standard error unless the program has set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)
LOGGER.addHandler(_Fallback())


@rank_zero_only
def inform(message: str) -> None:
    """Log a message that users see by default."""
    LOGGER.info(message)


@rank_zero_only
def note(message: str) -> None:
    """Log a detail that users see on request."""
    LOGGER.debug(message)
