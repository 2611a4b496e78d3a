"""What is said of wrong arguments of targets, metrics, and methods that read features."""

import pytest
from unchecked import what_is_said

CALLS = """
from tda_lightning.features import query_points, train_points

points = train_points(model, batches, progress=False)
heads = query_points(model, queries, reads="head", progress=False)
layer = representers(model, batches, progress=False)
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
    "an output later": lambda: layer.attribute(heads, "logit"),
    "targets": lambda: RepresenterPoint(targets="prediction"),
    "no regularization": lambda: RepresenterPoint(regularization=0.0),
    "a negative damping": lambda: LocalJacobianExpansion(damping=-1.0),
    "an infinite ascent": lambda: LocalJacobianExpansion(ascent=float("inf")),
    "what to read": lambda: train_points(model, batches, reads="heads"),
    "a batch for points": lambda: layer.attribute(queries),
    "a batch to reproduce": lambda: layer.outputs(queries),
    "a batch to compare": lambda: FeatureSimilarity().attribute(points, queries),
    "a batch to fit": lambda: RepresenterPoint().fit(queries),
    "points without outputs": lambda: layer.attribute(points),
    "a method for representers": lambda: representers(
        model, batches, method=FeatureSimilarity()
    ),
    "a class for representers": lambda: representers(model, batches, method=RepresenterPoint),
}
"""
EXPECTED = {
    "a class of a target": "`index` is '2'; expected a whole number of 0 or more",
    "a class below zero": "`index` is -1; expected a whole number of 0 or more",
    "an axis": "`class_axis` is 2; expected one of 1, -1",
    "outputs": "`outputs` is 'net'; expected a function, such as `outputs=lambda module, batch:",
    "labels": "`labels` is 'y'; expected a function, such as `labels=lambda batch: batch[1]`",
    "a target": "the target is 'margin'; expected an object such as `Margin()`, or a function",
    "the class of a target": "expected an object such as `Margin()`, or a function of (module,",
    "a measure of gradients": "`measure` is 'cos'; expected one of 'cosine', 'dot'",
    "a measure of features": "`measure` is 'l2'; expected one of 'cosine', 'dot', 'euclidean'",
    "an output": "`output` is 'logit'; expected 'label', 'prediction', 'loss', or the index of an",
    "an output below zero": "`output` is -1; expected a whole number of 0 or more",
    "an output later": "`output` is 'logit'; expected 'label', 'prediction', 'loss', or the index",
    "targets": "`targets` is 'prediction'; expected one of 'labels', 'predictions'",
    "no regularization": "`regularization` is 0.0; expected a finite number above 0",
    "a negative damping": "`damping` is -1.0; expected a finite number of 0 or more",
    "an infinite ascent": "`ascent` is inf; expected a finite number of 0 or more",
    "what to read": "`reads` is 'heads'; expected one of 'features', 'head'",
    "a batch for points": "`queries` is a tuple; expected points, as `train_points(model, loader)`",
    "a batch to reproduce": "`queries` is a tuple; expected points, as `train_points(model, ",
    "a batch to compare": "`queries` is a tuple; expected points, as `train_points(model, loader)`",
    "a batch to fit": "`train` is a tuple; expected points, as `train_points(model, loader)`",
    "points without outputs": "hold features only; expected outputs and gradients as well",
    "a method for representers": "expected an object such as `RepresenterPoint()`",
    "a class for representers": "expected an object such as `RepresenterPoint()`",
}


@pytest.fixture(scope="module")
def said():
    return what_is_said(CALLS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_wrong_argument_is_named_with_what_was_expected(name, said):
    assert said[name].startswith("ValueError: ")
    assert EXPECTED[name] in said[name]
