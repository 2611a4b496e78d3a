"""`Contributions`: sums, trajectories and files."""

import pytest
import torch
from unchecked_calls import errors_of

from tda_lightning.results import Contributions

CONTRIBUTIONS = Contributions(
    values=torch.arange(24.0).reshape(3, 2, 4),
    times=torch.tensor([0, 1, 2]),
    query_ids=torch.arange(2),
    train_ids=torch.tensor([3, 5, 7, 11]),
    method="ContributionTracker()",
    provenance={"period": "epoch", "model": "Plain"},
)
CALLS = """
contributions = Contributions(
    torch.zeros(3, 2, 4), torch.arange(3), torch.arange(2), torch.tensor([3, 5, 7, 11]), "tracker"
)
calls = {
    "fractions": lambda: contributions.trajectory([3.5]),
    "one number": lambda: contributions.trajectory(3),
    "a mask": lambda: contributions.trajectory(torch.tensor([True, False, False, False])),
    "another sample": lambda: contributions.trajectory([5, 6]),
    "another probe": lambda: contributions.trajectory([5]).plot(query=99),
}
"""


def test_a_trajectory_has_the_selected_samples_in_order_and_the_same_provenance():
    selected = CONTRIBUTIONS.trajectory([11, 5])
    assert torch.equal(selected.values, CONTRIBUTIONS.values[:, :, [3, 1]].permute(1, 2, 0))
    assert torch.equal(selected.total(), CONTRIBUTIONS.scores().values[:, [3, 1]])
    assert selected.per == "epoch"
    assert selected.provenance == CONTRIBUTIONS.scores().provenance == CONTRIBUTIONS.provenance


def test_saved_contributions_can_be_loaded(tmp_path):
    CONTRIBUTIONS.save(tmp_path / "contributions.npz")
    loaded = Contributions.load(tmp_path / "contributions.npz")
    assert torch.equal(loaded.values, CONTRIBUTIONS.values)
    assert (loaded.method, loaded.provenance) == (CONTRIBUTIONS.method, CONTRIBUTIONS.provenance)
    with pytest.raises(ValueError, match="Load it with the class that saved it"):
        type(CONTRIBUTIONS.scores()).load(tmp_path / "contributions.npz")


@pytest.fixture(scope="module")
def errors():
    return errors_of(CALLS)


EXPECTED = {
    "fractions": "`train_ids` is [3.5]; expected a list of whole numbers, ids of training samples",
    "one number": "`train_ids` is 3; expected a list of whole numbers, ids of training samples",
    "a mask": "expected a list of whole numbers, ids of training samples",
    "another sample": "Sample 6 is not among the 4 training samples; expected ids from `train_ids`",
    "another probe": "`query` is 99; expected a position from 0 to 1",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_with_the_expected_kind(name, errors):
    assert errors[name].startswith("ValueError: ")
    assert EXPECTED[name] in errors[name]
