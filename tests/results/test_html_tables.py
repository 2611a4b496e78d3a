"""Results in notebooks: tables with every shown query, and escaped texts."""

import inspect
import pkgutil
import re
import sys
from html.parser import HTMLParser
from importlib import import_module

import pytest
import torch
from hostile_strings import HOSTILE

import tda_lightning
from tda_lightning.applications import Duplicates, Mislabeled, Note, Shortcut
from tda_lightning.applications.shortcuts import Effect
from tda_lightning.results import Embedding, SampleScores, Scores, TopScores, Trajectory
from tda_lightning.results.alarms import Alarm, Alarms
from tda_lightning.results.contributions import Contributions
from tda_lightning.results.npz import SavedResult

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
    "embedding": Embedding(SCORES.values.mT, SCORES.train_ids, METHOD),
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


def test_the_longest_and_shortest_vectors_of_an_embedding_are_shown():
    html = RESULTS["embedding"]._repr_html_()
    norms = SCORES.values.norm(dim=0)
    for sample, norm in ((int(norms.argmax()), norms.max()), (int(norms.argmin()), norms.min())):
        assert f"#{100 + sample} " in html
        assert f"{norm:+.3g}" in html


IDS = torch.arange(23)
SUSPICION = torch.rand(23, generator=torch.Generator().manual_seed(5))
NOTES = (Note("a < b", "c > d"),)
TABLES = {
    "mislabeled": Mislabeled(IDS, 1 - SUSPICION, {"loss": SUSPICION}, 5, True, 5, None, NOTES),
    "duplicates": Duplicates((IDS[2:4], IDS[7:11]), IDS, SUSPICION, None, 0.9, NOTES),
    "shortcut": Shortcut((Effect("<b>", 1.5, 0.01, 3),), SampleScores(SUSPICION, IDS, ""), 7, 99),
    "trajectory": Trajectory(torch.randn(3, 5, 7), IDS[:7], IDS[:5], IDS[:3], "epoch", ""),
    "alarms": Alarms((Alarm("never_seen", IDS[:3], "a < b"),), ("labels: <none>",)),
}


OUR_TAGS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "span"}


class Texts(HTMLParser):
    """The texts and the tags of some markup, as a browser reads them."""

    def __init__(self, markup):
        super().__init__()
        self.texts, self.tags = [], set()
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, content):
        self.texts.append(content)


@pytest.mark.parametrize("result", TABLES.values(), ids=TABLES)
def test_a_result_shows_the_first_rows_of_its_table(result):
    page = Texts(result._repr_html_())
    assert page.tags <= OUR_TAGS
    head, *lines = repr(result).splitlines()
    assert head in page.texts
    assert {line.strip() for line in lines if "note:" in line} <= set(page.texts)
    frame = result._shown_first()
    assert set(map(str, frame.columns)) <= set(page.texts)
    assert any(f"{len(frame) - 10:,} more" in text for text in page.texts) == (len(frame) > 10)


def test_the_most_suspicious_samples_are_shown_first():
    texts = Texts(TABLES["mislabeled"]._repr_html_()).texts
    worst = [str(sample) for sample in SUSPICION.argsort(descending=True)[:5].tolist()]
    assert [text for text in texts if text in worst][:5] == worst


def test_without_pandas_the_lines_of_the_text_are_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = TABLES["shortcut"]
    page = Texts(result._repr_html_())
    assert page.tags == {"p", "pre"}
    assert "\n".join(page.texts) == repr(result)


def test_hostile_strings_in_a_table_are_texts():
    alarms = Alarms(tuple(Alarm(text, IDS[:1], text) for text in HOSTILE), ())
    for start in range(0, len(HOSTILE), 10):
        page = Texts(Alarms(alarms.raised[start : start + 10], ())._repr_html_())
        assert page.tags <= OUR_TAGS | {"pre"}
        shown = "".join(page.texts)
        assert all(text in shown for text in HOSTILE[start : start + 10] if "\r" not in text)


def test_contributions_show_their_sums():
    contributions = Contributions(torch.randn(3, 5, 7), IDS[:3], IDS[:5], IDS[:7], METHOD)
    assert contributions.scores()._repr_html_() in contributions._repr_html_()
    frame = contributions.to_pandas()
    assert list(frame.columns) == ["query", "train_id", "step", "contribution"]
    assert frame.contribution.sum() == pytest.approx(float(contributions.values.sum()), abs=1e-4)


def test_every_result_is_shown_in_notebooks():
    names = [info.name for info in pkgutil.walk_packages(tda_lightning.__path__, "tda_lightning.")]
    rooms = ("results", "applications", "metrics", "attribution", "report")
    ours = [name for name in names if name.split(".")[1] in rooms]
    modules = [import_module(name) for name in ours if not name.endswith(".quanda")]
    classes = {cls for m in modules for _, cls in inspect.getmembers(m, inspect.isclass)}
    ours = [c for c in classes if c.__module__.startswith("tda_lightning")]
    results = [c for c in ours if hasattr(c, "to_pandas") or issubclass(c, SavedResult)]
    missing = [c.__name__ for c in results if not hasattr(c, "_repr_html_")]
    assert missing == ["SavedResult"]
