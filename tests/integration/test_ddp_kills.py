"""Kills at random moments of a training by two processes: it resumes as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_processes_killed_fifty_times_leave_the_run_of_an_undisturbed_training(tmp_path, request):
    command = [sys.executable, "ddp_killing.py", str(tmp_path)]
    with subprocess.Popen(
        command,
        cwd=request.path.parents[1] / "support",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=500)
        finally:
            # Whatever happened: the script and what it has forked are one group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
