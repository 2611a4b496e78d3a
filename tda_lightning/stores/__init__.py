"""Recorded runs: steps, recipes, and the stores that hold them in memory or on disk."""

from tda_lightning.stores.hdf5.store import HDF5Store
from tda_lightning.stores.memory import MemoryStore
from tda_lightning.stores.opening import open_store, open_store_at
from tda_lightning.stores.step import Step
from tda_lightning.stores.store import Store
from tda_lightning.stores.writable_store import WritableStore

from tda_lightning.stores.data_order import DataOrder, data_order  # isort: skip

__all__ = [
    "DataOrder",
    "HDF5Store",
    "MemoryStore",
    "Step",
    "Store",
    "WritableStore",
    "data_order",
    "open_store",
    "open_store_at",
]
