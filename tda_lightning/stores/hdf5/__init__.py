"""Segments: sealed HDF5 files of consecutive steps. The only folder that knows h5py.

A segment is written under a temporary name, flushed, fsynced and renamed; once it has its name it
is whole and never changes. ``docs/file-format.md`` describes the inside.
"""

from tda_lightning.stores.hdf5.segment_reader import OpenSegment, Segment
from tda_lightning.stores.hdf5.segment_writer import write_segment

__all__ = ["OpenSegment", "Segment", "write_segment"]
