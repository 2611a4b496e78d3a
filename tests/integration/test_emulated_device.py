"""Recording and attribution on an emulated device give the CPU's results, with all tensors on it.

Not covered: iterative solvers, and `EKFAC`, since curvlinops does not support a device that is
written in Python; fused recurrent layers.
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = [
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch does not support devices that are written in Python",
    ),
    pytest.mark.xdist_group("emulated device"),  # the subprocess runs once
    pytest.mark.slow,
]


def names_in(table, script="emulated_device_cases.py"):
    """Return the keys of a table in a script without running it; a missing answer then fails."""
    tables = [
        node
        for node in ast.walk(ast.parse((SUPPORT / script).read_text()))
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == table
    ]
    return [key.value for key in tables[0].value.keys]


@functools.cache
def result(script="emulated_device_cases.py", *arguments):
    command = [sys.executable, "-W", "ignore", script, *(arguments or ["cuda"])]
    return subprocess.run(command, cwd=SUPPORT, capture_output=True, text=True, check=False)


def answer(name, *command):
    lines = (line.split(": ", 1) for line in result(*command).stdout.splitlines() if ": " in line)
    return dict(lines).get(name, "no answer")


@pytest.mark.parametrize("name", names_in("CASES"))
def test_a_device_gives_the_results_of_the_cpu(name):
    assert answer(name) == "equal", result().stderr[-3000:]


@pytest.mark.parametrize("name", names_in("CASES"))
def test_a_device_without_double_precision_gives_the_results_of_the_cpu(name):
    command = ("emulated_device_cases.py", "apple")
    assert answer(name, *command) == "equal", result(*command).stderr[-3000:]


@pytest.mark.parametrize("kind", ["cuda", "apple"])
@pytest.mark.parametrize("name", names_in("USES", "emulated_device_uses.py"))
def test_runs_are_used_on_a_device_as_on_the_cpu(name, kind):
    command = ("emulated_device_uses.py", kind)
    assert answer(name, *command) == "equal", result(*command).stderr[-3000:]


# One of each kind; without names, the script records every model of the zoo.
MODELS = ["peft-lora", "gpt2-padded", "llama-tied", "mamba", "bert-mlm", "t5", "swin", "resnet"]
MODELS += ["segformer", "whisper", "clip"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_zoo_has_the_rows_of_the_cpu(name):
    pytest.importorskip("transformers")
    command = ("emulated_device_zoo.py", "apple", *MODELS)
    assert answer(name, *command) == "equal", result(*command).stderr[-3000:]


@pytest.mark.parametrize("name", names_in("MIXED_DEVICES"))
def test_the_device_refuses_tensors_of_another(name):
    assert "same device" in answer(name) or "not supported" in answer(name)


@pytest.mark.parametrize("optimizer", names_in("OPTIMIZERS"))
def test_eight_recorded_steps_make_one_copy_and_wait_for_nothing_else(optimizer):
    copied = ["copy from the device, waited for"]  # With CUDA, it is in the background.
    assert answer(f"transfers with {optimizer}") == f"[] {copied} 30", result().stderr[-3000:]
