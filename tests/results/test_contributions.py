"""Contributions, period by period: what can be asked of them."""

import pytest
import torch
from unchecked_calls import what_is_said

from tda_lightning.results import Contributions

KNOWN = Contributions(
    values=torch.arange(24.0).reshape(3, 2, 4),
    times=torch.tensor([0, 1, 2]),
    query_ids=torch.arange(2),
    train_ids=torch.tensor([3, 5, 7, 11]),
    method="ContributionTracker()",
    provenance={"period": "epoch", "model": "Plain"},
)
CALLS = """
known = Contributions(
    torch.zeros(3, 2, 4), torch.arange(3), torch.arange(2), torch.tensor([3, 5, 7, 11]), "known"
)
calls = {
    "fractions": lambda: known.trajectory([3.5]),
    "one number": lambda: known.trajectory(3),
    "a mask": lambda: known.trajectory(torch.tensor([True, False, False, False])),
    "a stranger": lambda: known.trajectory([5, 6]),
    "another probe": lambda: known.trajectory([5]).plot(query=99),
}
"""


def test_a_trajectory_has_the_selected_samples_in_the_order_asked_and_says_where_it_is_from():
    found = KNOWN.trajectory([11, 5])
    assert torch.equal(found.values, KNOWN.values[:, :, [3, 1]].permute(1, 2, 0))
    assert torch.equal(found.total(), KNOWN.scores().values[:, [3, 1]])
    assert found.per == "epoch"
    assert found.provenance == KNOWN.scores().provenance == KNOWN.provenance


def test_a_file_holds_all_of_them(tmp_path):
    KNOWN.save(tmp_path / "known.npz")
    found = Contributions.load(tmp_path / "known.npz")
    assert torch.equal(found.values, KNOWN.values)
    assert (found.method, found.provenance) == (KNOWN.method, KNOWN.provenance)
    with pytest.raises(ValueError, match="Load it with the class that saved it"):
        type(KNOWN.scores()).load(tmp_path / "known.npz")


@pytest.fixture(scope="module")
def said():
    return what_is_said(CALLS)


EXPECTED = {
    "fractions": "`train_ids` is [3.5]; expected a list of whole numbers, ids of training samples",
    "one number": "`train_ids` is 3; expected a list of whole numbers, ids of training samples",
    "a mask": "expected a list of whole numbers, ids of training samples",
    "a stranger": "Sample 6 is not among those that were followed; expected some of the 4 ids",
    "another probe": "`query` is 99; expected a place from 0 to 1",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name, said):
    assert said[name].startswith("ValueError: ")
    assert EXPECTED[name] in said[name]
