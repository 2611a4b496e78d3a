"""The import rule: a file imports from lower floors or its own package; east never imports west."""

import ast
import functools
import re
from pathlib import Path

import pytest

import tda_lightning

PACKAGE = Path(tda_lightning.__file__).parent
FLOORS = [
    {"stores"},
    {"gradients", "results"},
    {"recording", "metrics"},
    {"passes"},
    {"callbacks", "attribution"},
    {"features"},
    {"full_influence"},
    {"applications"},
    {"report"},
    {"cli"},
    {"__main__"},
]
WEST = {"gradients", "recording", "passes", "callbacks"}
EAST = {"attribution", "metrics"}
# The only packages that some packages may import from.
NARROW = {
    "attribution": {"stores", "results"},
    "recording": {"gradients", "stores"},
}
# The only files of the methods that know how a model is passed data.
FRONT_DOORS = {
    "attribution/attribute.py",
    "attribution/question.py",
    "features/__init__.py",
    "features/attribute.py",
    "features/extraction.py",
}
MAX_ENTRIES, MAX_FILES, MAX_LINES = 13, 16, 300
FILES = sorted(PACKAGE.rglob("*.py"))


def place_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(place: str) -> str:
    return place.split("/")[0].removesuffix(".py")


@functools.cache
def imported_modules(source: str) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def imported_rooms(source: str, place: str) -> set[str]:
    ours = {name for name in imported_modules(source) if name.startswith("tda_lightning.")}
    rooms = {name.split(".")[1] for name in ours} - {room_of(place)}
    return rooms & set().union(*FLOORS)


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def forbidden_imports(source: str, place: str) -> set[str]:
    """Return the packages that a file at a place must not import, and does."""
    room, rooms = room_of(place), imported_rooms(source, place)
    upward = {other for other in rooms if floor_of(other) >= floor_of(room)}
    if place in FRONT_DOORS:
        return upward
    across = rooms & (EAST if room in WEST else WEST if room in EAST | {"features"} else set())
    return upward | across | (rooms - NARROW.get(room, rooms))


@pytest.mark.parametrize("place", [place_of(path) for path in FILES])
def test_imports_point_down_and_never_across(place):
    if place != "__init__.py":
        assert not forbidden_imports((PACKAGE / place).read_text(), place)


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("stores/memory.py", "from tda_lightning.results.scores import Scores"),
        ("gradients/row_recorder.py", "from tda_lightning.results import scores"),
        ("attribution/attribute.py", "from tda_lightning import features"),
        ("passes/queries.py", "from tda_lightning.attribution import TracIn"),
        (
            "attribution/tracin.py",
            "from tda_lightning.gradients.parameter_selection import select_parameters",
        ),
        ("recording/timing.py", "import tda_lightning.results.progress"),
        ("features/similarity.py", "from tda_lightning.passes.queries import record_queries"),
        ("metrics/lds.py", "def late():\n    from tda_lightning.recording import timing"),
    ],
)
def test_a_planted_crossing_is_found(place, statement):
    source = (PACKAGE / place).read_text()
    assert not forbidden_imports(source, place)
    assert forbidden_imports(f"{source}\n{statement}\n", place)


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("pytorch_lightning", "callbacks/"),
        ("lightning", "callbacks/"),
        ("h5py", "stores/hdf5/"),
        ("curvlinops", "full_influence/curvlinops_bindings.py"),
        ("scipy", "full_influence/eigenvalues.py"),
        ("quanda", "applications/quanda.py"),
    ],
)
def test_a_library_is_known_in_one_place(library, home):
    users = {
        place_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported_modules(path.read_text()))
    }
    assert users or library == "lightning"  # its hooks are looked up by name
    assert all(user.startswith(home) for user in users)


def test_packages_are_small():
    entries = {place_of(path).split("/")[0] for path in FILES}
    entries -= {"__init__.py", "__main__.py"}
    assert len(entries) <= MAX_ENTRIES
    sizes = {path.parent: len(list(path.parent.glob("*.py"))) for path in FILES}
    assert max(sizes.values()) <= MAX_FILES


def test_files_are_short():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"split these: {long}"


def test_the_public_names_exist():
    assert all(hasattr(tda_lightning, name) for name in tda_lightning.__all__)
    assert (PACKAGE / "py.typed").exists()


def pictures() -> list[tuple[int, list[str]]]:
    """Return the files of each picture in `contributing.md`, and their number in its text."""
    text = (PACKAGE.parent / "docs" / "contributing.md").read_text()
    result = []
    for count, picture in re.findall(
        r"crosses (?:these )?(\d+) files.*?```text\n(.*?)```", text, re.S
    ):
        folder, files = "", []
        for line in picture.splitlines():
            head, names = line[:28].strip(), line[28:].split("(")[0]
            folder = head or folder
            place = folder.removeprefix("tda_lightning/")
            files += [f"{place}{name.strip()}.py" for name in names.split("->")]
        result.append((int(count), files))
    return result


def test_the_pictures_of_a_step_and_of_a_query_show_files_that_exist():
    assert len(pictures()) == 2
    for count, files in pictures():
        assert len(set(files)) == len(files) == count
        assert not [file for file in files if not (PACKAGE / file).exists()]
