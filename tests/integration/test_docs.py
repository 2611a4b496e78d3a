"""Every documented Python block runs, in order, in one folder, after those of the README."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages whose blocks take half a minute.
LONG_PAGES = {"how-to-choose.md", "report.md"}
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# Words in a block, and the package that it needs.
OPTIONAL = {
    "ConjugateGradient": "curvlinops",
    "spotlight": "renumics",
    "TensorBoardLogger": "tensorboard",
    "captum": "captum",
    "TRAKer": "trak",
    "dattri": "dattri",
    "webdataset": "webdataset",
    "litdata": "litdata",
    "load_dataset": "datasets",
}


def blocks_of(path: Path) -> list[tuple[int, str]]:
    """Return the first line and the code of each Python block."""
    text = path.read_text()
    matches = re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match.group(1)) for match in matches]


def can_run(code: str) -> bool:
    """Return whether the extra that a block needs is installed; CI installs all of them."""
    return all(find_spec(package) for word, package in OPTIONAL.items() if word in code)


def run_blocks(path: Path, names: dict) -> dict:
    for line, code in filter(lambda block: can_run(block[1]), blocks_of(path)):
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
    return names


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory):
    """Return the folder and the names after running the README's blocks."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run_blocks(ROOT / "README.md", {"__name__": "reader"})


def test_the_readme_runs(after_readme):
    folder, names = after_readme
    assert names["scores"].values.shape == (3, 1500)
    assert (folder / "scores.npz").exists()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in LONG_PAGES else ()) for page in PAGES],
)
def test_a_page_runs(page, after_readme, monkeypatch):
    folder, names = after_readme
    monkeypatch.chdir(folder)
    run_blocks(ROOT / "docs" / page, dict(names))


def test_recording_takes_two_lines_and_querying_one():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 3


def test_links_in_the_pages_point_to_existing_files():
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} points to {target}"
