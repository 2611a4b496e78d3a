"""Projectors: unbiased, of the expected variance, reproducible, and consistent on both routes."""

import pytest
import torch

from tda_lightning import (
    CountSketch,
    DenseProjection,
    Identity,
    Kronecker,
    KroneckerCountSketch,
)
from tda_lightning.gradients.factors import (
    ByChannel,
    Dense,
    GradientFactors,
    GroupedDense,
    OneHot,
    Patches,
    Regrouped,
)
from tda_lightning.gradients.row_sum import RowSum
from tda_lightning.gradients.sketching.block_maps import Place
from tda_lightning.gradients.sketching.projectors import projector_from_dict
from tda_lightning.stores.recipe import Block

CPU = torch.device("cpu")
BLOCKS = (
    Block("a", "Linear", ("a",), ("a.weight", "a.bias"), 11, 14),
    Block("b", "LayerNorm", ("b",), ("b.weight",), 17, 1),
    Block("c", "Linear", ("c",), ("c.weight",), 3, 11),
)


def bind(projector, blocks=BLOCKS, dtype=torch.float64):
    return projector.bind(blocks, CPU, dtype)


def random_matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(b.rows, b.columns, generator=generator, dtype=torch.float64) for b in BLOCKS
    ]


def sketch(sketcher, matrices):
    return sum(sketcher.sketch_matrix(number, matrix) for number, matrix in enumerate(matrices))


PROJECTORS = [
    Identity(),
    Kronecker(width=7),
    CountSketch(dimension=31),
    KroneckerCountSketch(dimension=31, width=7),
    DenseProjection(dimension=31),
]


@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda p: type(p).__name__)
def test_factors_and_matrices_have_the_same_sketch(projector):
    torch.manual_seed(0)
    sketcher = bind(projector)
    inputs, grads = torch.randn(5, 3, 13).double(), torch.randn(5, 3, 11).double()
    weights, biases = grads.mT @ inputs, grads.sum(dim=1)
    weight, bias = Place(0, 0, 0, 11, 13), Place(0, 0, 13, 11, 1)
    rows = RowSum(sketcher, 5)
    rows.add((0,), sketcher.project(weight, factors_of(inputs, grads)))
    rows.add((0,), sketcher.project(bias, biases))
    # Some rows of a parameter, and a parameter that is a whole block.
    rows.add((2,), sketcher.project(Place(2, 0, 0, 3, 11), torch.ones(5, 2, 11).double(), 1, 2))
    part = torch.tensor([0.0, 1.0, 1.0]).double()[:, None].expand(3, 11)
    for row, w, b in zip(rows.rows(), weights, biases, strict=True):
        expected = sketcher.sketch_matrix(0, torch.cat([w, b[:, None]], dim=1))
        torch.testing.assert_close(row, expected + sketcher.sketch_matrix(2, part))


def factors_of(inputs, grads):
    n = len(inputs)
    return GradientFactors(Dense(inputs.flatten(0, 1), n), Dense(grads.flatten(0, 1), n))


@pytest.mark.parametrize(
    "operand",
    [
        OneHot(torch.tensor([[0, 4, 4], [2, 1, 0]]), 5),
        Patches(torch.randn(2, 3, 7, 11).double(), (3, 2), (2, 1), (1, 2), (1, 0)),
        Dense(torch.randn(6, 5).double(), 2),
        ByChannel(torch.randn(2, 5, 3).double()),
        GroupedDense(torch.randn(2, 3, 6).double(), 2),
        Regrouped(Dense(torch.randn(12, 5).double(), 4), 2),
    ],
    ids=lambda operand: type(operand).__name__,
)
def test_operands_project_like_dense_tensors(operand):
    dense = operand.dense(torch.float64)
    matrix = torch.randn(dense.shape[-1], 7).double()
    assert operand.n == len(dense)
    torch.testing.assert_close(operand.project(matrix), dense @ matrix)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Kronecker(width=5, seed=seed),
        lambda seed: CountSketch(dimension=31, seed=seed),
        lambda seed: KroneckerCountSketch(dimension=31, width=5, seed=seed),
        lambda seed: DenseProjection(dimension=31, seed=seed),
    ],
    ids=["Kronecker", "CountSketch", "KroneckerCountSketch", "DenseProjection"],
)
def test_inner_products_are_unbiased(make):
    first, noise = random_matrices(0), random_matrices(1)
    # The sum makes an inner product that is not near zero.
    second = [a + b for a, b in zip(first, noise, strict=True)]
    exact = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    sketchers = [bind(make(seed)) for seed in range(400)]
    estimates = torch.stack([sketch(s, first) @ sketch(s, second) for s in sketchers])
    standard_error = float(estimates.std() / len(estimates) ** 0.5)
    assert standard_error < 0.05 * exact
    assert abs(float(estimates.mean()) - exact) < 4 * standard_error


