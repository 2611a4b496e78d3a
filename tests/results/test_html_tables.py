"""Results in notebooks: tables with every shown query, and escaped texts."""

import re

import pytest
import torch

from tda_lightning.results import SampleScores, Scores, TopScores

METHOD = "<script>alert(1)</script>"
SCORES = Scores(
    values=torch.randn(13, 7, generator=torch.Generator().manual_seed(3)),
    query_ids=torch.arange(13),
    train_ids=torch.arange(100, 107),
    method=METHOD,
)
TOP = TopScores(SCORES.proponents(3), SCORES.opponents(3), SCORES.query_ids, METHOD)
SAMPLES = SampleScores(SCORES.values[0], SCORES.train_ids, METHOD)
RESULTS = {
    "scores": SCORES,
    "top scores": TOP,
    "sample scores": SAMPLES,
    "ranking": TOP.proponents,
    "sample ranking": SAMPLES.highest(3),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_result_is_one_table_without_markup_of_others(result):
    html = result._repr_html_()
    tags = set(re.findall(r"</?(\w+)", html))
    assert tags == {"table", "caption", "thead", "tbody", "tr", "th", "td", "span"}
    assert html.count("<table>") == html.count("</table>") == 1


def test_the_highest_and_lowest_samples_are_shown():
    html = SAMPLES._repr_html_()
    for ranking in (SAMPLES.highest(5), SAMPLES.lowest(5)):
        for sample, score in ranking:
            assert f"#{sample} " in html
            assert f"{score:+.3g}" in html


def test_many_queries_are_counted():
    assert "3 more" in SCORES._repr_html_()
    assert SCORES._repr_html_().count("<tr>") == 1 + 10 + 1


def test_few_training_samples_are_no_error():
    assert "#100 " in SCORES.of([100])._repr_html_()
    assert "<tbody></tbody>" in SCORES[0].of([])._repr_html_()
