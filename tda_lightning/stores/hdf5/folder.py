"""Folder of a run: file names, ``recipe.json``, and checks that protect other content."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from tda_lightning.stores.hdf5.segment_file import SegmentIdentity
from tda_lightning.stores.hdf5.snapshot_files import indices_in, snapshot_file
from tda_lightning.stores.integrity.damage import (
    StoreFileError,
    canonical_json,
    printable,
    readable,
    reading,
)
from tda_lightning.stores.integrity.durable import atomic_write, writing_to
from tda_lightning.stores.integrity.manifest import MANIFEST_NAME, Manifest, write_manifest
from tda_lightning.stores.integrity.writer_lock import LOCK
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.recipe_checks import require_recipe

FORMAT = "tda_lightning"
FORMAT_VERSION = 2
RECIPE = "recipe.json"
PARTIAL = ".*.partial"
# Files that desktops and network file systems create by themselves.
_OF_THE_SYSTEM = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", "Thumbs.db", "desktop.ini")
_MAX_RECIPE_BYTES = 2**26
_SEGMENT = re.compile(r"segment-(\d{6,})(?:-rank-(\d+))?\.h5")


def segment_name(number: int, rank: int, ranks: int) -> str:
    """Return the name of a segment; with several processes, it ends in the writer's rank."""
    return f"segment-{number:06d}.h5" if ranks == 1 else f"segment-{number:06d}-rank-{rank}.h5"


def segments_of(path: Path, rank: int, ranks: int) -> list[Path]:
    """Return the sealed segments of one process, in order."""
    writer = None if ranks == 1 else str(rank)
    return sorted((f for f in all_segments(path) if _parts_of(f)[1] == writer), key=number_of)


def all_segments(path: Path) -> list[Path]:
    """Return the sealed segments of all processes, in no order."""
    return [file for file in path.glob("segment-*.h5") if _SEGMENT.fullmatch(file.name)]


def number_of(file: Path) -> int:
    """Return the number in the name of a segment, which may have more than six digits."""
    return int(_parts_of(file)[0])


def identity_of(file: Path, run: str, ranks: int) -> SegmentIdentity:
    """Return which segment a file is, by its name."""
    number, rank = _parts_of(file)
    return SegmentIdentity(run, int(number), int(rank or 0), ranks)


def first_gap(numbers: Set[int]) -> range:
    """Return the first numbers from 0 that are missing before others; empty if none is.

    >>> first_gap({0, 1, 5, 9})
    range(2, 5)
    """
    # A stranger may number a file as he likes, so the gap must not be spelled out.
    start = next(number for number in itertools.count() if number not in numbers)
    return range(start, min((number for number in numbers if number > start), default=start))


def _parts_of(file: Path) -> tuple[str, str | None]:
    match = _SEGMENT.fullmatch(file.name)
    assert match is not None
    return match[1], match[2]


def prepare(path: Path) -> None:
    """Create the folder of a new run, which must be empty or new."""
    if path.exists() and not is_empty(path):
        raise FileExistsError(_occupied_message(path))
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)


def write_recipe(path: Path, run: str, recipe: Recipe) -> None:
    """Begin a run in a folder without one."""
    require_recipe(recipe.to_dict())  # What is written must be readable.
    if is_run(path):
        raise FileExistsError(_occupied_message(path))
    _write_document(path, run, recipe)


def amend_recipe(path: Path, recipe: Recipe) -> None:
    """Replace the recipe of the run in a folder; the run id stays."""
    _write_document(path, _read_document(path)["run"], recipe)


def _write_document(path: Path, run_id: str, recipe: Recipe) -> None:
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "run": run_id,
        "recipe": recipe.to_dict(),
    }
    document["crc32"] = _checksum(document)
    with atomic_write(path / RECIPE) as partial:
        partial.write_text(json.dumps(document, indent=1))


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of the run in a folder.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the path is not a run, or a run of another format.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"There is no run at `{path}`: no such folder. Record one with "
            f"`GradientRecorder({str(path)!r})`, or correct the path."
        )
    if not is_run(path):
        raise ValueError(
            f"`{path}` is not a recorded run: expected a folder with a `{RECIPE}`, "
            f"found {_describe_content(path)}. Correct the path."
        )
    document = _read_document(path)
    if document.get("format") != FORMAT or document.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"`{path / RECIPE}` is in format {document.get('format')!r}, version "
            f"{document.get('version')!r}; expected {FORMAT!r}, version {FORMAT_VERSION}. "
            "Read it with the version of tda_lightning that wrote it."
        )
    with _reading_recipe(path):
        require_recipe(document["recipe"])
        if document.get("crc32", expected := _checksum(document)) != expected:
            raise ValueError("its checksum is another one: somebody has changed it")
        return Recipe.from_dict(document["recipe"])


