"""A segment is written once, whatever interrupts the main thread."""

import linecache
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores.contract import RECIPE, filled, make_steps, same
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


def lines_of_sinks(frame, on_line):
    """Call a function before each line of some functions that this thread runs."""
    names = {"_start_writing", "seal", "finish", "result", "shards.add"}

    def local(frame, event, arg):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # At the end of `with`, a trace function can raise where no signal handler can.
        if event == "line" and not line.startswith("with "):
            on_line()
        return local

    code = frame.f_code
    called = {code.co_name, f"{Path(code.co_filename).stem}.{code.co_name}"}
    return local if called & names else None


def record_with_interrupt(path, steps, at):
    """Raise at a line, then seal as after an interrupted training; return the number of lines."""
    store = HDF5Store(path, segment_bytes=100)  # A segment for every step or two.
    store.begin(RECIPE)
    count = 0

    def on_line():
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: lines_of_sinks(frame, on_line))
    try:
        for step in steps:
            store.append(step)
        store.seal()
    except KeyboardInterrupt:
        sys.settrace(before)
        store.seal()
    finally:
        sys.settrace(before)
    assert all(map(same, store, HDF5Store.open(path)))
    return count, list(store)


@pytest.mark.slow
def test_an_interrupt_at_any_line_neither_loses_a_step_nor_writes_one_twice(tmp_path):
    steps = make_steps(3)
    total, recorded = record_with_interrupt(tmp_path / "0", steps, None)
    assert len(recorded) == len(steps)
    assert len(list((tmp_path / "0").glob("segment-*.h5"))) == 2
    lengths = []
    for at in range(1, total + 1):
        path = tmp_path / str(at)
        _, recorded = record_with_interrupt(path, steps, at)
        assert all(map(same, recorded, steps[: len(recorded)]))
        lengths.append(len(recorded))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == len(steps)


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
