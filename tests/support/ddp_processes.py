"""Run trainings of two processes, which write what they found into a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def train(folder, *trainings, fails=False):
    """Train by two processes, in a folder for each name, with these settings."""
    command = [sys.executable, "ddp_training.py", str(folder), json.dumps(trainings)]
    environment = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
    result = subprocess.run(
        command, cwd=SUPPORT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())
