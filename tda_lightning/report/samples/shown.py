"""Samples: how an item of a dataset is shown, detected from the kinds of its parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tda_lightning.report.samples.images import is_image

Label = int | float | str
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")
# A longer vector of numbers is taken for audio, unless it comes with column names.
MAX_COLUMNS = 400
MAX_TOKENS = 200


@dataclass(frozen=True)
class Shown:
    """How one sample is shown. All texts are escaped where they are shown.

    Attributes:
        label: Its label, as a reader should see it.
        image: A picture: a tensor or an array of shape ``(h, w)``, ``(c, h, w)`` or ``(h, w, c)``,
            or a PIL image.
        text: A text.
        row: A table row: values by column.
        note: A short remark, such as the length of a recording.
    """

    label: str = ""
    image: Any = None
    text: str = ""
    row: Mapping[str, Label] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ShowItem:
    """Show an item of a dataset by the kinds of its parts: the default ``render``.

    Pictures, texts, vectors of numbers (table rows), token ids, and recordings are detected.

    Attributes:
        class_names: Name of each class; a label without a name is shown as a number.
        column_names: Name of each column of a table row.
    """

    class_names: Sequence[str] = ()
    column_names: Sequence[str] = ()

    def __call__(self, item: Any) -> Shown:
        """Return how an item is shown."""
        label, several = label_of(item), _several_labels(item)
        names = several if label is None else [label]
        shown = Shown(label=", ".join(map(self.label_text, names)))
        for _, value in _content(item):
            shown = self._add(shown, value)
        return shown

    def label_text(self, label: Label) -> str:
        """Return the text of a label: the name of its class, or the number."""
        if _is_whole(label) and 0 <= label < len(self.class_names):
            return str(self.class_names[int(label)])
        return f"{label:.4g}" if isinstance(label, float) else str(label)

    def _add(self, shown: Shown, value: Any) -> Shown:
        if isinstance(value, str):
            return shown if shown.text else dataclasses.replace(shown, text=value)
        if is_image(value):
            return shown if shown.image is not None else dataclasses.replace(shown, image=value)
        vector = _vector(value)
        if vector is None or shown.row or shown.note or shown.text:
            return shown
        if len(vector) > MAX_COLUMNS and not len(self.column_names):
            return dataclasses.replace(shown, note=_recording_note(vector))
        if vector.dtype.kind in "iu":
            return dataclasses.replace(shown, text=_token_text(vector))
        return dataclasses.replace(shown, row=self._row(vector))

    def _row(self, vector: NDArray[Any]) -> dict[str, Label]:
        names = [*self.column_names, *(f"column {i}" for i in range(len(vector)))]
        if len(self.column_names) not in (0, len(vector)):
            raise ValueError(
                f"`column_names` has {len(self.column_names)} names; expected {len(vector)}, one "
                "for each number of a sample."
            )
        return {str(name): float(value) for name, value in zip(names, vector, strict=False)}


def label_of(item: Any, is_class: bool = False) -> Label | None:
    """Return the label of an item: under a common key, or the last part that is a single value.

    If it ``is_class``, a label such as 1.0 is that class.
    """
    key: str | int | None
    if isinstance(item, Mapping):
        key = next((key for key in LABEL_KEYS if key in item), None)
    else:
        key = _label_position(item) if isinstance(item, list | tuple) else None
    label = None if key is None else _scalar(item[key])
    return int(label) if is_class and _is_whole(label) else label


def content_hash(item: Any) -> bytes:
    """Return a hash of an item without its label; equal contents have equal hashes."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in _content(item):
        digest.update(f"{name}:{getattr(value, 'shape', '')}:".encode())
        digest.update(_bytes(value))
    return digest.digest()


def _content(item: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of an item, apart from its label."""
    if isinstance(item, Mapping):
        yield from ((str(key), value) for key, value in item.items() if key not in LABEL_KEYS)
    elif isinstance(item, list | tuple):
        label = _label_position(item)
        if label is None and _several_labels(item):
            label = len(item) - 1
        yield from ((str(i), part) for i, part in enumerate(item) if i != label)
    else:
        yield "0", item


def _several_labels(item: Any) -> list[int]:
    """Return the classes of an item whose label is a vector of zeros and ones."""
    if isinstance(item, Mapping):
        value = next((item[key] for key in LABEL_KEYS if key in item), None)
    else:
        value = item[-1] if isinstance(item, list | tuple) and len(item) > 1 else None
    vector = _vector(value)
    if vector is None or vector.dtype.kind != "f" or not np.isin(vector, (0, 1)).all():
        return []
    return [int(place) for place in np.flatnonzero(vector)]


def _label_position(item: Sequence[Any]) -> int | None:
    backwards = range(len(item) - 1, 0, -1)
    return next((i for i in backwards if _scalar(item[i]) is not None), None)


def _scalar(value: Any) -> Label | None:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        value = array.reshape(-1)[0].item() if array.size == 1 else None
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, int | float | str) else None


def _is_whole(label: Label | None) -> TypeGuard[int | float]:
    return isinstance(label, int | float) and float(label).is_integer()


def _vector(value: Any) -> NDArray[Any] | None:
    """Return a vector of numbers, or ``None``; a single channel in front is dropped."""
    if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
        value = np.asarray(value)
    if not isinstance(value, Tensor | np.ndarray):
        return None
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    return array if array.ndim == 1 and len(array) and array.dtype.kind in "fiu" else None


def _recording_note(vector: NDArray[Any]) -> str:
    peak = float(np.abs(vector.astype(float)).max())
    return f"recording of {len(vector):,} values, peak {peak:.3g}"


def _token_text(vector: NDArray[Any]) -> str:
    more = " …" if len(vector) > MAX_TOKENS else ""
    return " ".join(str(token) for token in vector[:MAX_TOKENS].tolist()) + more


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.float()
    if isinstance(value, Tensor | np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    if is_image(value):
        return value.tobytes()  # type: ignore[no-any-return]
    return repr(value).encode(errors="surrogatepass")
