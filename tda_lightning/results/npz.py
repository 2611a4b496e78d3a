"""Save and load results as NumPy ``.npz`` files, with their method and provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.stores.arguments import absolute_path
from tda_lightning.stores.integrity.damage import reading
from tda_lightning.stores.integrity.durable import atomic_write

# Names of files that a NumPy archive must not have.
_TABLES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".parquet", ".feather"}
# `save` does not compress; another program may.
_MAX_COMPRESSION = 64
_MAX_UNSTORED_BYTES = 2**22


Result = TypeVar("Result", bound="SavedResult")


class SavedResult:
    """A result that is saved with its method and its provenance.

    Its values have labels, such as ids, along some axes.
    """

    method: str
    provenance: Mapping[str, str]
    _values: ClassVar[str] = "values"
    _axes: ClassVar[tuple[str, ...]]  # labels of the first axes of the values
    _texts: ClassVar[tuple[str, ...]] = ()
    _optional: ClassVar[tuple[str, ...]] = ()  # labels of the first axis, which may be missing

    def save(self, path: str | Path) -> None:
        """Write the result to a NumPy ``.npz`` file, atomically; an existing file is replaced.

        Raises:
            ValueError: If the name of the file ends like a table's, such as ``.csv``.
        """
        _require_no_table(path)
        optional = [name for name in self._optional if getattr(self, name) is not None]
        names = (self._values, *self._axes, *self._texts, *optional)
        fields = {name: _as_array(getattr(self, name)) for name in names}
        provenance = json.dumps(dict(self.provenance))
        texts = {"method": np.array(self.method), "provenance": np.array(provenance)}
        # Pass an open file: given a path, NumPy would append a suffix.
        with atomic_write(absolute_path(path)) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **texts, **fields)

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Read a result written by :meth:`save`.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file is damaged, or holds something else.
        """
        file = absolute_path(path)
        if not file.exists():
            raise FileNotFoundError(
                f"There is no result at `{file}`; expected a file written by `save`. Correct the "
                "path."
            )
        with _reading_result(file):
            arrays = _read_arrays(file)
        optional = [name for name in cls._optional if name in arrays]
        names = (cls._values, *cls._axes, *cls._texts, *optional)
        # Files of early versions have no provenance.
        if set(arrays) - {"provenance"} != {*names, "method"}:
            raise ValueError(
                f"`{path}` holds {sorted(arrays)}; expected {sorted([*names, 'method'])}. "
                "Load it with the class that saved it, such as `Scores` or `Embedding`."
            )
        with _reading_result(file):
            fields = {name: _as_field(arrays[name]) for name in names}
            for axis, name in [*enumerate(cls._axes), *((0, name) for name in optional)]:
                _require_length(cls._values, arrays[cls._values], name, arrays[name], axis)
            provenance = json.loads(str(arrays["provenance"])) if "provenance" in arrays else {}
        construct: Any = cls
        result: Result = construct(**fields, method=str(arrays["method"]), provenance=provenance)
        return result


def _require_no_table(path: str | Path) -> None:
    suffix = Path(path).suffix.lower()
    if suffix in _TABLES:
        raise ValueError(
            f"`{path}` ends in `{suffix}`, but `save` writes a NumPy archive; expected a name that "
            "ends in `.npz`. For a table, use `to_csv` or `to_pandas`, where the result has them."
        )


def _reading_result(file: Path) -> AbstractContextManager[None]:
    remedy = "Pass another file, or compute and save the result again."
    return reading(file, "a result written by `save`", remedy, ValueError)


def _read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    with file.open("rb") as stream:  # Given a path, NumPy leaves a damaged file open.
        if not is_zipfile(stream):  # NumPy would advise loading a pickle, which may run any code.
            raise TypeError("it is not an archive of arrays")
        stream.seek(0)
        archive = np.load(stream, allow_pickle=False)
        with archive:
            _require_stored(archive)
            return {name: archive[name] for name in archive.files}


def _require_stored(archive: np.lib.npyio.NpzFile) -> None:
    """Check that arrays are not far larger than the file, before they are read."""
    assert archive.zip is not None  # It is open.
    for entry in archive.zip.infolist():
        if entry.file_size > max(_MAX_UNSTORED_BYTES, _MAX_COMPRESSION * entry.compress_size):
            raise ValueError(
                f"`{entry.filename}` claims {entry.file_size:,} bytes and stores "
                f"{entry.compress_size:,}"
            )


def _require_length(
    name: str, values: NDArray[Any], label: str, labels: NDArray[Any], axis: int
) -> None:
    """Check that labels are as many as the values have entries along an axis."""
    if axis >= values.ndim or labels.shape != values.shape[axis : axis + 1]:
        raise ValueError(f"`{name}` has shape {values.shape}, and `{label}` {labels.shape}")


def _as_array(field: Tensor | str) -> NDArray[Any]:
    return np.array(field) if isinstance(field, str) else field.numpy()


def _as_field(array: NDArray[Any]) -> Tensor | str:
    return str(array) if array.dtype.kind == "U" else torch.from_numpy(array)
