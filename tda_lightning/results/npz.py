"""Archives: answers in NumPy's ``.npz`` files, with who gave them and what they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def save_arrays(path: str | Path, answer: Any, names: tuple[str, ...]) -> None:
    """Write some fields of an answer, its method and its provenance to a ``.npz`` file.

    Args:
        path: Where to; a file that is there is replaced.
        answer: Has a ``method`` and a ``provenance``.
        names: Its other fields: tensors, or words.
    """
    fields = {name: _as_array(getattr(answer, name)) for name in names}
    words = {"method": answer.method, "provenance": json.dumps(dict(answer.provenance))}
    # Through an open file: given a name, NumPy would append a suffix of its own.
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **{k: np.array(v) for k, v in words.items()}, **fields)


def load_arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Read the fields of an answer that :func:`save_arrays` wrote.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file holds an answer of another kind, or none.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"`{path}` holds no answer that was saved; {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"`{path}` holds a single array; expected what `save` wrote.")
    with file:
        # Files from before there was a provenance have none.
        if set(file.files) - {"provenance"} != {*names, "method"}:
            raise ValueError(
                f"`{path}` holds {sorted(file.files)}; expected {sorted([*names, 'method'])}. "
                "Load it with the class that saved it: `Scores`, `SampleScores`, `Embedding`, say."
            )
        fields = {name: _as_field(file[name]) for name in names}
        provenance = json.loads(str(file["provenance"])) if "provenance" in file.files else {}
        return {**fields, "method": str(file["method"]), "provenance": provenance}


def _as_array(field: Tensor | str) -> NDArray[Any]:
    return np.array(field) if isinstance(field, str) else field.numpy()


def _as_field(array: NDArray[Any]) -> Tensor | str:
    return str(array) if array.dtype.kind == "U" else torch.from_numpy(array)
