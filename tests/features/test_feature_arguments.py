"""Errors for wrong arguments of targets, metrics, and methods that read layer features."""

import pytest
from unchecked_calls import require_error

CALLS = """
from tda_lightning.features.extraction import query_features, train_features

train = train_features(model, batches, progress=False)
query_heads = query_features(model, queries, reads="head", progress=False)
from tda_lightning.metrics import (
    linear_datamodeling_score, mislabel_auc, mislabel_recall, rank_agreement
)

scores = attribute(store, model, queries)
self_scores = self_influence(store)
subsets, losses = torch.ones(5, len(data), dtype=torch.bool), torch.zeros(5, 3)
decomposition = representers(model, batches, progress=False)
calls = {
    "a class of a target": lambda: Logit("2"),
    "a class below zero": lambda: Logit(-1),
    "an axis": lambda: Margin(class_axis=2),
    "outputs": lambda: Margin(outputs="net"),
    "labels": lambda: LogProbability(labels="y"),
    "a target": lambda: attribute(store, model, queries, target="margin"),
    "the class of a target": lambda: attribute(store, model, queries, target=Margin),
    "a measure of gradients": lambda: GradientSimilarity("cos"),
    "a measure of features": lambda: FeatureSimilarity(measure="l2"),
    "an output": lambda: RepresenterPoint(output="logit"),
    "an output below zero": lambda: LocalJacobianExpansion(output=-1),
    "a later output": lambda: decomposition.attribute(query_heads, "logit"),
    "targets": lambda: RepresenterPoint(targets="prediction"),
    "a zero regularization": lambda: RepresenterPoint(regularization=0.0),
    "a negative damping": lambda: LocalJacobianExpansion(damping=-1.0),
    "an infinite ascent": lambda: LocalJacobianExpansion(ascent=float("inf")),
    "a network": lambda: attribute_by_features(model.net, batches, queries),
    "an unknown `reads`": lambda: train_features(model, batches, reads="heads"),
    "a batch to score": lambda: decomposition.attribute(queries),
    "a batch to reproduce": lambda: decomposition.outputs(queries),
    "a batch to compare": lambda: FeatureSimilarity().attribute(train, queries),
    "a batch to fit": lambda: RepresenterPoint().fit(queries),
    "features without head outputs": lambda: decomposition.attribute(train),
    "a method for representers": lambda: representers(
        model, batches, method=FeatureSimilarity()
    ),
    "a class for representers": lambda: representers(model, batches, method=RepresenterPoint),
    "tensors to compare": lambda: rank_agreement(scores.values, scores.values),
    "a Scores object for values": lambda: linear_datamodeling_score(scores, subsets, losses),
    "indices of subsets for masks": lambda: linear_datamodeling_score(
        scores.values, torch.randint(5, (5, len(data))), losses
    ),
    "transposed subsets": lambda: linear_datamodeling_score(scores.values, subsets.T, losses),
    "losses of one query": lambda: linear_datamodeling_score(scores.values, subsets, losses[:, :1]),
    "scores of samples": lambda: mislabel_auc(self_scores, subsets[0]),
    "ids of mislabelled samples": lambda: mislabel_auc(self_scores.values, torch.tensor([1, 2])),
    "zeros and ones": lambda: mislabel_recall(self_scores.values, subsets[0].long()),
}
"""
EXPECTED = {
    "a class of a target": "`index` is '2'; expected a whole number of 0 or more",
    "a class below zero": "`index` is -1; expected a whole number of 0 or more",
    "an axis": "`class_axis` is 2; expected one of 1, -1",
    "outputs": "`outputs` is 'net'; expected a function, such as `outputs=lambda module, batch:",
    "labels": "`labels` is 'y'; expected a function, such as `labels=lambda batch: batch[1]`",
    "a target": "`target` is 'margin'; expected an object such as `Margin()`, or a function",
    "the class of a target": "`target` is the class `Margin`; expected an object such as",
    "a measure of gradients": "`measure` is 'cos'; expected one of 'cosine', 'dot'",
    "a measure of features": "`measure` is 'l2'; expected one of 'cosine', 'dot', 'euclidean'",
    "an output": "`output` is 'logit'; expected 'label', 'prediction', 'loss', or the index of an",
    "an output below zero": "`output` is -1; expected a whole number of 0 or more",
    "a later output": "`output` is 'logit'; expected 'label', 'prediction', 'loss', or the index",
    "targets": "`targets` is 'prediction'; expected one of 'labels', 'predictions'",
    "a zero regularization": "`regularization` is 0.0; expected a finite number above 0",
    "a negative damping": "`damping` is -1.0; expected a finite number of 0 or more",
    "an infinite ascent": "`ascent` is inf; expected a finite number of 0 or more",
    "a network": "`model` is a `Sequential`; expected the LightningModule that was trained",
    "an unknown `reads`": "`reads` is 'heads'; expected one of 'features', 'head'",
    "a batch to score": "`queries` is a tuple; expected layer features, as `train_features(",
    "a batch to reproduce": "`queries` is a tuple; expected layer features, as `train_features(",
    "a batch to compare": "`queries` is a tuple; expected layer features, as `train_features(",
    "a batch to fit": "`train` is a tuple; expected layer features, as `train_features(",
    "features without head outputs": "come without outputs and gradients; expected both",
    "a method for representers": "expected an object such as `RepresenterPoint()`",
    "tensors to compare": "`one` is a tensor of shape (3, 13) (torch.float32); expected `Scores`",
    "a Scores object for values": "`scores` is a Scores; expected floating-point numbers in a",
    "indices of subsets for masks": "`kept` is a tensor of shape (5, 13) (torch.int64); expected a",
    "transposed subsets": "expected a tensor of booleans of shape (5, 13), one per training",
    "losses of one query": "`losses` has the shape (5, 1); expected (5, 3): a row for each retrain",
    "scores of samples": "in a tensor of 1 axis, such as `self_influence(run).values`",
    "ids of mislabelled samples": "expected a tensor of booleans of shape (13,), one per training",
    "zeros and ones": "`mislabelled` is a tensor of shape (13,) (torch.int64); expected a ten",
    "a class for representers": "expected an object such as `RepresenterPoint()`",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_arguments_raise_with_the_expected_kind(name):
    require_error(CALLS, name, EXPECTED[name])
