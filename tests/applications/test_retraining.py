"""Retrainings equal trainings by hand; they continue, and run in several processes."""

import pytest
import retrained
import torch
from lightning_models import loader, vectors
from torch.utils.data import Subset, WeightedRandomSampler

from tda_lightning.applications import Plan, leave_out, random_subsets, retrain, same_data
from tda_lightning.applications.retraining.runner import part_of

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


@pytest.mark.slow
def test_several_processes_give_the_same_results():
    plan = same_data(13, seeds=[0, 1, 2])
    expected = retrain(plan, **FUNCTIONS).values
    torch.testing.assert_close(retrain(plan, processes=2, **FUNCTIONS).values, expected)


def test_unequal_weights_draw_in_proportion():
    part = part_of(loader(vectors()), torch.tensor([3.0, 1.0, 0.0, 0.0, 2.0] + [0.0] * 8))
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
