"""Every documented Python block runs, in order, in one folder, after those of the README."""

import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("documented code")  # the README runs once
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages whose blocks take half a minute.
LONG_PAGES = {
    "api/evaluate.md",
    "how-to-choose.md",
    "language-models.md",
    "report.md",
    "uses/labels.md",
    "uses/unlearn.md",
}
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
PUBLIC_PACKAGES = [
    "applications",
    "attribution",
    "callbacks",
    "features",
    "full_influence",
    "metrics",
    "report",
    "report.plots",
    "results",
    "stores",
]
# Words in a block, and the package that it needs.
OPTIONAL = {
    "ConjugateGradient": "scipy",
    "EKFAC": "curvlinops",
    "quanda": "quanda",
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


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # dattri imports it
@pytest.mark.filterwarnings("ignore:Input Tensor . did not:UserWarning")  # captum
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


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MyST form them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


@pytest.mark.parametrize("page", ["../README.md", *PAGES])
def test_links_within_the_pages_lead_somewhere(page):
    path = DOCS / page
    links = re.findall(r"\]\(([^):#]*)(?:#([^)]+))?\)", path.read_text())
    for target, anchor in links:
        there = path.parent / target if target else path
        assert there.exists(), f"{page} links to {target}"
        there = ROOT / "README.md" if there.name == "index.md" else there  # which includes it
        assert not anchor or anchor in anchors_of(there), f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in PUBLIC_PACKAGES)])
def test_functions_that_are_defaults_have_a_name(package):
    module = import_module(f"tda_lightning{package}")
    functions = [
        (name, parameter.name)
        for name in module.__all__
        if callable(getattr(module, name))
        for parameter in inspect.signature(getattr(module, name)).parameters.values()
        if getattr(parameter.default, "__name__", "") == "<lambda>"
    ]
    assert functions == []


def test_pictures_have_a_text_for_those_who_do_not_see_them():
    for page in ["../README.md", *PAGES]:
        texts = re.findall(r"!\[([^\]]*)\]\(", (DOCS / page).read_text())
        assert all(len(text) > 30 for text in texts), page


@pytest.mark.parametrize(
    "package",
    ["", *(f".{name}" for name in PUBLIC_PACKAGES)],
    ids=["tda_lightning", *PUBLIC_PACKAGES],
)
def test_every_public_name_is_in_the_api_reference(package):
    names = import_module(f"tda_lightning{package}").__all__
    reference = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    assert [name for name in names if not re.search(rf"\b{name}\b", reference)] == []
