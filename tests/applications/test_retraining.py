"""Retrainings equal trainings by hand; they continue, and run in several processes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
import pytest
import retrained
import torch
from lightning_models import loader, quiet_trainer, vectors
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    WeightedRandomSampler,
)
from unchecked_calls import type_checks_disabled

from tda_lightning import GradientRecorder
from tda_lightning.applications import (
    Plan,
    check_removal,
    leave_out,
    random_subsets,
    retrain,
    same_data,
)
from tda_lightning.applications.retraining.runner import weighted_loader

FUNCTIONS = {
    "model": retrained.new_model,
    "loader": retrained.train_loader,
    "trainer": retrained.new_trainer,
    "measure": retrained.query_losses,
    "progress": False,
}


def by_hand(kept, seed):
    torch.manual_seed(seed)
    model = retrained.new_model()
    retrained.new_trainer().fit(model, loader(Subset(vectors(), kept)))
    with torch.no_grad():
        return retrained.query_losses(model).double()


def test_each_training_is_the_one_by_hand():
    results = retrain(leave_out(13, [[], [2, 5]], seed=3), **FUNCTIONS)
    rest = [i for i in range(13) if i not in (2, 5)]
    expected = torch.stack([by_hand(list(range(13)), 3), by_hand(rest, 3)])
    torch.testing.assert_close(results.values, expected)
    assert results.to_pandas().kept.tolist() == [13, 11]


def test_an_interrupted_plan_continues_where_it_stopped(tmp_path):
    plan, calls = random_subsets(13, 3), []

    def measure(model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return retrained.query_losses(model)

    changed = {**FUNCTIONS, "measure": measure}
    with pytest.raises(KeyboardInterrupt):
        retrain(plan, folder=tmp_path, **changed)
    results = retrain(plan, folder=tmp_path, **changed)
    assert len(calls) == 2 + 2
    torch.testing.assert_close(results.values, retrain(plan, **FUNCTIONS).values)
    with pytest.raises(FileExistsError, match="another plan"):
        retrain(random_subsets(13, 3, seed=1), folder=tmp_path, **changed)


def test_results_of_other_functions_are_not_mixed(tmp_path):
    retrain(same_data(13, [0]), folder=tmp_path, **FUNCTIONS)
    with pytest.raises(FileExistsError, match="with another `measure`"):
        retrain(
            same_data(13, [0]), folder=tmp_path, **{**FUNCTIONS, "measure": retrained.no_losses}
        )


def test_measurements_of_another_number_are_refused_at_once(tmp_path):
    lengths = iter([3, 2])
    changed = {**FUNCTIONS, "measure": lambda model: torch.zeros(next(lengths))}
    with pytest.raises(ValueError, match="2 values after training 1, and 3"):
        retrain(same_data(13, [0, 1, 2]), folder=tmp_path, **changed)


def test_the_folder_of_a_recorded_run_is_refused(tmp_path):
    recorder = GradientRecorder(tmp_path / "run.tda")
    quiet_trainer(recorder).fit(retrained.new_model(), retrained.train_loader())
    before = sorted((tmp_path / "run.tda").iterdir())
    with pytest.raises(FileExistsError, match="` holds a recorded run; expected a folder"):
        retrain(same_data(13, [0]), folder=tmp_path / "run.tda", **FUNCTIONS)
    assert sorted((tmp_path / "run.tda").iterdir()) == before


def test_measurements_that_are_nan_are_named_once():
    values = iter([[0.1, 0.2], [0.3, torch.nan], [torch.nan, torch.nan]])
    changed = {**FUNCTIONS, "measure": lambda model: torch.tensor(next(values))}
    with pytest.warns(UserWarning, match="NaN after 2 of 3") as caught:
        results = retrain(same_data(13, [0, 1, 2]), **changed)
    (message,) = [str(w.message) for w in caught if "NaN" in str(w.message)]
    assert "first after number 1:" in message
    assert results.values.isnan().any(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["model", "trainer"])
def test_models_and_trainers_of_an_earlier_training_are_refused(name):
    same = FUNCTIONS[name]()
    with pytest.raises(ValueError, match=f"`{name}` returned the `.*` of an earlier training"):
        retrain(same_data(13, [0, 1]), **{**FUNCTIONS, name: lambda: same})


@pytest.mark.parametrize("name", ["model", "loader", "trainer"])
def test_objects_in_place_of_functions_are_refused(name):
    wrong = {**FUNCTIONS, name: FUNCTIONS[name]()}
    with type_checks_disabled(), pytest.raises(ValueError, match=f"`{name}` is a .* a function"):
        retrain(same_data(13, [0]), **wrong)


def test_functions_that_other_processes_cannot_import_are_refused():
    with pytest.raises(ValueError, match=r"cannot import `measure`, which is <function .*lambda"):
        retrain(same_data(13, [0, 1]), processes=2, **{**FUNCTIONS, "measure": lambda model: model})


def test_the_random_numbers_of_the_caller_stay_the_same():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    retrain(same_data(13, [0]), **FUNCTIONS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_a_failing_training_ends_the_others_and_keeps_their_results(tmp_path):
    failing = {**FUNCTIONS, "measure": retrained.losses_unless_odd}
    plan = same_data(13, seeds=[0, 2, 3, *range(100, 1000, 2)])
    with pytest.raises(RuntimeError, match="Training 2 of the plan failed: ArithmeticError: odd"):
        retrain(plan, folder=tmp_path, processes=2, **failing)
    assert 1 <= len(list(tmp_path.glob("0*.npy"))) < 200  # of 453 in the plan


@pytest.mark.slow
def test_a_killed_retraining_leaves_no_processes_and_continues(tmp_path):
    folder, support = tmp_path / "results", Path(retrained.__file__).parent
    script = tmp_path / "script.py"
    script.write_text(
        "import retrained\n"
        "from tda_lightning.applications import retrain, same_data\n"
        "if __name__ == '__main__':\n"
        "    print(retrain(same_data(13, range(200)), model=retrained.new_model, "
        "loader=retrained.train_loader, trainer=retrained.new_trainer, "
        f"measure=retrained.query_losses, folder={str(folder)!r}, processes=2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(support), *sys.path])}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=DEVNULL)
    wait_until(lambda: len(list(folder.glob("0*.npy"))) >= 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in children))
    finished = sorted(path.name for path in folder.glob("0*.npy"))
    assert 3 <= len(finished) < 200
    for path in folder.glob("0*.npy"):
        assert len(np.load(path)) == 5


def wait_until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_several_processes_give_the_same_results():
    plan = same_data(13, seeds=[0, 1, 2])
    expected = retrain(plan, **FUNCTIONS).values
    torch.testing.assert_close(retrain(plan, processes=2, **FUNCTIONS).values, expected)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"batch_sampler": BatchSampler(RandomSampler(range(13)), 4, False)}, "`batch_sampler=`"),
        ({"sampler": RandomSampler(range(13), replacement=True)}, "with replacement"),
        ({"sampler": RandomSampler(range(13), num_samples=7)}, "another number of samples"),
        ({"sampler": WeightedRandomSampler([1.0] * 13, 13)}, "`WeightedRandomSampler`"),
    ],
    ids=["batch sampler", "replacement", "fewer", "weights"],
)
def test_loaders_whose_order_would_be_another_are_refused(settings, kind):
    data = DataLoader(vectors(n=13), **settings)
    with pytest.raises(ValueError, match=f"`loader` returned a loader with a.*{kind}"):
        weighted_loader(data, torch.ones(13))


def test_unequal_weights_draw_in_proportion():
    part = weighted_loader(loader(vectors()), torch.tensor([3.0, 1.0, 0.0, 0.0, 2.0] + [0.0] * 8))
    assert isinstance(part.sampler, WeightedRandomSampler)
    assert part.sampler.weights.tolist() == [3, 1, 2]
    assert part.dataset.indices == [0, 1, 4]


def test_subsets_are_random_and_of_one_size():
    plan = random_subsets(101, 7, keep=0.3, seed=5).with_different_seeds()
    assert plan.kept.sum(dim=1).tolist() == [30] * 7
    assert plan.seeds.tolist() == list(range(5, 12))
    assert len(torch.unique(plan.kept, dim=0)) == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leave_out(5, [[7]]), "expected 0 to 4"),
        (lambda: leave_out(2, [[0, 1]]), "some that remain"),
        (lambda: leave_out(2, [torch.tensor([True, False])]), r"torch\.bool.*mask\.nonzero"),
        (lambda: leave_out(3, [torch.tensor([1.7])]), "expected lists of positions"),
        (lambda: leave_out(3, []), "holds no training"),
        (lambda: random_subsets(5, 2, keep=0.01), "`keep` is 0.01"),
        (lambda: Plan(-torch.ones(1, 3), torch.zeros(1).long()), "expected 0 or more"),
        (lambda: retrain(same_data(5, [0]), **FUNCTIONS), "of 13 samples; expected 5"),
        (
            lambda: retrain(same_data(13, [0]), **{**FUNCTIONS, "measure": retrained.no_losses}),
            "returned a float",
        ),
    ],
)
def test_plans_that_cannot_be_run_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "plan", [lambda: same_data(5, [0, 1.5]), lambda: leave_out(5, [[2]], seed=1.5)]
)
def test_a_seed_with_a_fraction_is_refused(plan):
    with type_checks_disabled(), pytest.raises(ValueError, match=r"`seeds` .* whole numbers"):
        plan()


def test_a_check_by_removal_compares_with_random_samples_of_each_seed():
    plans = []

    def run(plan):
        plans.append(plan)
        return retrain(plan, **FUNCTIONS)

    ids = torch.tensor([11, 2, 7, 5, 0])
    curve = check_removal(ids, 13, run, name="ours", n_seeds=2)
    assert list(curve.removed) == [2, 3, 5]
    changes = {"ours": torch.zeros(3).double(), "random": torch.zeros(3).double()}
    for seed in range(2):
        full = by_hand(list(range(13)), seed).mean()
        order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
        for name, ranking in (("ours", ids), ("random", order)):
            for position, size in enumerate(curve.removed):
                kept = [i for i in range(13) if i not in ranking[:size].tolist()]
                changes[name][position] += (by_hand(kept, seed).mean() - full) / 2
    for name, expected in changes.items():
        torch.testing.assert_close(torch.tensor(curve.changes[name]).double(), expected)
    assert repr(curve).startswith(
        "RemovalCurve: change after retraining without ours, random\n  2:"
    )
    frame = curve.to_pandas()
    assert {name: list(frame[name]) for name in frame} == curve.changes
    assert list(frame.index) == curve.removed
    assert "<td>2</td>" in curve._repr_html_()
    with pytest.raises(ValueError, match="names no sample"):
        check_removal(ids[:0], 13, run, name="ours")
