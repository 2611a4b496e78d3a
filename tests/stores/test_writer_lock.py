"""Only one training at a time writes to a run; the lock of a dead process blocks nobody."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import GradientRecorder, HDF5Store
from tda_lightning.stores.contract import RECIPE, make_steps
from tda_lightning.stores.integrity import lock_owner, writer_lock
from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.integrity.lock_owner import Owner, read_owner
from tda_lightning.stores.integrity.writer_lock import LOCK, RunInUseError, WriterLock


@pytest.fixture
def sleeper():
    """Another process that is alive."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def owner_of(process):
    this = Owner.this_process("their-run")
    return replace(this, process=process.pid, born=lock_owner._birth_of(process.pid))


def write_lock(folder, owner):
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))


def run_of(path, count=4):
    store = HDF5Store(path)
    store.begin(RECIPE)
    for step in make_steps(count):
        store.append(step)
    store.seal()
    return store


def test_a_living_process_keeps_others_away(tmp_path, sleeper):
    run_of(tmp_path / "run").release()
    write_lock(tmp_path / "run", owner_of(sleeper))
    weights = {}
    for attempt in (
        lambda store: store.resume(4),
        lambda store: store.clear(),
        lambda store: store.keep_weights(3, weights),
    ):
        with pytest.raises(RunInUseError, match=rf"process {sleeper.pid} on host .*'their-run'"):
            attempt(HDF5Store(tmp_path / "run"))
    assert len(HDF5Store.open(tmp_path / "run")) == 4


def test_another_thread_cannot_take_the_lock_while_its_holder_runs(tmp_path):
    """Two trainings in two threads, as of a search over hyper-parameters, with one path."""
    with ThreadPoolExecutor(1) as pool:
        first = run_of(tmp_path / "run")  # Held by the main thread.
        taken = pool.submit(HDF5Store(tmp_path / "run").resume, 4)
        with pytest.raises(RunInUseError, match="is being written by another training"):
            taken.result()
        first.append(replace(make_steps(1)[0], index=50))
        first.seal()
        first.release()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run_of, tmp_path / "other").result()
    HDF5Store(tmp_path / "other").resume(4)  # The thread that held it has ended.
    assert ended.run_id
    assert [step.index for step in HDF5Store.open(tmp_path / "run")][-1] == 50


