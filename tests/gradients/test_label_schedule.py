"""Steps at which labels are sampled: unbiased, evenly spread, out of step with the data."""

import pytest

from tda_lightning.gradients.losses import LabelSchedule
from tda_lightning.stores.step import FIRST_LABELLED_STEPS

SHARES = [0.03, 0.25, 0.3, 0.4, 0.7, 0.99, 1.0]


def weights(share, count):
    """Return the weights of the steps after those that are all drawn."""
    schedule = LabelSchedule(share)
    return [schedule.weight(FIRST_LABELLED_STEPS + number) for number in range(count)]


@pytest.mark.parametrize("share", SHARES)
def test_a_step_has_weight_one_on_average(share):
    assert sum(weights(share, 3000)) / 3000 == pytest.approx(1, abs=0.04)
    assert set(weights(share, 3000)) <= {0.0, 1 / share}


@pytest.mark.parametrize("share", SHARES)
def test_the_first_steps_are_all_drawn(share):
    assert [LabelSchedule(share).weight(number) for number in range(FIRST_LABELLED_STEPS)] == [
        1
    ] * FIRST_LABELLED_STEPS


def test_draws_are_spread_evenly():
    drawn = [weight > 0 for weight in weights(0.25, 400)]
    assert [sum(drawn[start : start + 4]) for start in range(0, 400, 4)] == [1] * 100


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 12])
def test_each_batch_of_a_fixed_order_is_drawn_alike(period):
    """Without shuffling, step t has the batch t modulo the number of batches."""
    drawn = [number for number, weight in enumerate(weights(0.25, 4800)) if weight]
    counts = [sum(number % period == batch for number in drawn) for batch in range(period)]
    expected = len(drawn) / period
    assert all(abs(count - expected) < 4 * expected**0.5 for count in counts)


@pytest.mark.parametrize("steps", [1.0, 20.0, 24.0, 100.0, 420.0])
def test_the_mean_share_is_the_share_of_the_drawn_steps(steps):
    schedule = LabelSchedule(0.25)
    drawn = sum(schedule.weight(number) > 0 for number in range(int(steps)))
    assert schedule.mean_share(steps) == drawn / steps


def test_the_mean_share_of_an_endless_training_is_the_share():
    assert LabelSchedule(0.25).mean_share(float("inf")) == 0.25
