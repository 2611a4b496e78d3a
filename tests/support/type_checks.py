"""Runtime checks of types and shapes that take little time.

jaxtyping's import hook decorates each function of the package with ``jaxtyping.jaxtyped``. That
decorator checks the arguments of a call twice, binds them to the signature, and compiles its
checks again whenever a nested function is defined: more than half of the time of the tests. The
decorator here makes the same checks once per call, and none of them again for a nested function.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable

original_jaxtyped = jaxtyping.jaxtyped
RAISING_TYPE_ERRORS = BeartypeConf(violation_type=TypeError)  # as jaxtyping does


def install() -> None:
    """Let jaxtyping's import hook use the decorator here."""
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(decorated: Any = None, *, typechecker: Any) -> Any:
    """Check the arguments and the result of a function, or the fields of a dataclass."""
    if decorated is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(decorated):
        if is_dataclass(decorated) and not hasattr(decorated.__init__, "is_checked"):
            decorated.__init__ = checked(decorated.__init__)
        return decorated
    if inspect.isgeneratorfunction(decorated):  # it runs after the shapes have been forgotten
        return original_jaxtyped(decorated, typechecker=typechecker)
    return checked(decorated)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    nested = "<locals>" in function.__qualname__
    hints = hints_of_nested(function) if nested else hints_of(function)
    check = checked_against(hints, function) if nested else compiled(function, hints)
    config, context = jaxtyping.config, original_jaxtyped
    if any(names_shapes(hint) for hint in hints.values()):

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if config.jaxtyping_disable:
                return function(*args, **kwargs)
            with context("context"):
                return check(*args, **kwargs)

    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return (function if config.jaxtyping_disable else check)(*args, **kwargs)

    wrapper.is_checked = True
    return wrapper


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


NESTED_HINTS: dict[types.CodeType, dict[str, Any]] = {}


def hints_of_nested(function: Any) -> dict[str, Any]:
    if function.__code__ not in NESTED_HINTS:
        NESTED_HINTS[function.__code__] = hints_of(function)
    return NESTED_HINTS[function.__code__]


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
