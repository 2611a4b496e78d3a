"""Several recorders in one training: each ignores the extra passes of the others."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors
from torch import nn

from tda_lightning import GradientRecorder, HDF5Store, Identity, LossRecorder

NETS = {
    "mlp": mlp,
    # The recurrent layer uses the generic rule, which calls the module again.
    "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (7, 1)), Recurrent(), nn.Linear(5, 3)),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(1, 5, batch_first=True)

    def forward(self, x):
        return self.cells(x)[1][0]


def train(*callbacks, net, optimizer, **settings):
    torch.manual_seed(3)
    model = Plain(net(), optimizer=optimizer)
    quiet_trainer(*callbacks, **settings).fit(model, loader(vectors()))


@pytest.mark.parametrize("has_run", [True, False])
def test_two_recorders_of_one_store_are_refused_before_training(has_run, tmp_path):
    if has_run:
        train(GradientRecorder(tmp_path / "run"), net=mlp, optimizer=torch.optim.SGD)
    both = [GradientRecorder(tmp_path / "run"), GradientRecorder(HDF5Store(tmp_path / "run"))]
    with pytest.raises(ValueError, match=r"Two `GradientRecorder` .* the same store, `.*run`"):
        train(*both, net=mlp, optimizer=torch.optim.SGD)


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (LossRecorder, LossRecorder, "Two `LossRecorder`"),
        (LossRecorder, GradientRecorder, "A `GradientRecorder` and a `LossRecorder`"),
        (GradientRecorder, LossRecorder, "A `GradientRecorder` and a `LossRecorder`"),
    ],
)
def test_recorders_of_both_kinds_are_refused_in_one_store(first, second, named, has_run, tmp_path):
    if has_run:
        train(first(tmp_path / "run"), net=mlp, optimizer=torch.optim.SGD)
    both = [first(tmp_path / "run", existing="replace"), second(tmp_path / "run")]
    with pytest.raises(ValueError, match=rf"{named} .* the same store, `.*run`"):
        train(*both, net=mlp, optimizer=torch.optim.SGD)
    assert len(HDF5Store.open(tmp_path / "run")) == 6 if has_run else not any(tmp_path.iterdir())


def test_a_store_with_two_names_is_one_store(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    first = GradientRecorder(tmp_path / "folder" / "run")
    second = GradientRecorder(tmp_path / "link" / "run", existing="replace")
    with pytest.raises(ValueError, match="into the same store"):
        train(first, second, net=mlp, optimizer=torch.optim.SGD)


def test_recorders_of_both_kinds_record_into_two_stores(tmp_path):
    both = [LossRecorder(tmp_path / "losses"), GradientRecorder(tmp_path / "rows")]
    train(*both, net=mlp, optimizer=torch.optim.SGD)
    losses, rows = (HDF5Store.open(tmp_path / name) for name in ("losses", "rows"))
    for ours, theirs in zip(losses, rows, strict=True):
        assert torch.equal(ours.sample_ids, theirs.sample_ids)


@pytest.mark.parametrize("curvature", ["none", "fisher"])
@pytest.mark.parametrize("net", NETS)
def test_two_recorders_record_the_same_as_one_alone(net, curvature, tmp_path):
    def recorder(name):
        store = HDF5Store(tmp_path / name)
        return GradientRecorder(store, projector=Identity(), curvature=curvature)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    alone, first, second = recorder("alone"), recorder("first"), recorder("second")
    for callbacks in ([alone], [first, second]):
        train(*callbacks, net=NETS[net], optimizer=adam, accumulate_grad_batches=2)
    for beside in (first, second):
        for expected, step in zip(alone.store, beside.store, strict=True):
            torch.testing.assert_close(step.sketch, expected.sketch)
