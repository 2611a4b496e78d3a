"""The house: a file imports only from lower floors or its own folder; east never imports west."""

import ast
from pathlib import Path

import pytest

import tda_lightning

PACKAGE = Path(tda_lightning.__file__).parent
FLOORS = [
    {"archives", "arguments", "extras", "random_bits", "undisturbed"}
    | {"step", "points", "linalg", "factors", "recipe"},
    {"layers", "sketcher", "stores", "scores", "losses"},
    {"capture", "projectors", "sample_ids", "order", "batches", "attribution", "metrics"},
    {"rows", "conservation", "coordinates", "targets", "contributions", "snapshots"},
    {"passes"},
    {"callbacks", "queries", "features", "anew"},
    {"api"},
    {"by_features", "parameter_space"},
    {"whole_gradients"},
    {"by_gradients"},
    {"cli"},
]
WEST = {"factors", "layers", "random_bits", "sketcher", "projectors", "capture", "sample_ids"} | {
    "rows",
    "batches",
    "targets",
    "losses",
    "coordinates",
    "conservation",
    "callbacks",
    "passes",
    "queries",
    "features",
    "anew",
}
# Scores are in neither wing: one callback answers by itself.
EAST = {"linalg", "attribution", "metrics"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def imported_rooms(path: Path) -> set[str]:
    ours = {name for name in imported_modules(path) if name.startswith("tda_lightning.")}
    return {name.split(".")[1] for name in ours} - {room_of(path)}


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path != PACKAGE / "__init__.py":
        upstairs = {r for r in imported_rooms(path) if floor_of(r) >= floor_of(room_of(path))}
        assert not upstairs, f"{path.name} imports from its own floor or above: {upstairs}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_wings_do_not_know_each_other(path):
    room = room_of(path)
    other = EAST if room in WEST else WEST if room in EAST else set()
    assert not imported_rooms(path) & other


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("pytorch_lightning", "callbacks"),
        ("lightning", "callbacks"),
        ("h5py", "stores/segments/"),
        ("curvlinops", "parameter_space/operators.py"),
        ("scipy", "parameter_space/operators.py"),
    ],
)
def test_a_library_is_known_in_one_place(library, home):
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == library for name in imported_modules(path))
    }
    assert all(user.startswith(home) for user in users)


def test_every_file_is_a_small_room():
    long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 300}
    assert not long, f"split these: {long}"


def test_the_public_names_are_there():
    assert all(hasattr(tda_lightning, name) for name in tda_lightning.__all__)
    assert (PACKAGE / "py.typed").exists()
