"""Where an operation moves the samples of its inputs.

The origins of a tensor are two tensors of its shape: the lowest and the highest sample that each
entry depends on. An operation that moves entries, such as indexing, moves those of the origins
alike. One that combines entries takes the lower and the higher of them. An entry of no sample has
the origins infinity and minus infinity. Operations that are not known lose the origins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVING = _names("""
    __getitem__ index_select gather take_along_dim masked_select flip fliplr flipud roll rot90
    reshape view view_as reshape_as flatten unflatten ravel permute transpose swapaxes movedim t
    T mT H mH squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile
    narrow select diagonal split chunk tensor_split unbind hsplit vsplit
""")
_JOINING = _names("cat concat concatenate stack hstack vstack dstack column_stack")
_REDUCING = _names("""
    mean sum amax amin std var norm any all prod argmax argmin logsumexp nanmean
""")
# They keep the first axis, and combine entries along others.
_BY_ROW = _names("""
    one_hot interpolate grid_sample pad conv1d conv2d avg_pool2d max_pool2d unfold
    adaptive_avg_pool2d
""")
_OF_NO_SAMPLE = _names("""
    grad rand_like randn_like randint_like zeros_like ones_like empty_like full_like bernoulli
    new_zeros new_ones new_empty new_full new_tensor zero_ fill_ normal_ uniform_
""")
# Their results may have the shape of elementwise operations by chance.
_COMBINING = _names("""
    matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm einsum linear bilinear tensordot cdist outer
    kron sort argsort topk cumsum cumprod inverse cov corrcoef index_put_ index_add index_add_
    scatter scatter_ scatter_add scatter_add_ index_copy_ masked_scatter masked_scatter_
""")


@dataclass(frozen=True)
class Origins:
    """The lowest and the highest sample that each entry of a tensor depends on."""

    low: Tensor
    high: Tensor

    @classmethod
    def of_rows(cls, like: Tensor) -> Origins:
        """Return the origins of a tensor whose rows are the samples of a batch."""
        n = len(like)
        # Half precision is exact up to 2048.
        dtype = torch.float16 if n <= 2048 else torch.float32
        rows = torch.arange(n, dtype=dtype, device=like.device)
        rows = rows.reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)
        return cls(rows, rows)

    @classmethod
    def of_elements(cls, like: Tensor, owners: Int[Tensor, " rows"]) -> Origins:
        """Return the origins of a tensor whose rows are elements of the given samples."""
        rows = owners.to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))
        rows = rows.expand(like.shape)
        return cls(rows, rows)

    @classmethod
    def of_sample(cls, like: Tensor, number: int) -> Origins:
        """Return the origins of a tensor that belongs to one sample."""
        sample = torch.tensor(number, dtype=torch.float32, device=like.device).expand(like.shape)
        return cls(sample, sample)

    @classmethod
    def none(cls, like: Tensor, dtype: torch.dtype) -> Origins:
        """Return the origins of a tensor that depends on no sample."""
        low = torch.tensor(inf, dtype=dtype, device=like.device).expand(like.shape)
        return cls(low, -low)

    def through(self, function: Callable[[Tensor], Tensor]) -> Origins:
        """Apply a function that moves entries."""
        low = function(self.low)
        return Origins(low, low if self.high is self.low else function(self.high))


# Returns the origins of an argument, `None` if they are unknown.
OriginsOf = Callable[[Any], Origins | None]


def name_of(function: Any) -> str:
    """Return the name of an operation, or of the attribute that it reads."""
    name: str = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", "") if name == "__get__" else name


def tensors_in(arguments: Sequence[Any], named: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operation, also those in lists."""
    for value in (*arguments, *named.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))