@pytest.mark.skipif(sys.platform == "win32", reason="there are no forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_fork_of_the_writer_writes_nothing_and_waits_for_nothing(tmp_path):
    store = run_of(tmp_path / "run")
    store.append(replace(make_steps(1)[0], index=50))
    child = os.fork()
    if child == 0:
        try:
            store.seal()
        except RunInUseError as error:
            store.release()
            os._exit(42 if "is a fork of process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    store.seal()
    assert len(HDF5Store.open(tmp_path / "run")) == 5


def test_a_failure_to_write_the_lock_names_the_folder(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreFileError, match=r"run` cannot be written: Input/output error"):
        HDF5Store(tmp_path / "run").begin(RECIPE)


def test_a_training_refuses_to_begin_beside_another(tmp_path, sleeper):
    write_lock(tmp_path / "run", owner_of(sleeper))
    trainer = quiet_trainer(GradientRecorder(tmp_path / "run", existing="replace"))
    with pytest.raises(RunInUseError, match="written by another training"):
        trainer.fit(Plain(mlp()), loader(vectors()))
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.parametrize("state", ["dead", "unreaped", "reused", "empty", "damaged"])
def test_the_lock_of_a_dead_process_does_not_block(tmp_path, sleeper, state):
    run_of(tmp_path / "run").release()
    write_lock(tmp_path / "run", owner_of(sleeper))
    lock = tmp_path / "run" / LOCK
    if state in ("dead", "unreaped"):
        sleeper.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    if state == "dead":
        sleeper.wait()
    elif state == "reused":
        write_lock(tmp_path / "run", replace(owner_of(sleeper), born="1"))
    elif state in ("empty", "damaged"):
        lock.write_text("" if state == "empty" else '{"host": 3}')
        os.utime(lock, (0, 0))
    store = HDF5Store(tmp_path / "run")
    store.resume(4)
    assert read_owner(lock).process == os.getpid()
    store.release()
    assert not lock.exists()


@pytest.mark.parametrize("is_alive", [True, False])
def test_an_owner_on_another_machine_is_alive_if_it_renews_its_lock(
    tmp_path, monkeypatch, is_alive
):
    lock = tmp_path / LOCK
    there = replace(Owner.this_process("theirs"), host="there", machine="another", process=1)
    write_lock(tmp_path, there)
    monkeypatch.setattr(writer_lock, "STALE_SECONDS", 30.0)

    def sleep(seconds):
        age = 1 if is_alive else 40
        os.utime(lock, (time.time() - age, time.time() - age))

    monkeypatch.setattr(writer_lock.time, "sleep", sleep)
    if is_alive:
        with pytest.raises(RunInUseError, match="host 'there'"):
            WriterLock().acquire(tmp_path, "mine")
    else:
        monkeypatch.setattr(writer_lock, "_time_of", lambda file: 1)
        taken = WriterLock()
        taken.acquire(tmp_path, "mine")
        assert read_owner(lock).run == "mine"


def test_a_store_that_has_lost_its_lock_writes_nothing_more(tmp_path):
    """The later store of one process takes the lock; a segment of the earlier is not sealed."""
    first = run_of(tmp_path / "run")
    second = HDF5Store(tmp_path / "run")
    second.resume(4)
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    first.append(replace(make_steps(1)[0], index=20))
    with pytest.raises(RunInUseError, match="written by another training"):
        first.seal()
    with pytest.raises(RunInUseError):
        first.keep_weights(5, {})
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == names
    first.release()
    assert (tmp_path / "run" / LOCK).exists(), "only the owner releases a lock"


@pytest.mark.parametrize("taker", ["still writes", "has ended"])
def test_a_training_that_loses_the_lock_goes_on_without_recording(tmp_path, taker):
    other = HDF5Store(tmp_path / "run")

    class Taken(Plain):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 3:
                recorder.store.seal()
                other.resume(2)
                if taker == "has ended":
                    other.release()

    recorder = GradientRecorder(tmp_path / "run")
    trainer = quiet_trainer(recorder)
    with pytest.warns(UserWarning, match="cannot be written any more .*training"):
        trainer.fit(Taken(mlp()), loader(vectors()))
    assert trainer.global_step == 6
    assert [step.index for step in HDF5Store.open(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize("end", ["end", "error"])
def test_the_lock_is_released_when_a_training_ends(tmp_path, end):
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if end == "error" and self.trainer.global_step == 3:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(GradientRecorder(tmp_path / "run"))
    if end == "error":
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(Fails(mlp()), loader(vectors()))
    else:
        trainer.fit(Fails(mlp()), loader(vectors()))
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_forgotten_store_releases_its_lock(tmp_path):
    store = run_of(tmp_path / "run")
    assert (tmp_path / "run" / LOCK).exists()
    del store
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_processes_of_one_training_share_its_lock(tmp_path):
    first, second = HDF5Store(tmp_path / "run"), HDF5Store(tmp_path / "run")
    first.join(0, 2)
    first.begin(replace(RECIPE, ranks=2))
    second.join(1, 2)
    second.resume(0)
    for store in (first, second):
        for step in make_steps(3):
            store.append(step)
        store.seal()
    assert len(HDF5Store.open(tmp_path / "run")) == 3
    second.release()
    assert (tmp_path / "run" / LOCK).exists()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    os.utime(tmp_path / "mine", (0, 0))
    WriterLock().acquire(tmp_path, "run")
    assert (tmp_path / "mine").read_text() == "precious"
    assert isinstance(RunInUseError(""), StoreFileError)


@pytest.mark.parametrize("content", ["", "[" * 100_000], ids=["empty", "deep"])
def test_a_damaged_lock_from_the_future_is_not_waited_for(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    os.utime(tmp_path / LOCK, (time.time() + 1e8,) * 2)
    taken = WriterLock()
    taken.acquire(tmp_path, "mine")
    assert read_owner(tmp_path / LOCK).run == "mine"


def test_a_dead_owner_is_found_dead_although_a_clock_was_set_back(tmp_path, monkeypatch):
    there = replace(Owner.this_process("theirs"), host="there", machine="another", process=1)
    write_lock(tmp_path, there)
    os.utime(tmp_path / LOCK, (time.time() + 1e8,) * 2)
    monkeypatch.setattr(writer_lock, "STALE_SECONDS", 0.3)
    taken = WriterLock()
    taken.acquire(tmp_path, "mine")
    assert read_owner(tmp_path / LOCK).run == "mine"


def test_a_folder_in_place_of_the_lock_is_one_error(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(StoreFileError, match=r"lock` cannot be replaced: .*Delete it"):
        WriterLock().acquire(tmp_path, "mine")
    assert [file.name for file in tmp_path.iterdir()] == [LOCK]
