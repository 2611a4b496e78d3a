"""The report in a real browser: nothing runs, nothing is loaded, everything can be reached."""

import csv
import shutil
from pathlib import Path

import pytest
from hostile_strings import HOSTILE
from reported_runs import report_on_texts

from tda_lightning.report.page.html import visible

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_core_python", reason="axe_core_python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.xdist_group("browser"),
]
NAMES = HOSTILE[:3]  # of the classes
WORRYING = ("error", "warning")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return report_on_texts(folder, HOSTILE, class_names=NAMES, title=HOSTILE[1])


def opened(browser, path, width=1440, scheme="light", bypass_csp=False):
    """Return a page, and the list of everything that it complains of or tries to load."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        reduced_motion="reduce",
        bypass_csp=bypass_csp,
    )
    page, complaints = context.new_page(), []
    page.on("console", lambda message: message.type in WORRYING and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on(
        "request",
        lambda request: (
            complaints.append(request.url)
            if "file:" not in request.url and not request.url.startswith(("data:", "blob:"))
            else None
        ),
    )
    page.goto(path.as_uri())
    page.wait_for_selector("#ranking tbody tr")
    return page, complaints


def as_in_a_page(text):
    """Return a text as HTML shows it, without its breaks of lines."""
    return " ".join(visible(text).split())


def test_hostile_strings_are_shown_and_never_run(browser, path):
    page, complaints = opened(browser, path)
    shown = set()
    for tile in page.query_selector_all("#query-strip button"):
        tile.click()
        shown.add(" ".join(page.text_content("#query-detail .fulltext").split()))
    assert shown == {as_in_a_page(text) for text in HOSTILE}
    assert page.text_content("h1") == visible(HOSTILE[1])
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    injected = "main script, main iframe, main form, main a, main style, main svg, main base"
    assert page.evaluate(f"document.querySelector('{injected}')") is None
    assert complaints == []


def test_every_training_sample_is_in_the_ranking(browser, path):
    page, _ = opened(browser, path)
    ids = set()
    read = "[...document.querySelectorAll('#ranking tbody tr')].map(row => +row.dataset.sample)"
    while True:
        ids |= set(page.evaluate(read))
        if page.is_disabled("#rank-next"):
            break
        page.click("#rank-next")
    assert ids == set(range(len(HOSTILE)))


def test_searching_finds_a_query_by_its_text(browser, path):
    page, _ = opened(browser, path)
    page.fill("#query-search", "passwd")
    assert page.text_content("#query-count") == "1 of 50 queries"
    assert "passwd" in page.text_content("#query-detail .fulltext")


def test_filters_split_the_queries(browser, path):
    page, _ = opened(browser, path)
    counts = []
    for kind in ("wrong", "right"):
        page.select_option("#query-filter", kind)
        counts.append(len(page.query_selector_all("#query-strip button")))
        names = "[...document.querySelectorAll('#query-strip .name')].map(n => n.textContent)"
        marks = page.evaluate(names)
        assert all(mark.startswith("✗" if kind == "wrong" else "✓") for mark in marks)
    assert sum(counts) == len(HOSTILE)


def test_the_ranking_is_sorted_by_a_click_on_a_heading(browser, path):
    page, _ = opened(browser, path)
    page.click("#ranking th[data-key=id] button")
    read = "[...document.querySelectorAll('#ranking tbody tr')].map(row => +row.dataset.sample)"
    numbers = page.evaluate(read)
    assert numbers == sorted(numbers)
    assert page.get_attribute("#ranking th[data-key=id]", "aria-sort") == "ascending"


def test_arrow_keys_choose_the_next_query(browser, path):
    page, _ = opened(browser, path)
    page.focus("#query-strip button")
    before = page.text_content("#query-detail h3")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#query-detail h3") != before
    assert page.get_attribute("#query-strip button:nth-child(2)", "aria-pressed") == "true"


def test_a_sample_of_a_finding_is_found_in_the_ranking(browser, path):
    page, _ = opened(browser, path)
    page.fill("#rank-search", "nothing has this text")
    button = page.query_selector(".strip button")
    button.click()
    chosen = page.get_attribute("#ranking tr.chosen", "data-sample")
    assert button.get_attribute("aria-label").startswith(f"Training sample {chosen},")


@pytest.mark.parametrize("button", ["#query-export", "#rank-export"])
def test_no_cell_of_an_exported_table_is_a_formula(browser, path, button, tmp_path):
    page, _ = opened(browser, path)
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(tmp_path / "table.csv")
    text = (tmp_path / "table.csv").read_bytes().decode("utf-8-sig")
    rows = list(csv.reader(text.splitlines()))
    assert len(rows) > len(HOSTILE)
    cells = [cell for row in rows[1:] for cell in row if cell.strip()]
    assert any("script" in cell for cell in cells)
    for cell in cells:
        assert cell.strip()[0] not in "=+-@" or float(cell) is not None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_axe_finds_no_violation(browser, path, width, scheme):
    page, _ = opened(browser, path, width, scheme, bypass_csp=True)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    result = page.evaluate("axe.run()")
    assert [entry["id"] for entry in result["violations"]] == []
    assert len(result["passes"]) > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_switch_turns_the_page_dark(browser, path):
    page, _ = opened(browser, path)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_another_query_has_another_trajectory(browser, path):
    pytest.importorskip("bokeh", reason="Bokeh is not installed")
    page, _ = opened(browser, path, bypass_csp=True)
    page.wait_for_function("plots().length === 4")
    models = "plots().flatMap(plot => [...plot.references()])"
    names = f"{models}.find(model => model.name === 'trajectory-lines').data.name"
    before = page.evaluate(names)
    page.click("#query-strip button:nth-child(2)")
    assert page.evaluate(names) != before