def origins_after(
    function: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any, of: OriginsOf
) -> Origins | list[Origins] | None:
    """Return the origins of an operation's result, or of each of its results; ``None`` if unknown.

    Args:
        function: The operation.
        arguments: Its arguments.
        named: Its arguments by name.
        result: Its result.
        of: Returns the origins of an argument.
    """
    name = name_of(function)
    named = {key: value for key, value in named.items() if key != "out"}  # It is not ours.
    if name in _OF_NO_SAMPLE or name in _COMBINING:
        return None
    if name in _MOVING:
        return _moved(function, arguments, named, of)
    if name in _JOINING:
        return _joined(function, arguments, named, of)
    if not isinstance(result, Tensor):
        return None
    tracked = [each for each in map(of, tensors_in(arguments, named)) if each is not None]
    if name in _REDUCING:
        return _reduced(tracked[0], arguments, named, result)
    if name in _BY_ROW:
        return _by_row(tracked, result)
    return _combined(tracked, [*tensors_in(arguments, named)], result)


def _moved(
    function: Any, arguments: Sequence[Any], named: Mapping[str, Any], of: OriginsOf
) -> Origins | list[Origins] | None:
    origins, rest = of(arguments[0]) if arguments else None, arguments[1:]
    if origins is None:  # Only the index depends on samples.
        return None
    low = function(origins.low, *rest, **named)
    high = low if origins.high is origins.low else function(origins.high, *rest, **named)
    if isinstance(low, Tensor):
        return Origins(low, high)
    return [Origins(*pair) for pair in zip(low, high, strict=True)]


def _joined(
    function: Any, arguments: Sequence[Any], named: Mapping[str, Any], of: OriginsOf
) -> Origins | None:
    if not arguments or not isinstance(arguments[0], list | tuple):
        return None
    known = [of(each) for each in arguments[0]]
    dtype = next(each.low.dtype for each in known if each is not None)
    parts = [
        Origins.none(tensor, dtype) if origins is None else origins
        for tensor, origins in zip(arguments[0], known, strict=True)
    ]
    rest = arguments[1:]
    low = function([part.low for part in parts], *rest, **named)
    if all(part.high is part.low for part in parts):
        return Origins(low, low)
    return Origins(low, function([part.high for part in parts], *rest, **named))


def _reduced(
    origins: Origins, arguments: Sequence[Any], named: Mapping[str, Any], result: Tensor
) -> Origins | None:
    """Return the origins of sums and the like; those over several samples belong to none."""
    dims = named.get("dim", named.get("axis", arguments[1] if len(arguments) > 1 else None))
    is_kept = result.ndim == origins.low.ndim
    if isinstance(dims, bool) or not isinstance(dims, int | tuple | list) or not result.ndim:
        return None
    low, high = origins.low.amin(dims, is_kept), origins.high.amax(dims, is_kept)
    if low.shape != result.shape:
        return None
    is_single = low == high
    return Origins(torch.where(is_single, low, inf), torch.where(is_single, high, -inf))


def _by_row(tracked: Sequence[Origins], result: Tensor) -> Origins | None:
    low, high = tracked[0].low, tracked[0].high
    if len(tracked) > 1 or not low.ndim or not result.ndim or len(low) != len(result):
        return None
    axes, ones = tuple(range(1, low.ndim)), [1] * (result.ndim - 1)
    rows = (low.amin(axes), high.amax(axes)) if axes else (low, high)
    return Origins(*(each.reshape(-1, *ones).expand(result.shape) for each in rows))


def _combined(
    tracked: Sequence[Origins], tensors: Sequence[Tensor], result: Tensor
) -> Origins | None:
    """Return the origins of an elementwise operation; ``None`` if its shape is another."""
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    if shape != result.shape:
        return None
    first, *others = [each.through(lambda part: part.expand(shape)) for each in tracked]
    low, high = first.low, first.high
    for other in others:
        low, high = torch.minimum(low, other.low), torch.maximum(high, other.high)
    return Origins(low, high)


def origins_assigned(target: Tensor, index: Any, value: Any, of: OriginsOf) -> Origins | None:
    """Return the origins of a tensor after ``target[index] = value``."""
    before, assigned = of(target), of(value)
    known = before or assigned
    if known is None:
        return None
    before = before or Origins.none(target, known.low.dtype)
    low, high = before.low.clone(), before.high.clone()
    low[index] = inf if assigned is None else assigned.low
    high[index] = -inf if assigned is None else assigned.high
    return Origins(low, high)
