"""All methods: against double loops over visits, and against properties they must satisfy."""

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
    """Return a run of random rows that never draws samples 5 and 12, and draws 3 in every step."""
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


def visit_scores_by_double_loop(run, q, score):
    """Return, for every training sample, the scores of its visits for all queries."""
    scores = {i: [] for i in range(N_TRAIN)}
    for step in run:
        for sample, weight, row in zip(
            step.sample_ids.tolist(), step.weights, step.sketch, strict=True
        ):
            scores[sample].append(torch.stack([score(step, weight, row, query) for query in q]))
    return scores


LINEAR = [TracIn(), GradientSimilarity("dot"), Unrolled(), Source(2), InfluenceFunction(), TRAK()]
METHODS = [*LINEAR, GradientSimilarity()]
each_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def test_tracin_matches_its_equation():
    run, q = make_run(), queries()
    terms = visit_scores_by_double_loop(
        run, q, lambda step, weight, row, g_q: step.lr * (g_q @ row)
    )
    expected = torch.stack([sum(terms[i], torch.zeros(N_QUERY)) for i in range(N_TRAIN)]).mT
    scores = TracIn().attribute(run, q, progress=False)
    torch.testing.assert_close(scores.values, expected, check_dtype=False)
    assert scores.train_ids.tolist() == list(range(N_TRAIN))


@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_gradient_similarity_is_a_mean_over_visits(measure):
    def similarity(step, weight, row, g_q):
        return cosine_similarity(g_q, row, dim=0) if measure == "cosine" else g_q @ row / weight

    run, q = make_run(), queries()
    terms = visit_scores_by_double_loop(run, q, similarity)
    unvisited = torch.zeros(1, N_QUERY, dtype=torch.float64)
    means = [torch.stack(terms[i] or list(unvisited)).mean(dim=0) for i in range(N_TRAIN)]
    scores = GradientSimilarity(measure).attribute(run, q, progress=False)
    torch.testing.assert_close(scores.values, torch.stack(means).mT)


def test_self_influence_is_the_effect_of_a_sample_on_its_own_loss():
    run = make_run()
    expected = torch.zeros(N_TRAIN, dtype=torch.float64)
    for step in run:
        for sample, weight, row in zip(step.sample_ids, step.weights, step.sketch, strict=True):
            expected[sample] += step.lr * (row / weight) @ row
    scores = TracIn().self_influence(run, progress=False)
    torch.testing.assert_close(scores.values, expected)


@each_method
def test_samples_that_are_never_drawn_score_zero(method):
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


def test_with_a_stride_a_step_represents_the_skipped_ones():
    run, strided = make_run(), make_run(stride=3)
    for attribute in (
        lambda run: TracIn().attribute(run, queries(), progress=False).values,
        lambda run: TracIn().self_influence(run, progress=False).values,
    ):
        torch.testing.assert_close(attribute(strided), 3 * attribute(run))


def test_cosine_similarity_does_not_depend_on_the_size_of_gradients():
    run, scaled = make_run(), MemoryStore()
    scaled.begin(run.recipe)
    for step in run:
        scaled.append(replace(step, sketch=7 * step.sketch))
    expected, scores = (
        GradientSimilarity().attribute(r, queries(), progress=False) for r in (run, scaled)
    )
    torch.testing.assert_close(scores.values, expected.values)
    assert expected.values.abs().max() <= 1


def test_scores_are_computed_in_the_number_format_of_the_queries():
    single, double = MemoryStore(), make_run()
    single.begin(replace(double.recipe, dtype="float32"))
    for step in double:
        single.append(replace(step, sketch=step.sketch.float(), weights=step.weights.float()))
    for method in (TracIn(), Unrolled(), InfluenceFunction(), GradientSimilarity("dot")):
        values = method.attribute(single, queries().float(), progress=False).values
        assert values.dtype == torch.float32
        values = method.attribute(single, queries(), progress=False).values
        assert values.dtype == torch.float64
        torch.testing.assert_close(
            values, method.attribute(double, queries(), progress=False).values, rtol=1e-5, atol=1e-5
        )
