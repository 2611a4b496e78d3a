"""Runtime checks of types and shapes that take little time.

jaxtyping's import hook decorates each function of the package with ``jaxtyping.jaxtyped``. That
decorator checks the arguments of a call twice, binds them to the signature, and compiles its
checks again whenever a nested function is defined: more than half of the time of the tests. The
decorator here makes the same checks once per call, and none of them again for a nested function.
It checks the first calls of each function in each test: the hundreds that may follow cost a third
of the time of the tests, and have the types of the first.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable

original_jaxtyped = jaxtyping.jaxtyped
RAISING_TYPE_ERRORS = BeartypeConf(violation_type=TypeError)  # as jaxtyping does
CHECKED_CALLS = 20  # of each function in each test


class Calls:
    """The calls of one function in the current test."""

    test = 0  # of all functions

    def __init__(self) -> None:
        self.counted_in, self.number = -1, 0

    def is_over(self) -> bool:
        """Return whether further calls in this test are not checked."""
        if self.counted_in != Calls.test:
            self.counted_in, self.number = Calls.test, 0
        return self.number >= CHECKED_CALLS

    def is_checked(self) -> bool:
        """Count one more call; return whether it is to be checked."""
        if self.is_over() or jaxtyping.config.jaxtyping_disable:
            return False
        self.number += 1
        return True


def install() -> None:
    """Let jaxtyping's import hook use the decorator here."""
    jaxtyping.jaxtyped = jaxtyped


def begin_test() -> None:
    """Check the first calls of each function again."""
    Calls.test += 1


def jaxtyped(decorated: Any = None, *, typechecker: Any) -> Any:
    """Check the arguments and the result of a function, or the fields of a dataclass."""
    if decorated is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(decorated):
        if is_dataclass(decorated) and not hasattr(decorated.__init__, "is_checked"):
            decorated.__init__ = checked(decorated.__init__)
        return decorated
    if inspect.isgeneratorfunction(decorated):  # it runs after the shapes have been forgotten
        return first_calls(
            decorated, original_jaxtyped(decorated, typechecker=typechecker), Calls()
        )
    return checked(decorated)


def first_calls(
    function: Callable[..., Any], check: Callable[..., Any], calls: Calls
) -> Callable[..., Any]:
    """Return a function whose first calls in each test are those of `check`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (check if calls.is_checked() else function)(*args, **kwargs)

    wrapper.is_checked = True
    return wrapper


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of a function; if it is nested, all its definitions."""
    if "<locals>" not in function.__qualname__:
        hints = hints_of(function)
        return first_calls(function, with_shapes(compiled(function, hints), hints), Calls())
    code = function.__code__
    if code not in NESTED:
        NESTED[code] = Nested(hints_of(function), Calls())
    hints, calls = NESTED[code]
    if calls.is_over():
        return function
    return first_calls(function, with_shapes(checked_against(hints, function), hints), calls)


def with_shapes(check: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """Let the dimensions of a call be compared with one another, if it has any."""
    if not any(names_shapes(hint) for hint in hints.values()):
        return check

    def compared(*args: Any, **kwargs: Any) -> Any:
        with original_jaxtyped("context"):
            return check(*args, **kwargs)

    return compared


def compiled(function: Any, hints: dict[str, Any]) -> Callable[..., Any]:
    """Return a copy of a function that beartype checks against resolved annotations."""
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, hints
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return beartype(conf=RAISING_TYPE_ERRORS)(copy)


def checked_against(hints: dict[str, Any], function: Any) -> Callable[..., Any]:
    """Check a function without compiling: for those that are defined again in each call."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    def check(*args: Any, **kwargs: Any) -> Any:
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            die_if_unbearable(value, hints.get(name, object), conf=RAISING_TYPE_ERRORS)
        result = function(*args, **kwargs)
        die_if_unbearable(result, hints.get("return", object), conf=RAISING_TYPE_ERRORS)
        return result

    return check


class Nested(NamedTuple):
    """What all definitions of a nested function share."""

    hints: dict[str, Any]
    calls: Calls


NESTED: dict[types.CodeType, Nested] = {}


def hints_of(function: Any) -> dict[str, Any]:
    """Return the annotations; what cannot be resolved yet accepts anything, as in jaxtyping."""
    return {
        name: resolved(hint, function.__globals__)
        for name, hint in function.__annotations__.items()
    }


def resolved(hint: Any, names: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={"hint": hint}, __globals__=names)
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:
        return Any


def names_shapes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(names_shapes(part) for part in typing.get_args(hint))
