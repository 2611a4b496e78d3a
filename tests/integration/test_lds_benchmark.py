"""The LDS benchmark: its retraining equals Lightning's, and its baselines equal their formulas."""

import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from lds_bars import over_dampings
from lds_baselines import knn_shapley
from lds_retraining import query_losses, retrain, shuffled_batches, stacked
from lds_runs import record
from lds_tasks import TASKS, Data, Task, sample_losses
from lds_truths import Retrainer, random_subsets
from torch.utils.data import TensorDataset


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: at these sizes, more threads mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


EVERY_TASK = pytest.mark.parametrize("name", TASKS)


def small(task: Task) -> Task:
    """Return the task with few samples, in float64, for two passes with a ragged last batch."""
    full = task.data()

    def few(dataset: TensorDataset, n: int) -> TensorDataset:
        inputs, targets = dataset[:n]
        return TensorDataset(inputs.double() if inputs.is_floating_point() else inputs, targets)

    data = Data(few(full.train, 17), few(full.queries, 3))
    return replace(
        task, data=lambda: data, network=lambda: task.network().double(), batch_size=5, epochs=2
    )


@pytest.mark.slow
@EVERY_TASK
def test_retraining_on_all_samples_ends_where_lightning_ended(name, tmp_path):
    run = record(small(TASKS[name]), tmp_path / "run", {}, seed=0)
    retrained = retrain(run.task, stacked(run.initial, 3), run.batches, torch.ones(3, 17))
    for member in range(3):
        weights = {key: value[member] for key, value in retrained.items()}
        # Adam also moves a bias in front of a batch norm, by the rounding of a gradient of zero.
        atol = 1e-8 if "batch-norm" in name else 1e-10
        torch.testing.assert_close(weights, run.final, rtol=0, atol=atol)


@pytest.mark.slow
@EVERY_TASK
def test_left_out_samples_no_longer_add_to_any_step(name, tmp_path):
    run = record(small(TASKS[name]), tmp_path / "run", {}, seed=0)
    subsets = random_subsets(3, 17, share=0.7)
    retrained = retrain(run.task, stacked(run.initial, 3), run.batches, subsets.float())
    torch.manual_seed(0)
    network = run.task.network()
    optimizer = run.task.optimizer(network.parameters())
    schedule = run.task.schedule(optimizer, len(run.batches))
    inputs, targets = run.task.data().train.tensors
    for batch in run.batches:
        # With batch norm, the samples left out stay in the statistics of their batches.
        seen = batch if "batch-norm" in name else batch[subsets[1, batch]]
        losses = sample_losses(network(inputs[seen]), targets[seen])
        optimizer.zero_grad()
        (losses[subsets[1, seen]].sum() / len(batch)).backward()
        optimizer.step()
        schedule.step()
    weights = {key: value[1] for key, value in retrained.items()}
    atol = 1e-8 if "batch-norm" in name else 1e-10  # As above.
    torch.testing.assert_close(weights, network.state_dict(), rtol=0, atol=atol)


def test_members_with_separate_batches_are_trained_as_if_alone(tmp_path):
    run = record(small(TASKS["digits-cnn"]), tmp_path / "run", {}, seed=0)
    batches = shuffled_batches(random_subsets(3, 17, share=0.6), batch_size=4, steps=7, seed=1)
    together = retrain(run.task, stacked(run.initial, 3), batches, torch.ones(3, 17))
    alone = retrain(run.task, stacked(run.initial, 1), [b[2] for b in batches], torch.ones(1, 17))
    torch.testing.assert_close({key: value[2:] for key, value in together.items()}, alone)


def test_every_pass_draws_each_sample_of_a_subset_once_in_a_new_order():
    subsets = random_subsets(3, 13, share=0.5)
    batches = shuffled_batches(subsets, batch_size=4, steps=4, seed=1)
    first, second = torch.cat(batches[:2], dim=1), torch.cat(batches[2:], dim=1)
    for member in range(3):
        members = subsets[member].nonzero()[:, 0]
        assert torch.equal(first[member].sort().values, members)
        assert torch.equal(second[member].sort().values, members)
    assert not torch.equal(first, second)


def test_cached_truths_are_reused_only_for_the_same_task_and_settings(tmp_path):
    task = small(TASKS["breast-cancer"])
    truth = Retrainer(task, 3, 2, tmp_path).expected()
    assert truth.losses.shape == (2, 3, 3)
    cached = set(tmp_path.iterdir())
    torch.testing.assert_close(Retrainer(task, 3, 2, tmp_path).expected().losses, truth.losses)
    assert set(tmp_path.iterdir()) == cached
    Retrainer(replace(task, epochs=1), 3, 2, tmp_path).expected()
    Retrainer(task, 3, 1, tmp_path).expected()
    assert len(set(tmp_path.iterdir()) - cached) == 2


def test_a_query_loss_is_the_mean_over_its_positions(tmp_path):
    run = record(small(TASKS["characters"]), tmp_path / "run", {}, seed=0)
    losses = query_losses(run.task, stacked(run.final, 1))[0]
    inputs, targets = run.task.data().queries.tensors
    log_probabilities = run.learner.network(inputs).log_softmax(dim=-1)
    expected = -log_probabilities.gather(-1, targets[..., None]).mean(dim=(1, 2))
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_knn_shapley_is_the_shapley_value_of_the_neighbours_vote(number):
    generator = torch.Generator().manual_seed(number)
    train, query = torch.randn(6, 1, 2, generator=generator), torch.zeros(1, 1, 2)
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    by_distance = train[:, 0].norm(dim=1).argsort().tolist()

    def vote(members) -> float:
        nearest = [sample for sample in by_distance if sample in members][:number]
        return sum(float(labels[sample] == 1) for sample in nearest) / number

    expected = torch.zeros(6)
    orders = list(permutations(range(6)))
    for order in orders:
        for position, sample in enumerate(order):
            expected[sample] += vote(order[: position + 1]) - vote(order[:position])
    (values,) = knn_shapley(train, query, labels, torch.tensor([1]), [number])
    torch.testing.assert_close(values[0], expected / len(orders))


def test_the_brute_force_influence_solves_with_the_damped_curvature():
    generator = torch.Generator().manual_seed(3)
    queries, train, rows = (torch.randn(n, 7, generator=generator).double() for n in (3, 5, 11))
    curvature = rows.mT @ rows / len(rows)
    (name, scores), *_ = reversed(list(over_dampings(queries, train, rows)))
    assert name == "damping 1e+01 of trace"
    damped = curvature + 10 * curvature.trace() * torch.eye(7)
    torch.testing.assert_close(scores, queries @ torch.linalg.solve(damped, train.mT))


@pytest.mark.slow
def test_the_benchmark_prints_a_row_per_method(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "lds.py"
    arguments = ["--tasks", "breast-cancer", "--quick", "--cache", str(tmp_path)]
    finished = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=True
    )
    rows = [line for line in finished.stdout.splitlines() if line.startswith("| ")]
    for name in ("TracIn", "kNN-Shapley of inputs", "cosine of features", "TRAK of 5 models"):
        assert any(row.startswith(f"| {name}") for row in rows)
