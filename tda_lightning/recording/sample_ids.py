"""Sample ids: infer the dataset index of each row of a batch, without changing the dataset.

A loader's sampler is wrapped, and the wrapper stores indices as they are drawn. Batches arrive in
the order in which they were drawn, with any number of workers. So the oldest unclaimed draw belongs
to the batch that has just arrived. No random number is consumed, no iterator is started, and the
original sampler is restored at the end.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from tda_lightning.gradients.capture.capture import SamplelessError
from tda_lightning.recording.collation import check_collation
from tda_lightning.recording.recording_sampler import REMEDY, RecordingSampler, watch_sampler

IdSource = str | Callable[[Any], Any]


class SampleLedger:
    """Infers the sample ids of each training batch.

    Args:
        source: Where a batch holds its ids, or ``None`` to infer them from the sampler.
    """

    def __init__(self, source: IdSource | None) -> None:
        self._source = source
        self._sampler: RecordingSampler | None = None
        self._restores: list[Callable[[], None]] = []
        self._ids: Int[np.ndarray, " n_train"] | None = None
        self._loader: object = None
        # Index of the last batch in its epoch; `None` when training resumes in the middle of one.
        self._last_batch: int | None = -1
        self._yields_items = False  # Whether a batch is one item of the dataset.
        self._is_lag_known = False
        self._n_given: int | None = None  # Number of ids that `source` last returned.

    @property
    def train_ids(self) -> Int[np.ndarray, " n_train"] | None:
        """Ids of the whole training set, sorted, or ``None`` if only the batches hold them."""
        return None if self._ids is None else np.unique(self._ids)

    def watch(self, loader: object, is_recording: Callable[[], bool]) -> None:
        """Infer ids from this loader, by wrapping its sampler until :meth:`release`.

        Raises:
            ValueError: If the ids of this loader's batches cannot be inferred.
        """
        if self._source is not None:
            return
        self.release()
        known_loader = _require_known_order(loader)
        sampler, stop_sampler = watch_sampler(known_loader, is_recording)
        self._ids, self._loader = root_ids(known_loader.dataset), known_loader
        self._yields_items = known_loader.batch_sampler is None
        stop_check = (lambda: None) if self._yields_items else check_collation(known_loader)
        self._sampler, self._restores = sampler, [stop_sampler, stop_check]

    def is_watching(self, loader: object) -> bool:
        """Return whether the ids of this loader's batches are known, or come from the batches."""
        return self._source is not None or loader is self._loader

    def release(self) -> None:
        """Restore the original sampler of the watched loader."""
        for restore in self._restores:
            restore()
        self._restores, self._sampler, self._loader = [], None, None

    def name(self, batch: Any, batch_index: int, sampler_pass: object = None) -> Int[Tensor, " n"]:
        """Return the sample ids of a batch that has just arrived.

        The draws of dropped batches before it are skipped. The batch comes from ``sampler_pass``,
        if that is known.
        """
        if self._source is not None:
            given = _as_ids(_look_up(batch, self._source))
            if len(given) != self._n_given:
                self._n_given = len(given)
                _warn_of_one_id("`sample_ids` returned", len(given), batch)
            return given
        if self._sampler is None:
            raise RuntimeError(f"No training loader was watched before the first batch. {REMEDY}")
        if self._last_batch is None:
            self._require_fresh_order(batch_index)
            self._last_batch = batch_index - 1
        for _ in range(batch_index - self._last_batch - 1):
            self._sampler.claim(sampler_pass)
        self._last_batch = batch_index
        drawn = self._sampler.claim(sampler_pass)
        self._warn_of_lag(self._sampler.n_ahead(sampler_pass))
        if self._yields_items and batch_index == 0:
            _warn_of_one_id("With `batch_size=None`, the sampler drew", len(drawn), batch)
        return torch.as_tensor(_indexed(self._ids, drawn), dtype=torch.int64)

    def _warn_of_lag(self, n_ahead: int) -> None:
        """Warn once if a loader with an ``__iter__`` of its class holds back or skips batches."""
        loader: Any = self._loader
        is_known = (
            hasattr(loader, "load_state_dict") or type(loader).__iter__ is DataLoader.__iter__
        )
        if self._is_lag_known or is_known:
            return
        # Without a length, the trainer requests one batch more, to know which is the last.
        n_requested = 0 if hasattr(loader.dataset, "__len__") else 1
        if n_ahead > n_requested + loader.num_workers * (loader.prefetch_factor or 0):
            self._is_lag_known = True
            warnings.warn(
                f"The `{type(loader).__name__}` has drawn samples of {n_ahead} batches that have "
                "not arrived. If its `__iter__` skips batches, or changes their order, ids are "
                f"wrong; expected every batch in the order of the draws. {REMEDY}",
                stacklevel=2,
            )

    @contextmanager
    def checking_number(self) -> Iterator[None]:
        """Blame ``sample_ids`` if the loss inside the context has no rows for as many samples.

        Raises:
            ValueError: If so.
        """
        try:
            yield
        except SamplelessError as error:
            if self._source is None:
                raise
            raise ValueError(
                f"`sample_ids` returned {self._n_given} ids for a batch, but no operation of the "
                f"loss has a row for each of {self._n_given} samples; expected one id per sample. "
                "Return as many ids as the batch has samples. Pass samples of several loaders "
                "through the model in one call."
            ) from error

    def start_training(self, steps: int) -> None:
        """Prepare for batch 0, or for any batch if ``steps`` were taken before."""
        self._last_batch = None if steps else -1

    def start_epoch(self) -> None:
        """Prepare for batch 0, unless training was resumed and no batch has arrived yet."""
        if self._last_batch is not None:
            self._last_batch = -1

    def _require_fresh_order(self, batch_index: int) -> None:
        if batch_index and hasattr(self._loader, "load_state_dict"):
            raise ValueError(
                f"Cannot infer which samples the `{type(self._loader).__name__}` yields: it was "
                f"resumed at batch {batch_index} from its own state, so it may have drawn samples "
                f"that it never delivered. {REMEDY}"
            )


