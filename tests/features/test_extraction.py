"""Extraction of layer features, and similarity of layer features."""

import pytest
import torch
from lightning_models import Plain, loader, vectors
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import Subset, TensorDataset, WeightedRandomSampler

from tda_lightning import FeatureSimilarity, attribute_by_features
from tda_lightning.features.extraction import query_features, train_features


def network():
    torch.manual_seed(2)
    layers = (nn.Linear(7, 5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 3))
    return Plain(nn.Sequential(*layers)).double()


def data(n=13):
    x, y = vectors(n)[:]
    return TensorDataset(x.double(), y)


def hidden(model, x):
    return model.net[:2](x).detach()


@pytest.mark.parametrize("layer", [None, "net.3", "net.0", "net.2"])
def test_features_are_the_inputs_of_the_layer_in_the_order_of_ids(layer):
    model, x = network(), data()[:][0]
    train = train_features(model, loader(data()), layer=layer, progress=False)
    torch.testing.assert_close(train.features, x if layer == "net.0" else hidden(model, x))
    assert train.ids.tolist() == list(range(13))
    assert train.layer == (layer or "net.3")


def test_features_are_the_inputs_before_an_inplace_layer_overwrites_them():
    model, x = network(), data()[:][0]
    train = train_features(model, loader(data()), layer="net.1", progress=False)
    torch.testing.assert_close(train.features, model.net[0](x).detach())


def test_ids_are_those_of_the_root_dataset():
    indices = [11, 3, 5]
    train = train_features(network(), loader(Subset(data(), indices), 2), progress=False)
    assert train.ids.tolist() == sorted(indices)
    torch.testing.assert_close(train.features, hidden(network(), data()[sorted(indices)][0]))


def test_queries_have_the_same_features_in_a_batch_and_in_a_loader():
    whole = query_features(network(), data()[:], progress=False)
    parts = query_features(network(), loader(data(), shuffle=False), progress=False)
    torch.testing.assert_close(whole.features, parts.features)


def test_head_outputs_hold_the_gradients_of_the_loss():
    model, (x, y) = network(), data()[:]
    layer_features = train_features(model, loader(data()), reads="head", progress=False)
    head = layer_features.head
    torch.testing.assert_close(layer_features.features @ head.weight.mT, head.outputs)
    torch.testing.assert_close(head.outputs, model.net[3](hidden(model, x)).detach())
    gradients = head.outputs.softmax(dim=1) - torch.eye(3, dtype=torch.float64)[y]
    torch.testing.assert_close(head.gradients, gradients)
    probe_gradients = head.probes.softmax(dim=1) - torch.eye(3, dtype=torch.float64)[y]
    torch.testing.assert_close(head.probe_gradients, probe_gradients)
    assert (head.probes - head.outputs).abs().amax(dim=1).min() > 0.1


