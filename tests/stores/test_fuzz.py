"""Random damage to a run gives the exact data, or one clear error; never other data in silence."""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_lightning import HDF5Store
from tda_lightning.stores.contract import RECIPE, make_steps
from tda_lightning.stores.integrity.damage import StoreFileError
from tda_lightning.stores.recipe import Recipe
from tda_lightning.stores.recipe_checks import require_recipe


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two runs of five segments of two steps, with two snapshots."""
    folder = tmp_path_factory.mktemp("good")
    for name, shift in (("run", 0), ("other", 1)):
        store = HDF5Store(folder / name)
        store.begin(RECIPE)
        for number, step in enumerate(make_steps(10)):
            store.append(replace(step, sketch=step.sketch + shift, curvature_rows=step.sketch))
            if number % 2:
                store.seal()
        for index in (4, 8):
            store.keep_weights(index, {"weight": torch.ones(30)})
        store.release()
    return folder


def content_of(path):
    store = HDF5Store.open(path)
    names = ("sample_ids", "weights", "sketch", "curvature_rows")
    steps = [
        (step.index, step.epoch, step.groups, [getattr(step, name).tolist() for name in names])
        for step in store
    ]
    weights = [store.weights_at(index)["weight"].tolist() for index in store.snapshots()]
    return repr((steps, weights, store.snapshots(), store.visited_ids().tolist(), store.recipe))


def flip(path, rng, other):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def truncate(path, rng, other):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def clear_block(path, rng, other):
    raw, size = bytearray(path.read_bytes()), rng.choice([64, 512, 4096])
    at = rng.randrange(len(raw)) // size * size
    raw[at : at + size] = bytes(len(raw[at : at + size]))
    path.write_bytes(raw)


def delete(path, rng, other):
    path.unlink()


def swap(path, rng, other):
    """Swap two files, or replace one by a copy of another, of this run or of another."""
    source = rng.choice(sorted(rng.choice([path.parent, other]).iterdir()))
    raw = path.read_bytes()
    path.write_bytes(source.read_bytes())
    if source.parent == path.parent and rng.random() < 0.5:
        source.write_bytes(raw)


def rename(path, rng, other):
    """Give a file another number; that of its successors may follow."""
    numbers = re.findall(r"\d{6,}", path.name)
    if numbers:
        target = f"{max(0, int(numbers[0]) + rng.choice([-1, 1, 4])):0{len(numbers[0])}}"
        path.rename(path.with_name(path.name.replace(numbers[0], target)))


def change_field(path, rng, other):
    """Change a field of the recipe."""
    file = path.parent / "recipe.json"
    document = json.loads(file.read_text())
    fields = rng.choice([document, document["recipe"]])
    name = rng.choice(sorted(fields))
    fields[name] = rng.choice([None, 7, "x", [], {}, "sum", 0, -1, [[0, 9]], True, 10**12])
    file.write_text(json.dumps(document))


def replace_by_folder(path, rng, other):
    path.unlink()
    path.mkdir()


DAMAGES = [flip, flip, truncate, clear_block, delete, swap, rename, change_field, replace_by_folder]


def damage_and_read(good, folder, seed):
    """Return a damage, its file, and the content or the error that follows."""
    rng = random.Random(seed)
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(good / "run", run)
    path, damage = rng.choice(sorted(run.iterdir())), rng.choice(DAMAGES)
    damage(path, rng, good / "other")
    try:
        return damage, path, content_of(run)
    except (StoreFileError, ValueError) as error:
        return damage, path, error


def require_exact_or_clear(good, folder, seeds):
    expected, exact = content_of(good / "run"), 0
    for seed in seeds:
        damage, path, outcome = damage_and_read(good, folder, seed)
        where = f"seed {seed}: {damage.__name__} of {path.name}"
        if isinstance(outcome, str):
            assert outcome == expected, f"{where} gave other data in silence"
            exact += 1
        else:
            message = str(outcome)
            assert str(folder / "run") in message, f"{where} gave an error without a file"
            assert "\n" not in message, where
            assert len(message) < 1000, where
    assert exact < len(seeds) / 3


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 6))]
)
def test_random_damage_is_exact_or_one_clear_error(good, tmp_path, part):
    require_exact_or_clear(good, tmp_path, range(50 * part, 50 * part + 50))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_damages_are_exact_or_one_clear_error(good, tmp_path, part):
    require_exact_or_clear(good, tmp_path, range(1000 + 100 * part, 1100 + 100 * part))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(RECIPE.to_dict())), value=values)
def test_a_recipe_of_any_values_is_refused_or_can_be_built(name, value):
    fields = {**json.loads(json.dumps(RECIPE.to_dict())), name: value}
    try:
        require_recipe(fields)
    except ValueError:
        return
    assert json.loads(json.dumps(Recipe.from_dict(fields).to_dict())) == fields