def root_ids(dataset: Any) -> Int[np.ndarray, " n"] | None:
    """Return, for every index of ``dataset``, the index in the dataset behind all ``Subset``s.

    ``None`` if the dataset has no length.
    """
    if isinstance(dataset, Subset):
        parent_ids = root_ids(dataset.dataset)
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return indices if parent_ids is None else parent_ids[indices]
    return np.arange(len(dataset)) if hasattr(dataset, "__len__") else None


def _indexed(
    ids: Int[np.ndarray, " n_train"] | None, drawn: Sequence[Any]
) -> Int[np.ndarray, " n"]:
    """Return the ids at the drawn indices; without a dataset's length, the indices themselves."""
    n_train = 2**62 if ids is None else len(ids)
    try:
        indices = np.asarray(drawn)
        is_integer = indices.ndim == 1 and indices.dtype.kind in "iu"
    except ValueError:  # Sequences of different lengths.
        is_integer = False
    # Python's functions are faster for a batch than NumPy's.
    if len(drawn) and not (is_integer and -n_train <= min(drawn) and max(drawn) < n_train):
        wrong = next(each for each in drawn if not _is_index(each, n_train))
        size = "" if ids is None else f" of {n_train:,} samples"
        raise ValueError(
            f"The sampler drew {wrong!r}, which is no index into the dataset{size}; expected "
            f"integers. {REMEDY}"
        )
    indices = indices.astype(np.int64)
    return indices if ids is None else ids[indices]


def _is_index(value: Any, n_train: int) -> bool:
    try:
        return -n_train <= operator.index(value) < n_train
    except TypeError:
        return False


def require_once(ids: Int[Tensor, " n"]) -> None:
    """Check that a pass over the training data has drawn no sample twice."""
    values, counts = np.unique(ids.numpy(), return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"`train_loader` draws sample {values[counts.argmax()]} {counts.max()} times in one "
            "pass; expected every sample once. Pass a loader without a sampler that repeats."
        )


def _require_known_order(loader: object) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Cannot infer which samples a `{type(loader).__name__}` yields; expected a "
            f"`torch.utils.data.DataLoader`. {REMEDY}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"`{type(loader.dataset).__name__}` is an iterable dataset, whose samples have no "
            f"index; expected a dataset with `__getitem__`. {REMEDY}"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError(
            "The training loader has `in_order=False`, so batches may arrive in another order than "
            f"their draws; expected `in_order=True`. Set it, or: {REMEDY}"
        )
    return loader


def _look_up(batch: Any, source: IdSource) -> Any:
    if callable(source):
        return source(batch)
    if isinstance(batch, Mapping) and source in batch:
        return batch[source]
    keys = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(
        f"`sample_ids={source!r}` is no key of the batch, which has {keys}. Pass a key that holds "
        "each sample's id, or a function from the batch to ids."
    )


def _warn_of_one_id(source: str, n_ids: int, batch: Any) -> None:
    """Warn of a single id for a batch that seems to hold several samples."""
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    tensors = items if isinstance(items, list | tuple) else [items]
    sizes = {len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim}
    if n_ids == 1 and len(sizes) == 1 and (size := sizes.pop()) > 1:
        warnings.warn(
            f"{source} one id for a batch whose tensors have {size} rows, which are recorded as "
            "one sample. Expected one id per sample: return them all by `sample_ids=`, unless the "
            "rows belong to one sample.",
            stacklevel=2,
        )


def _as_ids(values: Any) -> Int[Tensor, " n"]:
    is_sequence = isinstance(values, Sequence | np.ndarray | Tensor)
    if is_sequence and len(values) == 0:  # A batch may be empty.
        return torch.empty(0, dtype=torch.int64)
    ids = _tensor_of(values) if is_sequence else torch.empty(0)
    if ids.ndim != 1 or ids.is_floating_point() or len(ids) == 0 or ids.dtype == torch.bool:
        shape = tuple(ids.shape) if is_sequence else type(values).__name__
        raise ValueError(
            f"`sample_ids` returned {shape} of {ids.dtype}; expected one integer per sample of the "
            "batch. Number your samples, and return those numbers."
        )
    signed = ids.to(torch.int64)
    if ids.dtype == torch.uint64 and bool((signed < 0).any()):
        raise ValueError(
            "`sample_ids` returned ids of 2**63 and more; expected smaller ones, which fit a "
            "signed integer. Number your samples, and return those numbers."
        )
    return signed


def _tensor_of(values: Any) -> Tensor:
    try:
        return torch.as_tensor(values).cpu()
    except (TypeError, ValueError) as error:  # Names, for example.
        raise ValueError(
            f"`sample_ids` returned {type(values[0]).__name__} objects; expected one integer per "
            "sample of the batch. Number your samples, and return those numbers."
        ) from error
