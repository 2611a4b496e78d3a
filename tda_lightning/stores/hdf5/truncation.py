"""Drop the last steps of a segment."""

from __future__ import annotations

from pathlib import Path

from tda_lightning.stores.hdf5 import OpenSegment, Segment, write_segment
from tda_lightning.stores.hdf5.segment_header import SegmentIdentity
from tda_lightning.stores.row_formats import Storage


def drop_from(file: Path, index: int, storage: Storage | None, identity: SegmentIdentity) -> None:
    """Drop the steps from ``index`` on: rewrite the segment, or delete it if none is left.

    Args:
        file: The segment.
        index: Index of the first step to drop.
        storage: Number format of the rewritten rows.
        identity: Which segment it is.
    """
    segment = Segment(file, identity)
    n_earlier = sum(step_index < index for step_index in segment.indices)
    if n_earlier == 0:
        file.unlink()
    elif n_earlier < len(segment):
        reader = OpenSegment(segment)
        steps = [reader.step_at(position) for position in range(n_earlier)]
        write_segment(file, steps, storage, identity)
