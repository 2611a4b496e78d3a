"""TracIn restricted to the gradients of some layers."""

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
from tda_lightning.passes.queries import record_queries
from tda_lightning.stores import MemoryStore

QUERIES = vectors()[:3]
PROJECTORS = [Identity(), Kronecker(4), KroneckerCountSketch(dimension=2048)]


def trained(projector, layers=None, store=None):
    torch.manual_seed(0)
    model, run = Plain(mlp()).double(), MemoryStore() if store is None else store
    recorder = GradientRecorder(run, projector=projector, layers=layers)
    x, y = vectors()[:]
    data = torch.utils.data.TensorDataset(x.double(), y)
    quiet_trainer(recorder).fit(model, loader(data))
    return model, run


def scores(model, run, layers=None):
    queries = (QUERIES[0].double(), QUERIES[1])
    return attribute(run, model, queries, method=TracIn(layers), progress=False).values


def self_scores(run, layers=None):
    return self_influence(run, method=TracIn(layers), progress=False).values


@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_scores_of_separate_layers_sum_to_the_score_of_all_layers(projector):
    model, run = trained(projector)
    parts = [["net.0"], ["net.2", "net.3"]]
    by_part = [scores(model, run, part) for part in parts]
    torch.testing.assert_close(sum(by_part), scores(model, run))
    torch.testing.assert_close(sum(self_scores(run, part) for part in parts), self_scores(run))
    assert by_part[0].abs().max() > 0
    torch.testing.assert_close(scores(model, run, ["net.*"]), scores(model, run))
    for others in (["!net.0"], ["net.*", "!net.0"], ["!*.0.weight", "!net.0.bias"]):
        torch.testing.assert_close(scores(model, run, others), by_part[1])


@pytest.mark.filterwarnings("ignore:.*not among `layers`")
def test_excluded_layers_are_not_recorded():
    _, run = trained(Identity(), layers=["!net.0", "!net.*.bias"])
    assert run.recipe.block_names == {"net.2.weight", "net.3.weight"}
    with pytest.raises(ValueError, match=r"`layers` contains `net\.9`, which matches no layer"):
        trained(Identity(), layers=["!net.9"])
    with pytest.raises(ValueError, match="nothing that can be recorded"):
        trained(Identity(), layers=["!net.*"])


@pytest.mark.filterwarnings("ignore:.*not among `layers`")
@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
def test_selecting_a_layer_equals_recording_only_that_layer(projector):
    model, run = trained(projector)
    same_model, layer_run = trained(projector, layers=["net.3"])
    torch.testing.assert_close(scores(model, run, ["net.3"]), scores(same_model, layer_run))
    torch.testing.assert_close(self_scores(run, ["net.3"]), self_scores(layer_run))


def test_a_store_on_disk_holds_the_columns_of_each_layer(tmp_path):
    model, _ = trained(Identity(), store=str(tmp_path / "run"))
    run = HDF5Store.open(tmp_path / "run")
    assert run.recipe.widths == (77, 11, 11, 11, 33, 3)
    assert run.recipe.columns_of(["net.2"]).tolist() == list(range(88, 110))
    torch.testing.assert_close(scores(model, run[2:], ["net.?"]), scores(model, run[2:]))


@pytest.mark.parametrize("projector", [CountSketch(31), KroneckerCountSketch(31)], ids=repr)
def test_layers_that_share_columns_are_refused_where_queries_have_all_layers(projector):
    model, run = trained(projector)
    message = r"its `\w*CountSketch` \(dimension=31.*same columns.*GradientRecorder\(layers="
    with pytest.raises(ValueError, match=message):
        self_scores(run, ["net.3"])
    rows = record_queries(model, (QUERIES[0].double(), QUERIES[1]), like=run)
    with pytest.raises(ValueError, match=message):
        TracIn(["net.3"]).attribute(run, rows, progress=False)


ESTIMATES = pytest.mark.filterwarnings("ignore:.*estimates its scores")


@ESTIMATES
@pytest.mark.parametrize("projector", [CountSketch(31), KroneckerCountSketch(31)], ids=repr)
def test_scores_of_layers_that_share_columns_sum_to_the_score_of_all_layers(projector):
    model, run = trained(projector)
    parts = [scores(model, run, layers) for layers in (["net.0"], ["!net.0"])]
    torch.testing.assert_close(sum(parts), scores(model, run))
    assert min(float(part.abs().max()) for part in parts) > 0


@ESTIMATES
def test_they_average_to_those_of_separate_layers():
    exact = scores(*trained(Identity()), ["net.3"])
    runs = [trained(CountSketch(127, seed=seed)) for seed in range(7)]
    assert all(run.recipe.widths is None for _, run in runs)
    estimates = torch.stack([scores(model, run, ["net.3"]) for model, run in runs])
    error, largest = (estimates - exact).flatten(1).norm(dim=1), exact.norm()
    assert (estimates.mean(dim=0) - exact).norm() < 0.6 * error.mean()
    assert error.max() < 0.5 * largest


def test_an_estimate_warns():
    model, run = trained(CountSketch(31))
    with pytest.warns(UserWarning, match=r"`TracIn\(layers=...\)` estimates its scores"):
        scores(model, run, ["net.3"])


def test_an_unknown_layer_is_named():
    model, run = trained(Identity())
    names = r"'net.0.weight', 'net.0.bias', 'net.2.weight'"
    with pytest.raises(ValueError, match=rf"contains `net.7`.*\[{names}"):
        scores(model, run, ["net.3", "net.7"])


def test_the_parameters_of_a_layer_can_be_selected_one_by_one():
    model, run = trained(Identity())
    parts = [["net.3.weight"], ["net.3.bias"]]
    by_part = [scores(model, run, part) for part in parts]
    torch.testing.assert_close(sum(by_part), scores(model, run, ["net.3"]))
    assert all(part.abs().max() > 0 for part in by_part)
