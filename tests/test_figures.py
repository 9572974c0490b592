"""Figures show what the tables say, answer within their axes, and are not drawn where they would show nothing."""

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import assert_nothing_overlaps
from matplotlib.text import Text

from sim import InputError, sweep
from sim.figures import FIGURES, draw
from sim.figures.style import log2_ticks, look, panels
from sim.stats import best_rows


@pytest.fixture(scope="module")
def result():
    return sweep(
        "deepseek-v3", "gpqa-tilted", ep_sizes=[1, 8, 12, 48], tokens=[1, 8, 64], trials=80,
        placements=["linear", "linear_legacy", "round_robin", "node_aware"],
    )  # fmt: skip


def lines(ax, color):
    return [line for line in ax.get_lines() if line.get_color() == color]


def panel(figure, title):
    return next(ax for ax in figure.axes if title in ax.get_title(loc="left"))


def title_of(figure):
    return " ".join(figure._suptitle.get_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_name_and_no_text_lies_over_another_or_is_too_small(name, result):
    figure = FIGURES[name](result)
    assert_nothing_overlaps(figure)
    axes = figure.axes
    assert all(ax.get_legend() is None for ax in axes)
    assert any(ax.get_xlabel() for ax in axes)
    assert any(ax.get_ylabel() for ax in axes)
    titles = [t.get_window_extent() for ax in axes for t in (ax.title, ax._left_title, ax._right_title) if t.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 9


@pytest.mark.parametrize("name", ["exceedance", "worst_case_by_ep", "unlucky_steps", "idle_ranks"])
def test_probabilities_end_at_1_and_no_arrow_leaves_its_axes(name, result):
    figure = FIGURES[name](result)
    figure.draw_without_rendering()
    for ax in figure.axes:
        low, high = ax.get_ylim()
        assert high == 1
        for line in ax.get_lines():
            if "arrow" in str(line.get_marker()):
                y = np.asarray(line.get_ydata(), float)
                assert ((y > 1.5 * low) & (y <= high)).all()


@pytest.mark.parametrize(("what", "row"), [("mean", 0), ("p99", 1)])
def test_what_another_placement_buys_is_the_ratio_of_the_tables_numbers(what, row, result):
    figure = draw("against_baseline", result)
    n = len(figure.axes) // 2
    ax = figure.axes[row * n + n - 1]  # of the largest steps
    cells = result.summary.query("tokens == 64 and ep_size > 1").set_index(["placement", "ep_size"])
    of, base = (cells.loc[name][f"imbalance_{what}"].sort_index() for name in ("round_robin", "linear"))
    np.testing.assert_allclose(lines(ax, "#0072B2")[0].get_ydata(), of / base - 1)
    assert lines(ax, "#000000")[0].get_ydata() == pytest.approx(0)
    figure = draw("imbalance_by_tokens", result)
    cells = result.summary.query("ep_size == 12").set_index(["placement", "tokens"])
    rows = cells[f"imbalance_{what}"]
    ratios = rows["round_robin"] / rows["linear"] - 1
    if what == "p99":  # of fewer than 16 pairs it jumps
        ratios = ratios.mask((rows * cells.mean_load).groupby("tokens").min() < 16)
        assert ratios.isna().tolist() == [True, True, False]
    ax = figure.axes[row * (len(figure.axes) // 2) + 1]
    np.testing.assert_allclose(lines(ax, "#0072B2")[0].get_ydata(), ratios)


@pytest.mark.slow
def test_the_ratios_interval_is_that_of_paired_ratios():
    """Over 100 seeds (fixed) the 95 % interval holds the ratio of a long run; 88 hits or fewer have probability 0.5 %."""
    options = {"ep_sizes": 8, "tokens": 8, "placements": ["linear", "round_robin"], "bound_layers": 0, "threads": 1}
    options["received"] = "off"
    truth = sweep("deepseek-v3", "chat", trials=40_000, seed=1000, **options).against_baseline().iloc[1]["mean"]
    hits = 0
    for seed in range(100):
        row = sweep("deepseek-v3", "chat", trials=60, seed=seed, **options).against_baseline().iloc[1]
        hits += row["mean_low"] <= truth <= row["mean_high"]
    assert hits >= 89


def test_exceedance_is_drawn_from_the_counts(result):
    figure = FIGURES["exceedance"](result)
    ax = panel(figure, "EP 8")
    line = max(lines(ax, "#0072B2"), key=lambda line: line.get_linewidth())  # the thin one is of the bounds
    x, p = line.get_data()
    tail = result.tail[result.tail.given == ""]
    tail = tail.query("placement == 'round_robin' and ep_size == 8 and tokens == 64 and metric == 'imbalance'")
    for row in tail.itertuples():
        at = np.searchsorted(x, row.threshold - 1e-9)
        assert (p[at] if at < len(p) else 0.0) == pytest.approx(row.probability)
        curve = result.exceedance("imbalance", "round_robin", 8, 64)
        seen = curve[curve["value"] >= row.threshold - 1e-9].head(1)
        assert seen[["low", "high"]].to_numpy().ravel() == pytest.approx([row.low, row.high][: 2 * len(seen)])
    assert "linear_legacy = linear at EP 8" in title_of(figure)
    assert not lines(ax, "#D55E00")


def with_theory(result, method, given="", off=1.0):
    """The result with rows of a method at EP 8 and 64 tokens: half of round_robin's sampled probability, and deeper."""
    tail = result.tail
    rows = tail[
        (tail.metric == "imbalance") & (tail.placement == "round_robin") & (tail.ep_size == 8) & (tail.tokens == 64)
    ]
    sampled = rows[(rows.method == "sampled") & (rows.threshold <= 2.5)].copy()
    p = off * 10.0 ** -(2 + np.arange(len(sampled)))
    new = sampled.assign(method=method, given=given, probability=p, low=0.9 * p, high=1.1 * p)
    return dataclasses.replace(result, tail=pd.concat([tail[tail.method == "sampled"], new])), new


@pytest.mark.slow
def test_rows_beyond_sampling_are_thin_lines_and_rare_events_are_points_with_a_band(result):
    for method, column in (("exact", "high"), ("rare", "probability")):
        with_rows, rows = with_theory(result, method)
        figure = FIGURES["exceedance"](with_rows)
        line = min(lines(panel(figure, "EP 8"), "#0072B2"), key=lambda line: line.get_linewidth())
        drawn = dict(zip(*line.get_data(), strict=True))
        assert drawn.items() <= dict(zip(rows.threshold, rows[column].clip(lower=1e-7), strict=True)).items()
        assert len(drawn) > 3
        assert (line.get_marker() == "o") == (method == "rare")
        assert {"exact": "exact", "rare": "rare-event estimate"}[method] in title_of(figure)
        assert {ax.get_ylim()[0] for ax in figure.axes} == {1e-6}
    deeper = FIGURES["exceedance"](with_rows, deepest=1e-12)
    assert {ax.get_ylim()[0] for ax in deeper.axes} == {1e-12}


def test_bounds_of_layers_that_are_not_typical_are_left_out_and_the_figure_says_so(result):
    figure = FIGURES["exceedance"](with_theory(result, "bound", "3 drawn layers", off=1e-6)[0])
    assert len(lines(panel(figure, "EP 8"), "#0072B2")) == 1
    assert "left out: 1 curve" in title_of(figure)


@pytest.mark.slow
def test_exceedance_has_at_most_six_panels_and_names_the_ep_sizes_that_it_leaves_out():
    sizes = [2, 4, 8, 16, 24, 32, 48, 64, 128, 256]
    many = sweep("deepseek-v3", "uniform", ep_sizes=sizes, tokens=64, placements=["linear", "round_robin"], trials=40)
    figure = many.plot("exceedance")
    drawn = [int(ax.get_title(loc="left").removeprefix("EP ")) for ax in figure.axes]
    assert drawn == [8, 16, 24, 32, 64, 128]
    assert "not drawn: EP\xa02, 4, 48, 256" in figure._suptitle.get_text()


def test_unlucky_steps_are_the_tables_numbers_and_a_panel_has_something_to_say(result):
    figure = FIGURES["unlucky_steps"](result)
    tail = best_rows(result.tail)
    for ax in figure.axes:
        step, event = re.match(r"(\d+) tokens?: (.*)", ax.get_title(loc="left")).groups()
        rows = tail[(tail.placement == "linear") & (tail.tokens == int(step)) & (tail.ep_size > 1)]
        if event == "all load on one rank":
            rows = rows[rows.metric == "one_rank"]
        else:
            rows = rows[(rows.metric == "idle_ranks") & (rows.threshold == (rows.ep_size + 1) // 2)]
        rows = rows.sort_values("ep_size")
        known = rows[(rows.low > 0) & (rows.probability > 0)]
        drawn = [p for p in lines(ax, "#000000")[0].get_ydata() if p == p]
        np.testing.assert_allclose(drawn, known.probability)
        of_any = tail[(tail.tokens == int(step)) & (tail.ep_size > 1)]
        assert ((of_any.low > 1e-6) & (of_any.low < 0.99)).any()
    assert figure.axes


def test_worst_cases_are_the_tables_numbers(result):
    figure = FIGURES["worst_case_by_ep"](result)
    for ax, level in zip(figure.axes, (1.5, 2.0), strict=True):
        rows = best_rows(result.tail).query(
            "placement == 'linear' and tokens == 64 and metric == 'imbalance' and ep_size > threshold"
        )
        rows = rows[(rows.threshold == level) & (rows.low > 0) & (rows.high >= 1e-6)].sort_values("ep_size")
        np.testing.assert_allclose(lines(ax, "#000000")[0].get_ydata(), rows.probability)


def test_who_is_hot(result):
    """Linear's rank 0 under a popularity that falls with the index; linear_legacy's last rank at EP 48."""
    figure = FIGURES["load_by_rank"](result)
    linear = lines(panel(figure, "EP 8"), "#000000")[0].get_ydata()
    assert linear.argmax() == 0
    assert linear.mean() == pytest.approx(1)
    assert lines(panel(figure, "EP 48"), "#D55E00")[0].get_ydata().argmax() == 47


def test_fan_out_points_are_the_tables_numbers_on_one_scale(result):
    figure = FIGURES["fan_out_trade"](result)
    row = result.summary.query("placement == 'node_aware' and ep_size == 48 and tokens == 64").iloc[0]
    column = next(i for i, ax in enumerate(figure.axes) if ax.get_title(loc="left") == "EP 48")
    n = len(figure.axes) // 2
    for ax, what in ((figure.axes[column], "ranks"), (figure.axes[column + n], "nodes")):
        points = [line.get_xydata()[0].tolist() for line in lines(ax, "#009E73") if line.get_marker() == "v"]
        assert points[0] == pytest.approx([row[f"{what}_per_token_mean"], row.imbalance_mean])
    for row_of_axes in (figure.axes[:n], figure.axes[n:]):
        assert len({ax.get_xlim() for ax in row_of_axes}) == 1
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_what_would_show_nothing_is_not_drawn():
    even = sweep("deepseek-v3", "uniform", ep_sizes=8, tokens=4096, placements=["linear", "linear_legacy"], trials=40)
    for name in ("load_by_rank", "idle_ranks", "unlucky_steps", "fan_out_trade", "imbalance_by_tokens"):
        assert draw(name, even) is None
    with pytest.raises(InputError, match="'load_by_rank' would show nothing"):
        even.plot("load_by_rank")


def test_a_sweep_of_one_ep_size_is_drawn_at_its_tick(result):
    one = sweep("deepseek-v3", "chat", ep_sizes=16, tokens=8, placements=["linear", "round_robin"], trials=40)
    for name in ("against_baseline", "worst_case_by_ep"):
        ax = draw(name, one).axes[0]
        assert ax.get_xticks().tolist() == [16]
        assert all(set(line.get_xdata()) <= {16, 0, 1} for line in ax.get_lines())  # 0 and 1: a line across
        low, high = ax.get_xlim()
        assert low * high == pytest.approx(16 * 16)


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize(
    "values", [[8, 64, 512, 2048, 8192, 16384], [2**i for i in range(15)], [2, 4, 8, 12, 16, 24, 32, 256]]
)
def test_a_log_axis_has_labels_at_its_ends_and_none_over_another(values, columns):
    figure, axes = panels(columns, columns, 2.0)
    for ax in axes:
        log2_ticks(ax, values)
    figure.draw_without_rendering()
    for ax in axes:
        assert {values[0], values[-1]} <= set(ax.get_xticks())
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert len(boxes) >= 4
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_redundant_slots_look_different():
    names = [
        f"{base}{plus}" for base in ("linear", "eplb", "eplb_refined") for plus in ("", "+16", "+32", "+64", "+128")
    ]
    assert len({str(look(name)) for name in names}) == len(names)


def test_a_result_shows_itself_in_short_and_as_the_answers_table(result, tmp_path):
    assert repr(result) == (
        "SweepResult: deepseek-v3, gpqa-tilted traffic, 4 placements x 4 EP sizes x 3 step sizes, 80 trials"
    )
    cell = result.summary.query("placement == 'round_robin' and ep_size == 8 and tokens == 64").iloc[0]
    page = result._repr_html_()
    assert f"<td>{cell.imbalance_mean:.2f} ({cell.imbalance_p99:.2f})</td>" in page
    marked = dataclasses.replace(result, summary=result.summary.assign(workload="<b>"))
    assert "<b>" not in marked._repr_html_()
    result.save(tmp_path / "kept")
    assert (tmp_path / "kept" / "summary.csv").is_file()
    with pytest.raises(InputError, match="figure 'exceedance' has no option 'depth'"):
        result.plot("exceedance", depth=1)
    with pytest.raises(InputError, match="did you mean exceedance"):
        result.plot("exceedence")
