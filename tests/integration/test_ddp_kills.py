"""Training by two processes resumes after kills at random moments."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_processes_killed_thirty_times_leave_the_run_of_an_undisturbed_training(tmp_path, request):
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
            output, _ = process.communicate(timeout=1500)
        finally:
            # Always end the script and its child processes, which are one process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
