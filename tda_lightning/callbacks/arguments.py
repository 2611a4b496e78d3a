"""Arguments of the callbacks: check them at construction.

Each check takes the name of an argument and its value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Literal, TypeGuard

from tda_lightning.callbacks.run_location import Existing
from tda_lightning.gradients.sketching.projectors import Projector
from tda_lightning.passes.model_state import Mode
from tda_lightning.stores import WritableStore
from tda_lightning.stores.arguments import (
    require_choice,
    require_kind,
    require_limit,
    require_whole,
)

Check = Callable[[str, object], None]


def require_sensible(arguments: Mapping[str, object], checks: Mapping[str, Check]) -> None:
    """Check all arguments of a callback with its checks, ``RECORDER`` or ``TRACKER``."""
    for name, check in checks.items():
        check(name, arguments[name])


def _or_none(check: Check) -> Check:
    def allowing(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return allowing


def _expect(expected: str, is_valid: Callable[[object], bool]) -> Check:
    def check(name: str, value: object) -> None:
        if not is_valid(value):
            raise ValueError(f"`{name}` is {value!r}; expected {expected}.")

    return check


def _is_list_of(value: object, is_item: Callable[[object], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_item, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return _is_whole(value) and value >= 0


def _are_axes(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        _is_name(pattern) and (_is_whole(axis) or axis == "flattened")
        for pattern, axis in value.items()
    )


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def _period(name: str, value: object) -> None:
    if isinstance(value, int):
        require_whole(name, value, least=1)
    else:
        _expect("'epoch', 'run', or a whole number of steps", ("epoch", "run").__contains__)(
            name, value
        )


_PROJECTOR = partial(
    require_kind, kind=Projector, examples="`KroneckerCountSketch()` or `Identity()`"
)
_BOTH: dict[str, Check] = {
    "every_n_steps": partial(require_whole, least=1),
    "layers": _or_none(
        _expect(
            "a list of names of modules, such as `['encoder.*', 'head']`",
            partial(_is_list_of, is_item=_is_name),
        )
    ),
    "preconditioner": partial(require_choice, literal=Literal["optimizer", "none"]),
    "sample_ids": _or_none(
        _expect(
            "a key of the batch, or a function of it that returns integers",
            lambda value: _is_name(value) or callable(value),
        )
    ),
    "batch_dims": _or_none(
        _expect("axes by names of modules: `{'encoder.*': 1, 'head': 'flattened'}`", _are_axes)
    ),
}
RECORDER: Mapping[str, Check] = {
    **_BOTH,
    "store": _or_none(
        _expect(
            "the path of a folder to record into, or an `HDF5Store(...)`",
            lambda value: isinstance(value, str | os.PathLike | WritableStore),
        )
    ),
    "existing": _or_none(partial(require_choice, literal=Existing)),
    "reduction": _or_none(partial(require_choice, literal=Literal["mean", "sum"])),
    "projector": _PROJECTOR,
    "max_gb": _or_none(require_limit),
    "max_overhead": _or_none(
        _expect(
            "a share of the time of training above 0, such as 0.1 for 10 %, or `None` for no limit",
            _is_positive,
        )
    ),
    "curvature": partial(require_choice, literal=Literal["fisher", "none"]),
    "curvature_share": _expect(
        "a share of the steps above 0 and up to 1. Switch sampled labels off with "
        "`curvature='none'`",
        lambda value: _is_positive(value) and value <= 1,
    ),
    "audit": partial(require_whole, least=0),
    "snapshots": _expect(
        "'auto', a whole number of steps, 0 for none, or a list of indices of steps",
        lambda value: value == "auto" or _is_index(value) or _is_list_of(value, _is_index),
    ),
}
TRACKER: Mapping[str, Check] = {
    **_BOTH,
    "store": _expect(
        "the path of a file to write, such as 'probe.npz'",
        lambda value: isinstance(value, str | os.PathLike),
    ),
    "existing": partial(require_choice, literal=Literal["refuse", "replace"]),
    "reduction": partial(require_choice, literal=Literal["mean", "sum"]),
    "period": _period,
    "projector": _or_none(_PROJECTOR),
    "mode": partial(require_choice, literal=Mode),
}