@pytest.mark.slow
def test_the_variance_of_a_count_sketch_matches_the_formula():
    """Var<Sa, Sb> = (|a|^2 |b|^2 + <a, b>^2 - 2 sum a_i^2 b_i^2) / k."""
    first, second = random_matrices(0), random_matrices(1)
    a, b = (torch.cat([m.flatten() for m in matrices]) for matrices in (first, second))
    expected = (a @ a * (b @ b) + (a @ b) ** 2 - 2 * (a**2 @ b**2)) / 31
    sketchers = [bind(CountSketch(dimension=31, seed=seed)) for seed in range(600)]
    variance = torch.stack([sketch(s, first) @ sketch(s, second) for s in sketchers]).var()
    assert float(variance / expected) == pytest.approx(1, abs=0.25)


def test_rows_do_not_depend_on_the_batch():
    inputs, grads = torch.randn(7, 3, 13).double(), torch.randn(7, 3, 11).double()
    sketcher = bind(KroneckerCountSketch(dimension=31, width=5))

    def rows_of(samples):
        rows = RowSum(sketcher, len(inputs[samples]))
        factors = factors_of(inputs[samples], grads[samples])
        rows.add((0,), sketcher.project(Place(0, 0, 0, 11, 13), factors))
        return rows.rows()

    torch.testing.assert_close(rows_of(slice(2, 5)), rows_of(slice(None))[2:5])


def test_a_seed_makes_sketches_reproducible():
    row = sketch(bind(KroneckerCountSketch(dimension=31, width=5, seed=3)), random_matrices(0))
    again = sketch(bind(KroneckerCountSketch(dimension=31, width=5, seed=3)), random_matrices(0))
    other = sketch(bind(KroneckerCountSketch(dimension=31, width=5, seed=4)), random_matrices(0))
    assert torch.equal(row, again)
    assert not torch.allclose(row, other)


def test_the_random_bits_are_the_documented_ones():
    from tda_lightning.gradients.sketching.random_bits import buckets, signs

    # Old recordings depend on these bits, so they must never change.
    assert signs(8, 0, "net/rows").tolist() == [-1, -1, -1, -1, 1, 1, 1, -1]
    assert buckets(5, 31, 0, "net/buckets").tolist() == [28, 10, 6, 19, 28]


def test_short_sides_are_not_shrunk():
    sketcher = bind(Kronecker(width=7))
    assert [block.size for block in sketcher._blocks] == [49, 17, 33]
    wide = Block("head", "Linear", ("head",), ("w",), 3, 1000)
    assert bind(Kronecker(width=7), [wide])._blocks[0].size == 3 * 16


def test_a_sketch_is_never_longer_than_its_blocks():
    assert bind(KroneckerCountSketch(dimension=10_000, width=7)).dimension == 49 + 17 + 33


def test_small_models_are_not_shrunk():
    sketcher = bind(KroneckerCountSketch(dimension=31))
    assert [block.size for block in sketcher._blocks] == [block.size for block in BLOCKS]


@pytest.mark.parametrize(("layers", "width"), [(2, 32), (8, 32), (9, 16), (32, 16), (33, 8)])
def test_the_default_width_depends_on_the_number_of_layers(layers, width):
    block = Block("a", "Linear", ("a",), ("a.weight",), 200, 200)
    chosen = KroneckerCountSketch(dimension=2048).chosen_for([block] * layers)
    assert chosen == KroneckerCountSketch(dimension=2048, width=width)


@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda p: type(p).__name__)
def test_a_recipe_rebuilds_its_projector(projector):
    assert projector_from_dict(projector.to_dict()) == projector


def test_an_unknown_projector_is_named():
    with pytest.raises(ValueError, match="sketched by a `Fourier`"):
        projector_from_dict({"name": "Fourier", "dimension": 3})


def test_a_projector_with_unset_width_is_rebuilt_with_unset_width():
    assert projector_from_dict(KroneckerCountSketch(dimension=7).to_dict()) == KroneckerCountSketch(
        7
    )
