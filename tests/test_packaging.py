"""The metadata of the package: ranges, versions of Python, extras."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=lambda each: each.name)
def test_the_tested_version_of_a_dependency_is_in_the_declared_range(requirement):
    assert requirement.specifier.contains(version(requirement.name).split("+")[0])


def test_the_pattern_of_the_script_for_bounds_finds_every_lower_bound():
    bounds = dict(re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.]+)', TEXT))
    assert {f">={bounds[each.name]}" for each in DEPENDENCIES} == {
        str(each.specifier) for each in DEPENDENCIES
    }
    assert "grep -oE '\"[A-Za-z0-9_-]+>=[0-9.]+'" in (ROOT / ".ci/bounds").read_text()


def test_the_versions_of_python_are_those_of_the_readme():
    listed = re.findall(r"Python :: 3\.(\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">=3.{listed[0]}"
    assert f"Python 3.{listed[0]} to 3.{listed[-1]}" in (ROOT / "README.md").read_text()


def test_the_readme_names_every_extra_that_users_choose():
    readme = (ROOT / "README.md").read_text()
    for extra in PROJECT["optional-dependencies"].keys() - {"dev", "docs"}:
        assert re.search(rf"\b{extra}\b", readme), extra


def test_the_package_is_typed_and_brings_its_licence():
    assert (ROOT / "tda_lightning/py.typed").exists()
    assert [(ROOT / name).exists() for name in PROJECT["license-files"]] == [True]


@pytest.mark.slow
def test_lightning_is_imported_when_a_callback_is_used():
    """It takes ten times as long to import as this package, and the command line needs none."""
    code = (
        "import sys, tda_lightning, tda_lightning.cli\n"
        "assert not {'pytorch_lightning', 'lightning'} & sys.modules.keys()\n"
        "assert tda_lightning.GradientRecorder is tda_lightning.callbacks.GradientRecorder"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_of_the_package_are_refused():
    import tda_lightning

    with pytest.raises(AttributeError, match="no attribute `GradientRecoder`"):
        tda_lightning.GradientRecoder  # noqa: B018