class RandomMixup(Plain):
    """Mixes labels at random, and overwrites its logits."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        share = torch.rand(len(x), 1, dtype=x.dtype)
        mixed = share * torch.eye(3, dtype=x.dtype)[y] + (1 - share) / 3
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, mixed)
        logits.zero_()
        return loss


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_both_passes_of_a_head_have_the_same_random_loss(frozen):
    model = RandomMixup(network().net).requires_grad_(not frozen)
    head = query_features(model, data()[:], reads="head", progress=False).head
    probability_change = head.outputs.softmax(dim=1) - head.probes.softmax(dim=1)
    torch.testing.assert_close(head.gradients - head.probe_gradients, probability_change)
    torch.testing.assert_close(head.outputs, network().net.eval()(data()[:][0]).detach())


@pytest.mark.parametrize("reads", ["features", "head"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_features_raise_with_the_sample(bad, reads):
    (x, y), model = data()[:], network()
    x[[7, 11], 2] = bad
    bad_data = TensorDataset(x, y)
    with pytest.raises(
        ValueError, match=r"In sample 7 of `train_loader`, the input of `net.3` is not"
    ):
        train_features(model, loader(bad_data), reads=reads, progress=False)
    with pytest.raises(ValueError, match=r"In sample 2 of `queries`, .*though the weights are"):
        query_features(model, bad_data[5:9], reads=reads, progress=False)
    model.net[0].bias.data[1] = bad
    with pytest.raises(ValueError, match=r"weights of `model` are not finite: `net.0.bias` holds"):
        train_features(model, loader(data()), reads=reads, progress=False)


def test_non_finite_targets_raise_with_the_sample():
    x, _ = data()[:]
    targets = torch.zeros(13, 3).double()
    targets[4, 1] = torch.nan
    model = Plain(network().net, loss=nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"In sample 4 of `queries`, the gradient of the loss is"):
        query_features(model, (x, targets), reads="head", progress=False)


def test_features_of_sixteen_bits_are_compared_in_float32():
    model, (x, y) = network().bfloat16(), data()[:]
    half = TensorDataset(x.bfloat16(), y)
    for measure in ("cosine", "dot", "euclidean"):
        method = FeatureSimilarity("net.0", measure=measure)
        scores = attribute_by_features(model, loader(half), half[:3], method=method, progress=False)
        assert scores.values.dtype == torch.float32


def test_layers_with_integer_inputs_raise():
    words = TensorDataset(torch.randint(11, (13, 2)), data()[:][1])
    model = Plain(nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(10, 3)))
    with pytest.raises(
        ValueError, match=r"`net.0` is a Embedding and received .*int64.*floating-point"
    ):
        train_features(model, loader(words), layer="net.0", progress=False)


def test_queries_with_features_of_another_layer_raise():
    train = train_features(network(), loader(data()), progress=False)
    for layer in ("net.0", "net.1"):  # of another width, and of the same width
        queries = query_features(network(), data()[:3], layer=layer, progress=False)
        with pytest.raises(ValueError, match=rf"5 features each.*`net.3`.*inputs of `{layer}`"):
            FeatureSimilarity().attribute(train, queries)


@pytest.mark.parametrize("reads", ["features", "head"])
def test_extraction_leaves_model_loader_and_rng_unchanged(reads):
    model = network()
    model.net.train()
    state_before, rng_before = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.get_rng_state(),
    )
    batches = loader(data(), shuffle=False)
    sampler = batches.batch_sampler
    train_features(model, batches, reads=reads, progress=False)
    assert batches.batch_sampler is sampler
    assert all(torch.equal(v, state_before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.net.modules())
    assert torch.equal(torch.get_rng_state(), rng_before)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("measure", "reference"),
    [
        ("cosine", lambda q, i: cosine_similarity(q, i, dim=0)),
        ("dot", lambda q, i: q @ i),
        ("euclidean", lambda q, i: -(q - i).square().sum()),
    ],
)
def test_similarity_is_its_formula(measure, reference):
    model, queries = network(), data(17)[13:]
    method = FeatureSimilarity("net.0", measure)
    scores = attribute_by_features(model, loader(data()), queries, method=method, progress=False)
    x = data()[:][0]
    expected = torch.stack([torch.stack([reference(q, i) for i in x]) for q in queries[0]])
    torch.testing.assert_close(scores.values, expected)
    assert scores.provenance["layer"] == "net.0"
    assert scores.method == repr(method)


@pytest.mark.parametrize("measure", ["cosine", "euclidean"])
def test_a_training_sample_is_its_own_best_proponent(measure):
    model, method = network(), FeatureSimilarity("net.0", measure=measure)
    scores = attribute_by_features(model, loader(data()), data()[:], method=method, progress=False)
    assert scores.proponents(1).ids[:, 0].tolist() == list(range(13))


def test_permuting_training_samples_permutes_scores():
    model, order = network(), [5, 0, 3, 12, 7, 1, 2, 4, 6, 8, 9, 10, 11]
    x, y = data()[:]
    scores = attribute_by_features(model, loader(data()), data()[:3], progress=False)
    permuted_loader = loader(TensorDataset(x[order], y[order]))
    permuted = attribute_by_features(model, permuted_loader, data()[:3], progress=False)
    torch.testing.assert_close(permuted.values, scores.values[:, order])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("net.7", r"`layer` is 'net.7'.*'net.3'.*leave `layer` out"),
        ("unused", "`training_step` never calls `unused`"),
    ],
)
def test_a_layer_that_is_not_called_raises(layer, message):
    model = network()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        query_features(model, data()[:3], layer=layer, progress=False)


def test_a_head_that_is_not_a_linear_layer_of_vectors_raises():
    with pytest.raises(ValueError, match=r"`net.1` is a ReLU.*expected a `Linear`"):
        query_features(network(), data()[:3], layer="net.1", reads="head", progress=False)


def test_repeated_samples_raise():
    sampler = WeightedRandomSampler([1.0] + [0.0] * 12, 13)
    with pytest.raises(ValueError, match="draws sample 0 13 times"):
        train_features(network(), loader(data(), shuffle=False, sampler=sampler), progress=False)


def test_an_empty_loader_and_a_wrong_batch_raise():
    with pytest.raises(ValueError, match="`queries` is an empty loader"):
        query_features(network(), loader(Subset(data(), []), shuffle=False), progress=False)
    with pytest.raises(ValueError, match="Cannot extract features of `queries`"):
        query_features(network(), data()[:3][0], progress=False)


def test_models_without_linear_layers_raise():
    model = Plain(nn.LayerNorm(7)).double()
    with pytest.raises(ValueError, match="`training_step` never calls a `Linear`"):
        query_features(model, data()[:3], progress=False)
