"""Plots show the given numbers and texts, and refuse what does not fit together."""

from itertools import pairwise

import pytest
import torch
from hostile_strings import HOSTILE

from tda_lightning.report import Shown
from tda_lightning.report.plots import (
    log_figure,
    plot_lds,
    plot_proponents,
    plot_removal,
    plot_self_influence,
)
from tda_lightning.results import SampleScores, Scores

TRAIN = [(torch.rand(1, 5, 5), label % 3) for label in range(11)]
QUERIES = (torch.rand(3, 1, 5, 5), torch.tensor([0, 1, 2]))
SCORES = Scores(
    values=torch.randn(3, 11, generator=torch.Generator().manual_seed(2)),
    query_ids=torch.arange(3),
    train_ids=torch.arange(11),
    method="",
)


def test_the_grid_has_queries_proponents_and_opponents_in_order():
    figure = plot_proponents(SCORES, QUERIES, TRAIN, k=2)
    titles = [axes.get_title() for axes in figure.axes]
    best, worst = SCORES.proponents(2), SCORES.opponents(2)
    expected = []
    for row in range(3):
        pairs = [*best[row], *worst[row]]
        expected += [f"“{row}”", *(f"“{i % 3}”\n{score:+.3g}" for i, score in pairs)]
    assert titles == expected


# The font has no symbols for control characters.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_the_grid_of_hostile_texts_is_drawn(tmp_path):
    texts = [*HOSTILE, "$\\frac{", "\\input{/etc/passwd}"]
    scores = Scores(
        values=torch.randn(3, len(texts)),
        query_ids=torch.arange(3),
        train_ids=torch.arange(len(texts)),
        method="",
    )
    figure = plot_proponents(
        scores,
        texts[:3],
        texts,
        k=len(texts) // 2,
        render=lambda text: Shown(label=text, text=text),
    )
    figure.savefig(tmp_path / "grid.svg")
    assert "<script" not in (tmp_path / "grid.svg").read_text()


def test_too_many_queries_are_refused():
    many = SCORES[[0] * 21]
    with pytest.raises(ValueError, match="`scores` has 21 queries; expected 1 to 20"):
        plot_proponents(many, QUERIES, TRAIN)


def test_long_labels_and_texts_stay_within_their_tiles():
    long = Shown(label="a very long class name " * 9, text="some words in a text " * 99)
    figure = plot_proponents(SCORES[:1], QUERIES, TRAIN, k=2, render=lambda item: long)
    figure.draw_without_rendering()
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    for axes in figure.axes:
        text, tile = axes.texts[0].get_window_extent(), axes.get_window_extent()
        assert text.x1 < tile.x1
        assert text.y0 > tile.y0


def test_the_histogram_counts_every_sample():
    influence = SampleScores(torch.rand(23) + 0.1, torch.arange(23), "")
    marked = torch.arange(23) < 7
    axes = plot_self_influence(influence, marked)
    counts = [sum(bar.get_height() for bar in container) for container in axes.containers]
    assert counts == [23, 7]
    with pytest.raises(ValueError, match=r"`marked` has the shape \(3,\); expected \(23,\)"):
        plot_self_influence(influence, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="No self-influence is above zero"):
        plot_self_influence(SampleScores(torch.zeros(3), torch.arange(3), ""))


def test_removal_curves_pass_through_the_changes():
    axes = plot_removal([1, 3, 5], {"Unrolled": [0.1, 0.2, 0.5], "random": [0.0, 0.1, 0.1]})
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.1], [3, 0.2], [5, 0.5]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Unrolled", "random"]
    with pytest.raises(ValueError, match=r"`changes\['random'\]` has 1 values; expected 3"):
        plot_removal([1, 3, 5], {"random": [0.0]})


def test_the_best_method_is_on_top_and_nan_is_left_out():
    scores = {"one": torch.tensor([0.1, 0.3, torch.nan]), "other": torch.tensor([0.5, 0.7])}
    axes = plot_lds(scores)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "other"]
    bars = next(c for c in axes.containers if hasattr(c, "patches"))
    assert [round(bar.get_width(), 6) for bar in bars] == [0.2, 0.6]
    with pytest.raises(ValueError, match=r"`by_method\['none'\]` has no score"):
        plot_lds({"none": torch.tensor([torch.nan])})


class Recording:
    """A logger that stores its calls."""

    def __init__(self, experiment=None):
        self.experiment, self.images, self.figures = experiment, [], []

    def log_image(self, key, images, step=None):
        self.images.append((key, images, step))

    def add_figure(self, tag, figure, global_step=None):
        self.figures.append((tag, figure, global_step))


def test_a_figure_goes_to_the_logger_as_it_takes_it():
    figure = plot_proponents(SCORES[:1], QUERIES, TRAIN, k=1)
    logger = Recording()
    log_figure(logger, "proponents", figure, step=3)
    ((key, (pixels,), step),) = logger.images
    assert (key, step) == ("proponents", 3)
    assert pixels.ndim == 3
    assert pixels.min() < pixels.max()
    logger = Recording(experiment=Recording())
    log_figure(logger, "proponents", figure, step=3)
    assert logger.experiment.figures == [("proponents", figure, 3)]
    with pytest.raises(ValueError, match="`logger` is a `object`, which takes no figures"):
        log_figure(object(), "proponents", figure)
