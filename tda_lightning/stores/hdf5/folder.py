"""The folder of a run: its recipe, whose run it is, and what must not be touched in it."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from tda_lightning.stores.durable import make_durable, partial_name
from tda_lightning.stores.recipe import Recipe

FORMAT = "tda_lightning"
FORMAT_VERSION = 2
RECIPE = "recipe.json"
SEGMENTS = "segment-*.h5"
PARTIAL = ".*.partial"


def segment_name(number: int, rank: int, ranks: int) -> str:
    """Return the name of a segment; where several processes write, it ends in the writer's rank."""
    return f"segment-{number:06d}.h5" if ranks == 1 else f"segment-{number:06d}-rank-{rank}.h5"


def segments_of(path: Path, rank: int, ranks: int) -> list[Path]:
    """Return the sealed segments of one process, in order."""
    return sorted(path.glob("segment-??????.h5" if ranks == 1 else f"segment-*-rank-{rank}.h5"))


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Begin a run in a folder that is empty or not there yet.

    Raises:
        FileExistsError: If something is there.
    """
    if path.exists() and not is_empty(path):
        raise FileExistsError(_what_is_in_the_way(path))
    path.mkdir(parents=True, exist_ok=True)
    _write_document(path, uuid.uuid4().hex, recipe)


def amend_recipe(path: Path, recipe: Recipe) -> None:
    """Put another recipe in the place of that of the run in a folder; it stays the same run."""
    _write_document(path, _read_document(path)["run"], recipe)


def _write_document(path: Path, run_id: str, recipe: Recipe) -> None:
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "run": run_id,
        "recipe": recipe.to_dict(),
    }
    unfinished = partial_name(path / RECIPE)
    unfinished.write_text(json.dumps(document, indent=1))
    make_durable(unfinished)
    unfinished.replace(path / RECIPE)
    make_durable(path)


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of the run in a folder.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If what is there is not a run, or one of another format.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"There is no run at `{path}`: no such folder. Record one with "
            f"`GradientRecorder({str(path)!r})`, or correct the path."
        )
    if not is_run(path):
        raise ValueError(
            f"`{path}` is not a recorded run: expected a folder with a `{RECIPE}`, "
            f"found {_describe(path)}. Correct the path."
        )
    document = _read_document(path)
    if document.get("format") != FORMAT or document.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"`{path}` is in format {document.get('format')!r}, version {document.get('version')}; "
            f"expected {FORMAT!r}, version {FORMAT_VERSION}. Read it with the version of "
            "tda_lightning that wrote it."
        )
    return Recipe.from_dict(document["recipe"])


def read_run_id(path: Path) -> str | None:
    """Return what names the run in a folder, or ``None`` if there is no run."""
    return str(_read_document(path).get("run", "")) if is_run(path) else None


def require_clearable(path: Path) -> None:
    """Raise if a folder holds something else than a run.

    Raises:
        FileExistsError: Naming what is there.
    """
    if path.exists() and not is_run(path) and not is_empty(path):
        raise FileExistsError(_what_is_in_the_way(path))


def is_run(path: Path) -> bool:
    """Say whether a folder holds a run."""
    return (path / RECIPE).is_file()


def is_empty(path: Path) -> bool:
    """Say whether a folder holds nothing of worth."""
    # A process killed while it began a run leaves a partial recipe: as good as nothing.
    return path.is_dir() and all(entry.match(PARTIAL) for entry in path.iterdir())


def _read_document(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((path / RECIPE).read_text())
    return document


def _describe(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return (
        f"a folder with {shown}{', ...' if len(names) > 3 else ''}" if names else "an empty folder"
    )


def _what_is_in_the_way(path: Path) -> str:
    if is_run(path):
        return (
            f"`{path}` holds a recorded run already; expected a new place. Choose another path, or "
            "delete the old run by recording with `existing='replace'`."
        )
    return (
        f"`{path}` holds something else than a recorded run, {_describe(path)}; expected an empty "
        "or a new folder. Choose another path: nothing there was touched."
    )
