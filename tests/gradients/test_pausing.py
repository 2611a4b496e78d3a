"""Extra passes of one capture are hidden from the model's other captures, and from no one else."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lightning_models import IndexedVectors, Plain, loader, mlp, quiet_trainer, vectors
from torch import nn

from tda_lightning import GradientRecorder, HDF5Store, Identity, TracIn, attribute
from tda_lightning.gradients.capture import pausing
from tda_lightning.gradients.capture.pausing import PauseSwitch

DATA = vectors()


@pytest.fixture
def attached():
    """Return a function that attaches a switch to a model until the end of the test."""
    switches = []

    def attach(model):
        switches.append(PauseSwitch(model))
        switches[-1].attach()
        return switches[-1]

    yield attach
    for switch in switches:
        switch.detach()


def test_all_captures_of_a_model_are_paused_and_those_of_other_models_are_not(attached):
    model = mlp()
    first, second, other = attached(model), attached(model), attached(mlp())
    whole = attached(nn.Sequential(model))  # It contains the model's layers.
    with first.paused():
        paused = [bool(switch.pauses) for switch in (first, second, other, whole)]
    assert paused == [True, True, False, True]
    assert not any(bool(switch.pauses) for switch in (first, second, other, whole))


def test_only_the_others_are_paused_during_an_extra_pass_even_inside_a_pause(attached):
    model = mlp()
    first, second = attached(model), attached(model)
    with second.paused(), first.others_paused():
        assert (bool(first.pauses), bool(second.pauses)) == (False, True)
        with first.paused():
            assert (bool(first.pauses), bool(second.pauses)) == (True, True)
        assert (bool(first.pauses), bool(second.pauses)) == (False, True)
    assert (bool(first.pauses), bool(second.pauses)) == (False, False)


def test_a_capture_that_has_ended_is_not_paused(attached):
    model = mlp()
    first, second = attached(model), attached(model)
    second.detach()
    with first.paused():
        assert not bool(second.pauses)
    del second
    gc.collect()
    assert first in pausing._attached


def test_an_interrupt_in_a_pause_leaves_nothing_behind(attached):
    switch = attached(mlp())
    with pytest.raises(KeyboardInterrupt), switch.paused():
        raise KeyboardInterrupt
    assert not bool(switch.pauses)


class InterruptedSet(set):
    """A set in which an interrupt arrives right after an element was added."""

    def add(self, element):
        super().add(element)
        raise KeyboardInterrupt


def test_an_interrupt_while_a_pause_begins_leaves_nothing_behind(attached):
    switch = attached(mlp())
    switch.pauses = InterruptedSet()
    with pytest.raises(KeyboardInterrupt), switch.paused():
        pass
    assert not bool(switch.pauses)


def test_a_model_in_two_threads_at_once_is_refused(attached):
    model = mlp()
    attached(model)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match=r"queried by another thread.*copy\.deepcopy"):
            pool.submit(PauseSwitch(model).attach).result()
        switch = PauseSwitch(copy.deepcopy(model))
        pool.submit(switch.attach).result()
        switch.detach()


def test_a_thread_that_has_ended_blocks_nobody():
    model, switches = mlp(), []

    def attach_and_die():
        switches.append(PauseSwitch(model))
        switches[0].attach()

    thread = threading.Thread(target=attach_and_die)
    thread.start()
    thread.join()
    again = PauseSwitch(model)
    again.attach()
    again.detach()


def new_model():
    return Plain(mlp(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))


def recorded(path, model):
    recorder = GradientRecorder(path, projector=Identity(), sample_ids=lambda b: b[0][:, 0].long())
    quiet_trainer(recorder).fit(model, loader(IndexedVectors(), shuffle=False))
    return model


def test_threads_with_models_of_their_own_get_the_right_answers(tmp_path):
    model = recorded(tmp_path / "run", new_model())
    queries = DATA[:3]
    models = [copy.deepcopy(model) for _ in range(4)]
    expected = attribute(tmp_path / "run", model, queries, method=TracIn(), progress=False).values

    def ask(own):
        run = HDF5Store.open(tmp_path / "run")
        answers = [
            attribute(run, own, queries, method=TracIn(), progress=False).values for _ in range(10)
        ]
        return all(torch.allclose(answer, expected, rtol=1e-4) for answer in answers)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, models)) == [True] * 4


def test_two_trainings_in_two_threads_are_recorded_as_one_alone(tmp_path):
    recorded(tmp_path / "alone", new_model())
    expected = [step.sketch for step in HDF5Store.open(tmp_path / "alone")]
    with ThreadPoolExecutor(2) as pool:
        # Models are made before: all threads share torch's generator.
        list(pool.map(recorded, (tmp_path / "0", tmp_path / "1"), [new_model(), new_model()]))
    for name in ("0", "1"):
        found = [step.sketch for step in HDF5Store.open(tmp_path / name)]
        assert all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, expected, strict=True))
