"""Recording and attribution on an emulated device give the CPU's results, with all tensors on it.

Not covered: iterative solvers, and `EKFAC`, since curvlinops does not support a device that is
written in Python. Recorded convolutions, attention and recurrent
layers are not either: there, torch replaces them by operations that neither a CPU nor a GPU has.
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
pytestmark = [
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch does not support devices that are written in Python",
    ),
    pytest.mark.xdist_group("emulated device"),  # the subprocess runs once
]


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


@pytest.mark.parametrize("optimizer", names_in("OPTIMIZERS"))
def test_a_recorded_step_makes_one_copy_in_the_background_and_waits_for_nothing(optimizer):
    copied = ["copy from the device, in the background"]
    assert answer(f"transfers with {optimizer}") == f"[] {copied} 27", result().stderr[-3000:]
