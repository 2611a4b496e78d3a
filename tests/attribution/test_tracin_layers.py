"""TracIn by the gradients of some layers."""

import pytest
import torch
from lightning_models import Plain, loader, mlp, quiet_trainer, vectors

from tda_lightning import (
    CountSketch,
    GradientRecorder,
    HDF5Store,
    Identity,
    Kronecker,
    KroneckerCountSketch,
    TracIn,
    attribute,
    self_influence,
)
from tda_lightning.stores import MemoryStore

QUERIES = vectors()[:3]
APART = [Identity(), Kronecker(4), KroneckerCountSketch(dimension=2048)]


def trained(projector, layers=None, store=None):
    torch.manual_seed(0)
    model, run = Plain(mlp()).double(), MemoryStore() if store is None else store
    recorder = GradientRecorder(run, projector=projector, layers=layers)
    x, y = vectors()[:]
    data = torch.utils.data.TensorDataset(x.double(), y)
    quiet_trainer(recorder).fit(model, loader(data))
    return model, run


def ask(model, run, layers=None):
    queries = (QUERIES[0].double(), QUERIES[1])
    return attribute(run, model, queries, method=TracIn(layers), progress=False).values


def own(run, layers=None):
    return self_influence(run, method=TracIn(layers), progress=False).values


@pytest.mark.parametrize("projector", APART, ids=repr)
def test_scores_of_layers_apart_sum_to_the_scores_of_all(projector):
    model, run = trained(projector)
    parts = [["net.0"], ["net.2", "net.3"]]
    torch.testing.assert_close(sum(ask(model, run, one) for one in parts), ask(model, run))
    torch.testing.assert_close(sum(own(run, one) for one in parts), own(run))
    assert ask(model, run, parts[0]).abs().max() > 0
    torch.testing.assert_close(ask(model, run, ["net.*"]), ask(model, run))


@pytest.mark.filterwarnings("ignore:.*not among `layers`")
@pytest.mark.parametrize("projector", APART, ids=repr)
def test_a_chosen_layer_is_as_if_no_other_had_been_recorded(projector):
    model, run = trained(projector)
    same, alone = trained(projector, layers=["net.3"])
    torch.testing.assert_close(ask(model, run, ["net.3"]), ask(same, alone))
    torch.testing.assert_close(own(run, ["net.3"]), own(alone))


def test_a_store_remembers_which_columns_are_whose(tmp_path):
    model, _ = trained(Identity(), store=str(tmp_path / "run"))
    run = HDF5Store.open(tmp_path / "run")
    assert run.recipe.widths == (88, 22, 36)
    assert run.recipe.columns_of(["net.2"]).tolist() == list(range(88, 110))
    torch.testing.assert_close(ask(model, run[2:], ["net.?"]), ask(model, run[2:]))


@pytest.mark.parametrize("projector", [CountSketch(31), KroneckerCountSketch(31)], ids=repr)
def test_layers_that_share_columns_are_refused(projector):
    model, run = trained(projector)
    message = r"its `\w*CountSketch` \(dimension=31.*same columns.*GradientRecorder\(layers="
    with pytest.raises(ValueError, match=message):
        ask(model, run, ["net.3"])


def test_a_layer_that_the_run_has_not_is_named():
    model, run = trained(Identity())
    with pytest.raises(ValueError, match=r"names `net.7`.*\['net.0', 'net.2', 'net.3'\]"):
        ask(model, run, ["net.3", "net.7"])
