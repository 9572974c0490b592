"""The page of `epsim report`, used in a real browser: what it shows is what the tables say, and nothing leaves it."""

import dataclasses
import importlib.util
import io
import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from sim import InputError, read_result, sweep
from sim.cli import main
from sim.report import MAX_BYTES, build_page, write_report
from sim.report.sources import read_sources

ADVICE = ROOT / "results/advice-gpt-oss-20b"
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
needs_altair = pytest.mark.skipif(
    importlib.util.find_spec("altair") is None or importlib.util.find_spec("vl_convert") is None,
    reason="Vega-Altair is not installed: pip install 'epsim[report]'",
)
HAS_BROWSER = BROWSER is not None and importlib.util.find_spec("playwright") is not None
pytestmark = needs_altair


def needs_browser(test):
    """A browser takes seconds of a processor."""
    reason = "no Chromium or no Playwright: apt-get install chromium; pip install playwright"
    return pytest.mark.slow(pytest.mark.skipif(not HAS_BROWSER, reason=reason)(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps") / "chat"
    placements = ["linear", "round_robin", "node_aware"]
    sweep(
        "deepseek-v3", "chat", ep_sizes=[4, 8, 16], tokens=[8, 64, 512], placements=placements, trials=60, threads=1
    ).save(path)
    return path


@pytest.fixture(scope="module")
def page_file(folder, tmp_path_factory):
    other = folder.with_name("uniform")
    placements = ["linear", "round_robin"]
    sweep(
        "deepseek-v3", "uniform", ep_sizes=[8, 32], tokens=[64, 128], placements=placements, trials=60, threads=1
    ).save(other)
    return write_report([folder, other, ADVICE], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser, page_file):
    """Opens the page from file://; what the console said, and every request, are kept, and checked at the end."""
    contexts, said, asked = [], [], []

    def open_page(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("body[data-draws]", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not said
    assert {url.partition(":")[0] for url in asked} <= {"file", "blob", "data"}
    assert {url for url in asked if url.startswith("file")} == {page_file.as_uri()}


def change(page, act):
    """Do something, and wait for the page to have drawn it."""
    before = page.evaluate("document.body.dataset.draws")
    act()
    page.wait_for_function("before => document.body.dataset.draws !== before", arg=before)


def lines(page, chart):
    """Paths of the lines of a chart."""
    return page.eval_on_selector_all(f"#{chart} .mark-line path", "paths => paths.map(path => path.getAttribute('d'))")


def table(page, chart):
    """Table behind a chart."""
    rows = page.eval_on_selector_all(
        f"#{chart} tr", "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    return pd.DataFrame(rows[1:], columns=rows[0])


@needs_browser
def test_the_page_opens_from_a_file_without_an_error_or_a_request(opened):
    page = opened()
    assert page.locator("section:visible").count() == 3
    for chart in ("by_tokens", "by_ep", "tail"):
        assert len(lines(page, chart)) >= 3
    assert "round_robin instead of linear" in page.inner_text("#answer") or "node_aware" in page.inner_text("#answer")


@needs_browser
def test_every_picker_changes_the_curves(opened):
    page = opened()
    for picker, value, chart in (
        ("#ep", "16", "by_tokens"), ("#tokens", "512", "by_ep"), ("#metric", "idle_ranks_mean", "by_tokens"),
        ("#source", "1", "by_ep"),
    ):  # fmt: skip
        before = lines(page, chart)
        change(page, lambda picker=picker, value=value: page.select_option(picker, value))
        assert lines(page, chart) != before, picker
    change(page, lambda: page.select_option("#source", "0"))
    drawn = len(lines(page, "by_tokens"))
    change(page, lambda: page.uncheck("#placements input[value=round_robin]"))
    assert len(lines(page, "by_tokens")) == drawn - 1
    assert "round_robin" not in set(table(page, "by_tokens").placement)


@needs_browser
def test_what_is_shown_equals_the_tables_of_the_sweep(opened, folder):
    page = opened()
    summary, tail = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "tail.csv", keep_default_na=False)
    for metric in ("imbalance_mean", "imbalance_p99", "ranks_per_token_mean"):
        if metric != page.input_value("#metric"):
            change(page, lambda metric=metric: page.select_option("#metric", metric))
        for chart, of in (("by_tokens", "ep_size == 8"), ("by_ep", "tokens == 64")):
            shown = table(page, chart)
            rows = summary.query(of)
            assert shown.placement.tolist() == rows.placement.tolist()
            wanted = rows[["ep_size", "tokens", metric, f"{metric}_low", f"{metric}_high"]]
            np.testing.assert_array_equal(shown.iloc[:, 1:].replace("", "nan").astype(float), wanted)
    shown = table(page, "tail")
    for method in ("sampled", "bound"):
        of = shown[shown.method == method].astype({"threshold": float, "value": float, "low": float, "high": float})
        rows = tail.query("ep_size == 8 and tokens == 64 and metric == 'imbalance' and method == @method")
        both = of.merge(rows, on=["placement", "threshold"])
        assert len(both) >= 3
        np.testing.assert_allclose(
            both[["value", "low_x", "high_x"]], both[["probability", "low_y", "high_y"]], rtol=1e-5
        )


@needs_browser
def test_hovering_a_point_shows_its_exact_value_and_interval(opened, folder):
    page = opened()
    change(page, lambda: page.select_option("#metric", "imbalance_mean"))
    change(page, lambda: page.uncheck("#placements input[value=linear]"))
    change(page, lambda: page.uncheck("#placements input[value=node_aware]"))
    page.locator("#by_tokens .layer_3_marks path").nth(2).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    said = page.inner_text("#vg-tooltip-element")
    row = (
        pd.read_csv(folder / "summary.csv")
        .query("placement == 'round_robin' and ep_size == 8 and tokens == 512")
        .iloc[0]
    )
    assert float(re.search(r"value:?\s*([\d.]+)", said)[1]) == row.imbalance_mean
    low, high = map(float, re.search(r"interval:?\s*([\d.]+) to ([\d.]+)", said).groups())
    assert [low, high] == [row.imbalance_mean_low, row.imbalance_mean_high]


@needs_browser
def test_the_table_behind_a_picture_downloads_as_csv(opened):
    page = opened()
    page.click("#by_ep summary")
    with page.expect_download() as download:
        page.click("#by_ep button")
    assert download.value.suggested_filename == "by_ep.csv"
    written = pd.read_csv(io.StringIO(download.value.path().read_text()), dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(written, table(page, "by_ep"), check_dtype=False)


@needs_browser
def test_the_page_is_used_by_keyboard_alone(opened):
    page = opened()
    names = ["source", "ep", "tokens", "metric", "log"]
    for name in names:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
    page.focus("#ep")
    change(page, lambda: page.keyboard.press("ArrowDown"))
    assert page.input_value("#ep") == "16"
    page.focus("#placements input")
    change(page, lambda: page.keyboard.press("Space"))
    assert not page.is_checked("#placements input[value=linear]")
    page.focus("#by_tokens summary")
    page.keyboard.press("Enter")
    assert page.is_visible("#by_tokens table")
    assert page.inner_text("#cell").startswith("EP 16, 64 tokens per step")


@needs_browser
def test_light_and_dark_and_a_phone(opened):
    """Text has a contrast of at least 4.5 (WCAG AA), curves of 3, in both; nothing is wider than a phone."""
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        colours = page.evaluate(
            """() => [...document.querySelectorAll('#answer, #cell, summary, label, .about, td')].filter(e => e.checkVisibility())
            .map(e => [getComputedStyle(e).color, getComputedStyle(e.closest('section') ?? document.body).backgroundColor])"""
        )
        assert len(colours) > 10
        assert min(contrast(*pair) for pair in colours) >= 4.5
        panel = page.eval_on_selector("#by_ep", "e => getComputedStyle(e).backgroundColor")
        strokes = page.eval_on_selector_all(
            "#by_ep .mark-line path", "paths => paths.map(p => getComputedStyle(p).stroke)"
        )
        assert min(contrast(stroke, panel) for stroke in strokes) >= 3
    page = opened(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.eval_on_selector("#by_ep svg", "svg => svg.getBoundingClientRect().width") <= 360


def contrast(first, second):
    """Contrast of two CSS colours rgb(r, g, b), after WCAG 2.2."""

    def light(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_advice_says_its_verdict_and_shows_no_gain_of_what_the_engine_will_not_run(opened):
    page = opened()
    change(page, lambda: page.select_option("#source", "2"))
    assert page.inner_text("#answer").startswith("Worth a trial: eplb+16 at 8192 tokens per step")
    assert "round_robin is not run by the engine: it runs linear" in page.inner_text("#answer")
    change(page, lambda: page.select_option("#metric", "layer_saved"))
    shown = table(page, "by_tokens")
    of_eplb = {"eplb", "eplb+16", "eplb+32", "eplb_budget+16"}
    assert set(shown.placement) == {"linear", *of_eplb, "in_step", "perfect balance"}
    advice = pd.read_csv(ADVICE / "advice.csv").query("placement == 'eplb+32'").head(4)
    np.testing.assert_array_equal(shown[shown.placement == "eplb+32"].layer_saved.astype(float), advice.layer_saved)
    assert not page.is_visible("#tail")


def test_the_same_folders_give_the_same_page_of_less_than_6_mb(folder, page_file, capsys, tmp_path):
    assert page_file.stat().st_size < MAX_BYTES
    assert main(["report", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    assert main(["report", str(folder), "--out", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "a.html" in capsys.readouterr().out


def test_the_answer_is_the_tables_number(folder):
    source = read_sources(folder)[0]
    ratios = read_result(folder).against_baseline()
    name = source["answer"].partition(" ")[0]
    best = ratios[ratios.placement == name]["mean"].min()
    assert f"by \N{MINUS SIGN}{100 * (1 - best):.1f} % at best" in source["answer"]


def test_without_counts_the_sampled_curve_is_that_of_tail_csv(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "counts.parquet").unlink()
    tail = read_sources(copy)[0]["tail"]
    rows = pd.read_csv(folder / "tail.csv").query("metric == 'imbalance' and method == 'sampled' and probability < 1")
    assert tail["method"].count(0) == len(rows)


def test_what_is_no_result_is_refused_in_one_line(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither a finished sweep"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    copy = shutil.copytree(ADVICE, tmp_path / "advice")
    (copy / "advice.csv").write_text("placement\n")
    with pytest.raises(InputError, match="is damaged or was changed"):
        write_report([copy], tmp_path / "r.html")
    assert main(["report", str(folder), "--out", str(tmp_path / "r.pdf")]) == 2
    assert "must be the name of a .html or .htm file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(InputError, match=r"pip install 'epsim\[report\]'"):
        write_report([folder], tmp_path / "r.html")
    assert not list(tmp_path.glob("r.*"))


@pytest.mark.slow
def test_names_cannot_break_out_of_the_page(folder, tmp_path):
    result = read_result(folder)
    hostile = "</script><img src=x onerror=alert(1)>"
    marked = dataclasses.replace(
        result, summary=result.summary.assign(model=hostile.replace("/", ""), workload=hostile)
    )
    marked.save(tmp_path / "marked")
    page = build_page(read_sources(tmp_path / "marked"))
    assert "<img src=x" not in page
    assert page.count("</script>") == 3
    assert json.dumps("default-src 'none'")[1:-1] in page
