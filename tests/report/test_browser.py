"""The report in a real browser: nothing runs, nothing is loaded, everything can be reached."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
from chromium import EXECUTABLE, Chromium
from hostile_strings import HOSTILE
from reported_runs import report_on_texts

from tda_lightning.report.page.html import visible

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="there is no Chromium on this machine"),
    pytest.mark.xdist_group("browser"),
]
NAMES = HOSTILE[:3]  # of the classes
READ_RANKING = "[...document.querySelectorAll('#ranking tbody tr')].map(row => +row.dataset.sample)"


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return report_on_texts(folder, HOSTILE, class_names=NAMES, title=HOSTILE[1])


@pytest.fixture
def page(browser, path):
    tab = browser.open(path)
    yield tab
    browser.close(tab)


def as_in_a_page(text):
    """Return a text as HTML shows it, without its breaks of lines."""
    return " ".join(visible(text).split())


def test_hostile_strings_are_shown_and_never_run(page):
    shown = set()
    for place in range(1, len(HOSTILE) + 1):
        page.click(f"#query-strip button:nth-child({place})")
        shown.add(" ".join(page.text("#query-detail .fulltext").split()))
    assert shown == {as_in_a_page(text) for text in HOSTILE}
    assert page.text("h1") == visible(HOSTILE[1])
    page.browser.listen(0.3)
    assert page.evaluate("window.hit ?? null") is None
    injected = "main script, main iframe, main form, main a, main style, main svg, main base"
    assert page.evaluate(f"document.querySelector('{injected}')") is None
    assert page.complaints == []


def test_the_page_forbids_whatever_might_be_injected(page):
    injected = "<img src=x onerror=window.hit=1>"
    page.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{injected}')")
    script = "Object.assign(document.createElement('script'), {textContent: 'window.hit = 1'})"
    page.evaluate(f"document.body.append({script})")
    page.browser.listen(0.3)
    assert page.evaluate("window.hit ?? null") is None
    assert any("inline event handler" in complaint for complaint in page.complaints)
    assert any("inline script" in complaint for complaint in page.complaints)
    assert any(complaint.endswith("/x") for complaint in page.complaints)


def test_every_training_sample_is_in_the_ranking(page):
    ids = set()
    while True:
        ids |= set(page.evaluate(READ_RANKING))
        if page.evaluate("document.querySelector('#rank-next').disabled"):
            break
        page.click("#rank-next")
    assert ids == set(range(len(HOSTILE)))


def test_searching_finds_a_query_by_its_text(page):
    page.write("#query-search", "passwd")
    assert page.text("#query-count") == "1 of 50 queries"
    assert "passwd" in page.text("#query-detail .fulltext")


def test_filters_split_the_queries(page):
    counts = []
    for kind in ("wrong", "right"):
        page.choose("#query-filter", kind)
        marks = page.texts("#query-strip .name")
        counts.append(len(marks))
        assert all(mark.startswith("✗" if kind == "wrong" else "✓") for mark in marks)
    assert sum(counts) == len(HOSTILE)


def test_filters_without_choices_are_not_shown(browser, tmp_path):
    def unknown(module, batch):
        raise ValueError("There are no answers.")

    page = browser.open(report_on_texts(tmp_path, HOSTILE[:11], outputs=unknown))
    is_gone = "document.querySelector('{}').offsetParent === null"
    assert page.evaluate(is_gone.format("#query-filter"))
    assert not page.evaluate(is_gone.format("#rank-label"))
    browser.close(page)


def test_the_ranking_is_sorted_by_a_click_on_a_heading(page):
    page.click("#ranking th[data-key=id] button")
    numbers = page.evaluate(READ_RANKING)
    assert numbers == sorted(numbers)
    order = page.evaluate("document.querySelector('#ranking th[data-key=id]').ariaSort")
    assert order == "ascending"


def test_arrow_keys_choose_the_next_query(page):
    page.evaluate("document.querySelector('#query-strip button').focus()")
    before = page.text("#query-detail h3")
    page.press("ArrowRight")
    assert page.text("#query-detail h3") != before
    second = "document.querySelector('#query-strip button:nth-child(2)')"
    assert page.evaluate(f"{second}.getAttribute('aria-pressed')") == "true"


def test_a_wrong_answer_leads_to_its_query_and_to_the_samples_behind_it(page):
    query = page.evaluate("document.querySelector('.cases li').dataset.query")
    samples = page.evaluate("document.querySelector('.cases li').dataset.samples").split()
    page.choose("#query-filter", "right")
    page.click(".cases li .wrong-query")
    assert page.text("#query-detail h3") == f"Query {query}: answered wrong"
    names = "[...document.querySelectorAll('.cases li:first-child .tile')].map(n => n.ariaLabel)"
    assert [name.split()[2].rstrip(",") for name in page.evaluate(names)] == samples
    page.click(".cases li .tile")
    chosen = page.evaluate("document.querySelector('#ranking tr.chosen').dataset.sample")
    assert chosen == samples[0]


def test_a_sample_of_a_finding_is_found_in_the_ranking(page):
    page.write("#rank-search", "nothing has this text")
    name = page.evaluate("document.querySelector('.strip button').ariaLabel")
    page.click(".strip button")
    chosen = page.evaluate("document.querySelector('#ranking tr.chosen').dataset.sample")
    assert name.startswith(f"Training sample {chosen},")


@pytest.mark.parametrize("button", ["#query-export", "#rank-export"])
def test_no_cell_of_an_exported_table_is_a_formula(page, button, tmp_path):
    text = page.download(button, tmp_path).read_bytes().decode("utf-8-sig")
    rows = list(csv.reader(text.splitlines()))
    assert len(rows) > len(HOSTILE)
    cells = [cell for row in rows[1:] for cell in row if cell.strip()]
    assert any("script" in cell for cell in cells)
    for cell in cells:
        assert cell.strip()[0] not in "=+-@" or float(cell) is not None


@pytest.mark.skipif(find_spec("axe_core_python") is None, reason="axe-core-python is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_axe_finds_no_violation(browser, path, width, scheme):
    page = browser.open(path, width, scheme)
    source = Path(find_spec("axe_core_python").origin).parent / "axe.min.js"
    page.evaluate(source.read_text(encoding="utf-8"))
    result = page.evaluate("axe.run()")
    assert [entry["id"] for entry in result["violations"]] == []
    assert len(result["passes"]) > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    browser.close(page)


def test_the_switch_turns_the_page_dark(page):
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.skipif(find_spec("bokeh") is None, reason="Bokeh is not installed")
def test_another_query_has_another_trajectory(page):
    page.evaluate("document.querySelector('#when').scrollIntoView()")
    trajectories = "plots().some(p => [...p.references()].some(m => m.name === 'trajectory-lines'))"
    page.wait(trajectories)
    models = "plots().flatMap(plot => [...plot.references()])"
    names = f"{models}.find(model => model.name === 'trajectory-lines').data.name"
    before = page.evaluate(names)
    page.click("#query-strip button:nth-child(2)")
    assert page.evaluate(names) != before
