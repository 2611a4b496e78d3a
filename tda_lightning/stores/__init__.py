"""Stores: where the steps of a run are kept."""

from tda_lightning.stores.hdf5.store import HDF5Store
from tda_lightning.stores.memory import MemoryStore
from tda_lightning.stores.opening import opened, opened_at
from tda_lightning.stores.store import Store, WritableStore

__all__ = ["HDF5Store", "MemoryStore", "Store", "WritableStore", "opened", "opened_at"]
