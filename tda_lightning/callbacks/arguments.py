"""Arguments of the callbacks: check them at construction.

Each check takes the name of an argument and its value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Literal, TypeGuard

from tda_lightning.arguments import require_choice, require_kind, require_limit, require_whole
from tda_lightning.callbacks.run_location import Existing
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.stores import WritableStore

Check = Callable[[str, object], None]


def require_sensible(arguments: Mapping[str, object], checks: Mapping[str, Check]) -> None:
    """Check the types and ranges of all arguments.

    Args:
        arguments: The arguments by name.
        checks: The checks of the callback: ``RECORDER`` or ``TRACKER``.

    Raises:
        ValueError: If one is invalid. The message names it, what was expected and what came.
    """
    for name, check in checks.items():
        check(name, arguments[name])


def _or_none(check: Check) -> Check:
    def allowing(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return allowing


def _refuse(name: str, value: object, expected: str) -> None:
    raise ValueError(f"`{name}` is {value!r}; expected {expected}.")


def _is_list_of(value: object, is_item: Callable[[object], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_item, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return _is_whole(value) and value >= 0


def _store(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike | WritableStore):
        _refuse(name, value, "the path of a folder to record into, or an `HDF5Store(...)`")


def _file(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike):
        _refuse(name, value, "the path of a file to write, such as 'probe.npz'")


def _projector(name: str, value: object) -> None:
    require_kind(name, value, Projector, "`KroneckerCountSketch()` or `Identity()`")


def _layers(name: str, value: object) -> None:
    if not _is_list_of(value, _is_name):
        _refuse(name, value, "a list of names of modules, such as `['encoder.*', 'head']`")


def _sample_ids(name: str, value: object) -> None:
    if not isinstance(value, str) and not callable(value):
        _refuse(name, value, "a key of the batch, or a function of it that returns integers")


def _batch_dims(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(map(_is_axis, value, value.values())):
        _refuse(name, value, "axes by names of modules: `{'encoder.*': 1, 'head': 'flattened'}`")


def _is_axis(pattern: object, axis: object) -> bool:
    return _is_name(pattern) and (_is_whole(axis) or axis == "flattened")


def _snapshots(name: str, value: object) -> None:
    if not _is_index(value) and not _is_list_of(value, _is_index):
        _refuse(name, value, "a whole number of steps, 0 for none, or a list of indices of steps")


def _period(name: str, value: object) -> None:
    if isinstance(value, int):
        require_whole(name, value, least=1)
    elif value not in ("epoch", "run"):
        _refuse(name, value, "'epoch', 'run', or a whole number of steps")


def _curvature_share(name: str, value: object) -> None:
    if not _is_number(value) or not 0 < value <= 1:
        _refuse(
            name,
            value,
            "a share of the steps above 0 and up to 1. Switch sampled labels off with "
            "`curvature='none'`",
        )


def _max_overhead(name: str, value: object) -> None:
    if not _is_number(value) or not value > 0:
        _refuse(
            name,
            value,
            "a share of the time of training above 0, such as 0.1 for 10 %, or `None` for no limit",
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


_BOTH: dict[str, Check] = {
    "every_n_steps": partial(require_whole, least=1),
    "layers": _or_none(_layers),
    "preconditioner": partial(require_choice, literal=Literal["optimizer", "none"]),
    "sample_ids": _or_none(_sample_ids),
    "batch_dims": _or_none(_batch_dims),
}
RECORDER: Mapping[str, Check] = {
    **_BOTH,
    "store": _or_none(_store),
    "existing": _or_none(partial(require_choice, literal=Existing)),
    "reduction": _or_none(partial(require_choice, literal=Literal["mean", "sum"])),
    "projector": _projector,
    "max_gb": _or_none(require_limit),
    "max_overhead": _or_none(_max_overhead),
    "curvature": partial(require_choice, literal=Literal["fisher", "none"]),
    "curvature_share": _curvature_share,
    "audit": partial(require_whole, least=0),
    "snapshots": _snapshots,
}
TRACKER: Mapping[str, Check] = {
    **_BOTH,
    "store": _file,
    "existing": partial(require_choice, literal=Literal["refuse", "replace"]),
    "reduction": partial(require_choice, literal=Literal["mean", "sum"]),
    "period": _period,
    "projector": _or_none(_projector),
    "mode": partial(require_choice, literal=Mode),
}
