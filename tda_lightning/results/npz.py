"""Save and load results as NumPy ``.npz`` files, with their method and provenance."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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


def save_arrays(path: str | Path, result: Any, names: tuple[str, ...]) -> None:
    """Write fields of a result, its method and its provenance to a ``.npz`` file.

    The fields hold tensors or strings.

    Raises:
        ValueError: If the name of the file ends like a table's, such as ``.csv``.
    """
    _require_no_table(path)
    fields = {name: _as_array(getattr(result, name)) for name in names}
    texts = {"method": result.method, "provenance": json.dumps(dict(result.provenance))}
    # Pass an open file: given a path, NumPy would append a suffix.
    with atomic_write(absolute_path(path)) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **{k: np.array(v) for k, v in texts.items()}, **fields)


def _require_no_table(path: str | Path) -> None:
    suffix = Path(path).suffix.lower()
    if suffix in _TABLES:
        raise ValueError(
            f"`{path}` ends in `{suffix}`, but `save` writes a NumPy archive; expected a name that "
            "ends in `.npz`. For a table, use `to_csv` or `to_pandas`, where the result has them."
        )


def load_arrays(
    path: str | Path,
    names: tuple[str, ...],
    axes: tuple[str, ...],
    *,
    optional: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read the fields of a result that :func:`save_arrays` wrote.

    Args:
        path: Path of the file.
        names: Names of the fields, the one with the values first.
        axes: Names of the fields that label the first axes of the values.
        optional: Names of fields that a file may lack; they label the first axis, too.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file is damaged, or holds something else.
    """
    file = absolute_path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"There is no result at `{file}`; expected a file written by `save`. Correct the path."
        )
    with _reading_result(file):
        arrays = _read_arrays(file)
    # Files of early versions have no provenance.
    names = (*names, *(name for name in optional if name in arrays))
    if set(arrays) - {"provenance"} != {*names, "method"}:
        raise ValueError(
            f"`{path}` holds {sorted(arrays)}; expected {sorted([*names, 'method'])}. "
            "Load it with the class that saved it, such as `Scores` or `Embedding`."
        )
    with _reading_result(file):
        fields = {name: _as_field(arrays[name]) for name in names}
        extra = [(name, 0) for name in optional if name in fields]
        for name, axis in [*((name, axis) for axis, name in enumerate(axes)), *extra]:
            _require_length(names[0], arrays[names[0]], name, arrays[name], axis)
        provenance = json.loads(str(arrays["provenance"])) if "provenance" in arrays else {}
    return {**fields, "method": str(arrays["method"]), "provenance": provenance}


def _reading_result(file: Path) -> AbstractContextManager[None]:
    remedy = "Pass another file, or compute and save the result again."
    return reading(file, "a result written by `save`", remedy, ValueError)


def _read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    with file.open("rb") as stream:  # Given a path, NumPy leaves a damaged file open.
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise TypeError("it holds a single array")
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
