"""Save and load results as NumPy ``.npz`` files, with their method and provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.stores.durable import absolute_path, atomic_write


def save_arrays(path: str | Path, result: Any, names: tuple[str, ...]) -> None:
    """Write fields of a result, its method and its provenance to a ``.npz`` file.

    Args:
        path: Path of the file; an existing file is replaced.
        result: An object with a ``method`` and a ``provenance``.
        names: Names of its other fields, which hold tensors or strings.
    """
    fields = {name: _as_array(getattr(result, name)) for name in names}
    texts = {"method": result.method, "provenance": json.dumps(dict(result.provenance))}
    # Pass an open file: given a path, NumPy would append a suffix.
    with atomic_write(absolute_path(path)) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **{k: np.array(v) for k, v in texts.items()}, **fields)


def load_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read the fields of a result that :func:`save_arrays` wrote.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file holds a result of another class, or no result.
    """
    try:
        file = np.load(absolute_path(path), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"`{path}` holds no saved result: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"`{path}` holds a single array; expected a file written by `save`.")
    with file:
        # Files of early versions have no provenance.
        if set(file.files) - {"provenance"} != {*names, "method"}:
            raise ValueError(
                f"`{path}` holds {sorted(file.files)}; expected {sorted([*names, 'method'])}. "
                "Load it with the class that saved it, such as `Scores` or `Embedding`."
            )
        fields = {name: _as_field(file[name]) for name in names}
        provenance = json.loads(str(file["provenance"])) if "provenance" in file.files else {}
        return {**fields, "method": str(file["method"]), "provenance": provenance}


def _as_array(field: Tensor | str) -> NDArray[Any]:
    return np.array(field) if isinstance(field, str) else field.numpy()


def _as_field(array: NDArray[Any]) -> Tensor | str:
    return str(array) if array.dtype.kind == "U" else torch.from_numpy(array)
