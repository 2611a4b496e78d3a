"""Import the object that a command line names: ``module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import click


def import_object(path: str) -> Any:
    """Return the object at an import path; the working directory is searched first.

    Raises:
        click.UsageError: If there is none.
    """
    place, separator, name = path.rpartition(":")
    if not separator or not name:
        raise click.UsageError(f"`{path}` is no import path; expected `module:name`.")
    try:
        value: Any = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except Exception as error:
        raise click.UsageError(f"`{place}` cannot be imported: {in_short(error)}.") from error
    for part in name.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(part, dir(value), n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise click.UsageError(f"`{place}` has no `{name}`.{hint}")
        value = getattr(value, part)
    return value


def in_short(error: Exception) -> str:
    """Return the class and the message of an error, in one line of limited length."""
    text = " ".join(str(error).split()) or "no message"
    shown = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}: {shown}".removesuffix(".")


def _import_module(name: str) -> Any:
    if str(Path.cwd()) not in sys.path:  # Scripts of an environment do not search it by default.
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(file: Path) -> Any:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None or specification.loader is None or not file.exists():
        raise FileNotFoundError("there is no such file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module  # Dataclasses and pickles look their module up.
    specification.loader.exec_module(module)
    return module