def has_checksum(path: Path) -> bool:
    """Return whether the recipe in a folder has a checksum; those of older versions have none."""
    return "crc32" in _read_document(path)


def read_run_id(path: Path) -> str | None:
    """Return the id of the run in a folder, or ``None`` if there is no run."""
    return str(_read_document(path).get("run", "")) if is_run(path) else None


def require_clearable(path: Path) -> None:
    """Check that a path holds nothing or a run."""
    if path.exists() and not is_run(path) and not is_empty(path):
        raise FileExistsError(_occupied_message(path))


def delete_run(path: Path) -> None:
    """Delete the files of a run, and nothing else in its folder.

    An interruption leaves the beginning of the run, and the deletion can be repeated.
    """
    with suppress(StoreFileError):  # Nothing can be read without a recipe.
        run = read_run_id(path) or ""
        for file in _manifests(path):  # From now on, no other file need be there.
            write_manifest(file, Manifest(run))
    for file in sorted(files_of(path), key=_place_in_deletion):
        file.unlink()


def files_of(path: Path) -> list[Path]:
    """Return all files of the run in a folder."""
    snapshots = [snapshot_file(path, index) for index in indices_in(path)]
    others = [*path.glob(PARTIAL), *_manifests(path), *path.glob(RECIPE)]
    return [*all_segments(path), *snapshots, *(file for file in others if not file.is_dir())]


def _place_in_deletion(file: Path) -> tuple[int, int]:
    """Return the later segments first, and the recipe last."""
    if _SEGMENT.fullmatch(file.name):
        return 0, -number_of(file)
    return (2 if file.name == RECIPE else 1), 0


def _manifests(path: Path) -> list[Path]:
    return [file for file in path.glob("manifest*") if MANIFEST_NAME.fullmatch(file.name)]


def is_run(path: Path) -> bool:
    """Return whether a folder holds a run."""
    with readable(path / RECIPE):
        return (path / RECIPE).is_file()


def require_recipe_file(path: Path) -> None:
    """Check that a run that is being written still has its recipe."""
    if not is_run(path):
        raise StoreFileError(f"`{path / RECIPE}` is gone; expected the recipe of this run")


def is_empty(path: Path) -> bool:
    """Return whether a folder holds nothing but what a killed process or the system may leave."""
    return path.is_dir() and all(map(_is_nothing, path.iterdir()))


def _is_nothing(file: Path) -> bool:
    return file.name == LOCK or any(map(file.match, (PARTIAL, *_OF_THE_SYSTEM)))


def _read_document(path: Path) -> dict[str, Any]:
    with _reading_recipe(path):
        if (size := (path / RECIPE).stat().st_size) > _MAX_RECIPE_BYTES:
            raise ValueError(f"it has {size:,} bytes; expected at most {_MAX_RECIPE_BYTES:,}")
        document: dict[str, Any] = json.loads((path / RECIPE).read_text())
        if not isinstance(document, dict):
            raise TypeError(f"it holds a {type(document).__name__}, not an object")
    return document


def _checksum(document: Mapping[str, Any]) -> int:
    """Return the checksum of a document: that of its JSON, with sorted keys and no spaces."""
    content = {key: value for key, value in document.items() if key != "crc32"}
    return zlib.crc32(canonical_json(content))


def _reading_recipe(path: Path) -> AbstractContextManager[None]:
    expected = "the recipe of a run, in JSON"
    return reading(path / RECIPE, expected, "Restore it from a copy, or record again.")


def _describe_content(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(f"`{printable(name)}`" for name in names[:3])
    return (
        f"a folder with {shown}{', ...' if len(names) > 3 else ''}" if names else "an empty folder"
    )


def _occupied_message(path: Path) -> str:
    if is_run(path):
        return (
            f"`{path}` already holds a recorded run; expected an empty or new folder. Choose "
            "another path, keep both runs by recording with `existing='number'`, or delete the old "
            "one by recording with `existing='replace'`."
        )
    return (
        f"`{path}` is not a recorded run but {_describe_content(path)}; expected an empty or new "
        "folder. Choose another path; nothing was changed there."
    )
