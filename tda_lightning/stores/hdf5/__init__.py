"""HDF5 segments: sealed files of consecutive steps. Only this package imports h5py.

A segment is written under a temporary name, synced to disk and renamed. Under its final name it is
complete and never changes. ``docs/file-format.md`` describes the content.
"""

from tda_lightning.stores.hdf5.segment_reader import Segment
from tda_lightning.stores.hdf5.segment_writer import write_segment

__all__ = ["Segment", "write_segment"]
