"""Samples are detected from the kinds of their parts, and shown without loss of meaning."""

import base64
import io

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from unchecked_calls import type_checks_disabled

from tda_lightning.passes.batch_contents import part_of
from tda_lightning.passes.query_batches import batches_in_memory
from tda_lightning.report.evidence.queries import items_of
from tda_lightning.report.page.html import element, json_block, shortened, visible, with_code
from tda_lightning.report.page.payload import mean_by_group
from tda_lightning.report.samples.images import data_uri, is_image
from tda_lightning.report.samples.shown import ShowItem, Shown, content_hash, label_of

PICTURE = torch.rand(3, 11, 7, generator=torch.Generator().manual_seed(2))


def decoded(uri):
    from PIL import Image

    content = base64.b64decode(uri.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(content)))


def test_small_pictures_are_stored_exactly():
    pixels = (PICTURE * 255).round().to(torch.uint8)
    assert np.array_equal(decoded(data_uri(PICTURE)), pixels.movedim(0, -1).numpy())
    assert np.array_equal(decoded(data_uri(pixels.movedim(0, -1).numpy())), pixels.movedim(0, -1))
    assert np.array_equal(decoded(data_uri(pixels[0])), pixels[0].numpy())


def test_large_pictures_are_reduced():
    assert max(decoded(data_uri(torch.rand(3, 500, 300))).shape) == 72


def test_normalized_pictures_are_scaled_to_their_range():
    values = torch.linspace(-3, 5, 35).reshape(1, 5, 7)
    shown = decoded(data_uri(values))
    assert (shown.min(), shown.max()) == (0, 255)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.rand(28, 28), True),
        (torch.rand(1, 28, 28), True),
        (np.zeros((9, 9, 3), dtype=np.uint8), True),
        (torch.zeros(28, 28, dtype=torch.int64), False),
        (torch.rand(1, 16000), False),
        (torch.rand(7), False),
        ("text", False),
    ],
    ids=["grey", "channel", "array", "integers", "recording", "vector", "text"],
)
def test_pictures_are_told_from_other_arrays(value, expected):
    assert is_image(value) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((PICTURE, 2), Shown(label="cat", image=PICTURE)),
        ((PICTURE, torch.tensor(9)), Shown(label="9", image=PICTURE)),
        (("some text", 0), Shown(label="ant", text="some text")),
        ({"text": "some", "label": 1}, Shown(label="bee", text="some")),
        ((torch.tensor([3, 5, 7]), 1), Shown(label="bee", text="3 5 7")),
        ((torch.tensor([0.5, 2.0]), 1.5), Shown(label="1.5", row={"column 0": 0.5, "column 1": 2})),
        ((PICTURE, 2.0), Shown(label="cat", image=PICTURE)),
        ((PICTURE, torch.tensor([1.0, 0, 1])), Shown(label="ant, cat", image=PICTURE)),
        ({"x": "some", "labels": torch.tensor([0.0, 1])}, Shown(label="bee", text="some")),
        (
            (torch.ones(1, 16000), 16000, 2),
            Shown(label="cat", note="recording of 16,000 values, peak 1"),
        ),
    ],
    ids=[
        "picture",
        "picture, tensor",
        "text",
        "mapping",
        "tokens",
        "row",
        "class as float",
        "several labels",
        "several labels by key",
        "recording",
    ],
)
def test_an_item_is_shown_by_its_parts(item, expected):
    shown = ShowItem(class_names=("ant", "bee", "cat"))(item)
    assert vars(shown) == vars(expected)  # which compares tensors by identity


def test_columns_have_their_names():
    row = ShowItem(column_names=("age", "size"))((torch.tensor([1.0, 2.0]), 0)).row
    assert row == {"age": 1.0, "size": 2.0}
    names = np.array(["age", "size"])  # as those of scikit-learn
    with type_checks_disabled():
        assert ShowItem(names, names)((torch.tensor([1.0, 2.0]), 0)) == Shown(label="age", row=row)
    with pytest.raises(ValueError, match="`column_names` has 1 names; expected 2"):
        ShowItem(column_names=("age",))((torch.tensor([1.0, 2.0]), 0))


def test_equal_contents_have_equal_hashes_whatever_their_labels():
    other = PICTURE.clone()
    assert content_hash((PICTURE, 1)) == content_hash((other, torch.tensor(2)))
    other[0, 0, 0] += 1e-3
    assert content_hash((PICTURE, 1)) != content_hash((other, 1))
    assert content_hash(("a", 1)) != content_hash(("b", 1))


def test_labels_are_found():
    assert label_of((PICTURE, torch.tensor([4]))) == 4
    assert label_of({"input_ids": PICTURE, "labels": 3}) == 3
    assert label_of(PICTURE) is None
    assert label_of((PICTURE,)) is None
    assert [label_of((PICTURE, y), is_class=True) for y in (1.0, 0.3, 4)] == [1, 0.3, 4]


def test_parts_of_a_batch_are_its_samples():
    batch = {"x": PICTURE, "texts": ["a", "b", "c"], "more": (torch.arange(3), None)}
    part = part_of(batch, 3, 1)
    assert torch.equal(part["x"], PICTURE[1])
    assert (part["texts"], int(part["more"][0]), part["more"][1]) == ("b", 1, None)
    assert part_of(batch, 3, slice(1, 2))["texts"] == ["b"]


def test_queries_are_shown_as_their_dataset_yields_them():
    texts = [f"text {number}" for number in range(11)]
    dataset = Subset(texts, [7, 3, 5, 1, 9])

    def lengths(batch):
        return torch.tensor([len(text) for text in batch])

    loader = DataLoader(dataset, 2, collate_fn=lengths)
    assert items_of(loader, batches_in_memory(loader)) == [texts[i] for i in (7, 3, 5, 1, 9)]
    shuffled = DataLoader(texts, 3, shuffle=True, collate_fn=lengths)
    batches = batches_in_memory(shuffled)
    order = torch.cat(batches.ids).tolist()
    assert items_of(shuffled, batches) == [texts[i] for i in order]
    single = (torch.ones(3, 7), torch.zeros(3))
    assert items_of(single, batches_in_memory(single)) == []


def test_words_between_backticks_are_code():
    assert with_code("Pass `a<b`, or not.") == "Pass <code>a&lt;b</code>, or not."
    assert with_code("one ` alone") == "one ` alone"


def test_texts_are_escaped_in_elements_and_attributes():
    assert element("a", {"title": '"<&'}, "<b>") == '<a title="&quot;&lt;&amp;">&lt;b&gt;</a>'


def test_data_cannot_close_its_element():
    block = json_block("data", ["</script><!--", "&amp;"])
    assert block.count("<") == 2
    assert "&" not in block


def test_control_characters_are_visible():
    assert visible("\x1b[0m\x00\u202e") == "␛[0m␀⟨U+202E⟩"
    assert visible("line\n\ttab é 语") == "line\n\ttab é 语"
    assert shortened("a" * 9, 4) == "aaaa… (5 more characters)"


def test_scores_of_groups_are_means_over_their_pairs():
    values = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rows, columns = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    means = mean_by_group(values, rows, columns)
    for row in range(2):
        for column in range(3):
            block = values[rows == row][:, columns == column]
            assert float(means[row, column]) == pytest.approx(float(block.mean()))
