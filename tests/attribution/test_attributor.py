"""Methods against double loops over visits, and the theorems they must satisfy."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tda_lightning import TRAK, GradientSimilarity, InfluenceFunction, Source, TracIn, Unrolled
from tda_lightning.stores import MemoryStore, Step
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.step import ParameterGroup

K, N_TRAIN, N_QUERY = 11, 13, 3


def make_run(train_ids=((0, N_TRAIN),), stride=1, permutation=None):
    """Return a run of random rows in which samples 5 and 12 are never drawn and 3 comes often."""
    generator = torch.Generator().manual_seed(7)
    recipe = Recipe(
        blocks=(),
        left_out=(),
        projector={"name": "Identity"},
        dimension=K,
        dtype="float64",
        every_n_steps=stride,
        train_ids=train_ids,
    )
    store = MemoryStore()
    store.begin(recipe)
    drawn = torch.tensor([i for i in range(N_TRAIN) if i not in (5, 12)])
    for index in range(5):
        n = 4 + index % 3
        ids = drawn[torch.randint(len(drawn), (n,), generator=generator)]
        ids[0] = 3
        rows = torch.randn(n, K, generator=generator, dtype=torch.float64) / n
        if permutation is not None:
            ids = permutation[ids]
        group = ParameterGroup(lr=0.1 / (index + 1))
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        odds = torch.linspace(0.1, 3, n, dtype=torch.float64)
        store.append(
            Step(
                index=index,
                epoch=0,
                optimizer="SGD",
                groups=(group,),
                sample_ids=ids,
                weights=weights,
                sketch=rows,
                curvature=odds,
            )
        )
    return store


def queries(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N_QUERY, K, generator=generator, dtype=torch.float64)


def by_double_loop(run, q, of_visit):
    """Return the list of what every visit says to every query, for every training sample."""
    said = {i: [] for i in range(N_TRAIN)}
    for step in run:
        for sample, weight, row in zip(
            step.sample_ids.tolist(), step.weights, step.sketch, strict=True
        ):
            said[sample].append(torch.stack([of_visit(step, weight, row, one) for one in q]))
    return said


LINEAR = [TracIn(), GradientSimilarity("dot"), Unrolled(), Source(2), InfluenceFunction(), TRAK()]
METHODS = [*LINEAR, GradientSimilarity()]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def test_tracin_is_its_equation():
    run, q = make_run(), queries()
    said = by_double_loop(run, q, lambda step, weight, row, one: step.lr * (one @ row))
    expected = torch.stack([sum(said[i], torch.zeros(N_QUERY)) for i in range(N_TRAIN)]).mT
    found = TracIn().attribute(run, q, progress=False)
    torch.testing.assert_close(found.values, expected, check_dtype=False)
    assert found.train_ids.tolist() == list(range(N_TRAIN))


@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_similarity_is_a_mean_over_visits(measure):
    def of_visit(step, weight, row, one):
        return cosine_similarity(one, row, dim=0) if measure == "cosine" else one @ row / weight

    run, q = make_run(), queries()
    said = by_double_loop(run, q, of_visit)
    nothing = torch.zeros(1, N_QUERY, dtype=torch.float64)
    means = [torch.stack(said[i] or list(nothing)).mean(dim=0) for i in range(N_TRAIN)]
    found = GradientSimilarity(measure).attribute(run, q, progress=False)
    torch.testing.assert_close(found.values, torch.stack(means).mT)


def test_self_influence_is_what_a_sample_does_to_its_own_loss():
    run = make_run()
    expected = torch.zeros(N_TRAIN, dtype=torch.float64)
    for step in run:
        for sample, weight, row in zip(step.sample_ids, step.weights, step.sketch, strict=True):
            expected[sample] += step.lr * (row / weight) @ row
    found = TracIn().self_influence(run, progress=False)
    torch.testing.assert_close(found.values, expected)


@each_method
def test_samples_never_drawn_score_zero(method):
    values = method.attribute(make_run(), queries(), progress=False).values
    assert values[:, [5, 12]].abs().max() == 0
    assert values[:, [0, 1, 3]].abs().min() > 0


@each_method
def test_permuting_training_samples_permutes_scores(method):
    permutation = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(2))
    plain = method.attribute(make_run(), queries(), progress=False).values
    permuted = method.attribute(make_run(permutation=permutation), queries(), progress=False).values
    torch.testing.assert_close(permuted[:, permutation], plain)


@pytest.mark.parametrize("method", LINEAR, ids=repr)
def test_methods_are_linear_in_the_query(method):
    def scores(q):
        return method.attribute(make_run(), q, progress=False).values

    torch.testing.assert_close(
        scores(2 * queries(1) - 3 * queries(2)), 2 * scores(queries(1)) - 3 * scores(queries(2))
    )


@each_method
def test_without_a_known_training_set_the_drawn_samples_are_scored(method):
    known = method.attribute(make_run(), queries(), progress=False)
    drawn = method.attribute(make_run(train_ids=None), queries(), progress=False)
    # An influence function divides by the number of training samples.
    share = N_TRAIN / len(drawn.train_ids) if isinstance(method, InfluenceFunction) else 1
    torch.testing.assert_close(drawn.values, share * known.values[:, drawn.train_ids])
    assert 5 not in drawn.train_ids.tolist()


@each_method
def test_a_slice_of_a_run_is_a_run(method):
    run, q = make_run(), queries()
    first, rest = (
        method.attribute(run[s], q, progress=False).values for s in (slice(2), slice(2, 5))
    )
    if isinstance(method, TracIn):
        torch.testing.assert_close(first + rest, method.attribute(run, q, progress=False).values)
    assert not torch.allclose(first, rest)


def test_with_a_stride_a_step_stands_for_those_in_between():
    every, third = make_run(), make_run(stride=3)
    for attribute in (
        lambda run: TracIn().attribute(run, queries(), progress=False).values,
        lambda run: TracIn().self_influence(run, progress=False).values,
    ):
        torch.testing.assert_close(attribute(third), 3 * attribute(every))


def test_similarity_does_not_depend_on_the_size_of_gradients():
    run, louder = make_run(), MemoryStore()
    louder.begin(run.recipe)
    for step in run:
        louder.append(replace(step, sketch=7 * step.sketch))
    one, other = (
        GradientSimilarity().attribute(r, queries(), progress=False) for r in (run, louder)
    )
    torch.testing.assert_close(one.values, other.values)
    assert one.values.abs().max() <= 1


def test_work_is_done_in_the_number_format_of_the_queries():
    single, double = MemoryStore(), make_run()
    single.begin(replace(double.recipe, dtype="float32"))
    for step in double:
        single.append(replace(step, sketch=step.sketch.float(), weights=step.weights.float()))
    for method in (TracIn(), Unrolled(), InfluenceFunction(), GradientSimilarity("dot")):
        short = method.attribute(single, queries().float(), progress=False).values
        assert short.dtype == torch.float32
        found = method.attribute(single, queries(), progress=False).values
        assert found.dtype == torch.float64
        torch.testing.assert_close(
            found, method.attribute(double, queries(), progress=False).values, rtol=1e-5, atol=1e-5
        )
