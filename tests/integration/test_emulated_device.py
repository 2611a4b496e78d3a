"""Recording and attribution on an emulated device give the CPU's results, with all tensors on it.

Not covered: solvers with forward-mode differentiation, and `EKFAC`. torch and curvlinops do not
support them on a device that is written in Python.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SUPPORT = Path(__file__).parents[1] / "support"
SCRIPT = SUPPORT / "emulated_device_cases.py"
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch does not support devices that are written in Python",
)


def names_in(table):
    """Return the keys of a table in the script without running it; a missing answer then fails."""
    tables = [
        node
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == table
    ]
    return [key.value for key in tables[0].value.keys]


@functools.cache
def result():
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    return subprocess.run(command, cwd=SUPPORT, capture_output=True, text=True, check=False)


def answer(name):
    lines = (line.split(": ", 1) for line in result().stdout.splitlines() if ": " in line)
    return dict(lines).get(name, "no answer")


@pytest.mark.parametrize("name", names_in("CASES"))
def test_a_device_gives_the_results_of_the_cpu(name):
    assert answer(name) == "equal", result().stderr[-3000:]


@pytest.mark.parametrize("name", names_in("MIXED_DEVICES"))
def test_the_device_refuses_tensors_of_another(name):
    assert "same device" in answer(name) or "not supported" in answer(name)
