"""Integrity of a run's files: atomic writes, one writer, checksums, and what must be there."""
