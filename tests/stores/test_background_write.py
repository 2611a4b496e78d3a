"""A segment is written once, whatever interrupts the main thread."""

import subprocess
import sys
import threading

import pytest
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores.contract import filled, make_steps, same
from tda_lightning.stores.hdf5 import segment_writer
from tda_lightning.stores.hdf5.background_write import BackgroundWrite


def test_a_write_that_was_started_runs_once():
    calls = []
    write = BackgroundWrite(lambda: calls.append(threading.current_thread().name) or "segment")
    write.start()
    assert write.result() == write.result() == "segment"
    assert calls == ["tda_lightning"]


def test_a_write_that_never_started_runs_in_the_calling_thread():
    write = BackgroundWrite(lambda: threading.current_thread().name)
    assert write.result() == "MainThread"


def test_an_error_of_the_thread_is_raised_by_the_result():
    def fail():
        raise OSError(28, "No space left on device")

    write = BackgroundWrite(fail)
    write.start()
    with pytest.raises(OSError, match="No space left"):
        write.result()


@pytest.mark.parametrize("is_started", [False, True])
def test_an_interrupt_while_the_thread_starts_loses_no_step(tmp_path, monkeypatch, is_started):
    """As a signal handler that raises: the same segment must not be written twice at once."""
    original = BackgroundWrite.start

    def interrupted(write):
        monkeypatch.setattr(BackgroundWrite, "start", original)
        if is_started:
            original(write)
        raise KeyboardInterrupt

    monkeypatch.setattr(BackgroundWrite, "start", interrupted)
    store = HDF5Store(tmp_path / "run", segment_bytes=20_000)
    with pytest.raises(SystemExit):  # Lightning exits after an interrupt.
        quiet_trainer(GradientRecorder(store), max_epochs=100).fit(Plain(mlp()), loader(vectors()))
    run = HDF5Store.open(tmp_path / "run")
    assert [step.index for step in run] == list(range(len(run)))
    assert len(run) > 5
    assert all((step.sketch != 0).any(dim=1).all() for step in run)


@pytest.mark.skipif(sys.platform == "win32", reason="no descriptors are inherited there")
def test_a_process_that_inherits_an_open_segment_does_not_stop_the_recording(tmp_path, monkeypatch):
    workers = []
    write_audits = segment_writer._write_audits

    def fork_meanwhile(group, steps):
        # Like a loader's worker that is forked now: it has a copy of every open file.
        workers.append(subprocess.Popen(["sleep", "60"], close_fds=False))
        write_audits(group, steps)

    monkeypatch.setattr(segment_writer, "_write_audits", fork_meanwhile)
    try:
        store = filled(HDF5Store(tmp_path / "run"), steps := make_steps(4))
        assert len(workers) == 2
        assert all(map(same, store, steps))
        assert all(map(same, HDF5Store.open(tmp_path / "run"), steps))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
