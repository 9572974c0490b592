"""Golden data of the figures: what is drawn is what the tables say."""

import numpy as np
import pytest

from sim import sweep
from sim.figures import FIGURES
from sim.figures.style import look
from sim.results import best_rows


@pytest.fixture(scope="module")
def result():
    return sweep(
        "deepseek-v3", "gpqa-tilted", ep_sizes=[1, 8, 12, 48], tokens=[1, 8, 64], trials=80,
        placements=["linear", "linear_legacy", "round_robin", "node_aware"],
    )  # fmt: skip


def lines(ax, color):
    return [line for line in ax.get_lines() if line.get_color() == color]


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_name_and_no_legend_lies_over_data(name, result):
    figure = FIGURES[name](result)
    figure.draw_without_rendering()
    axes = figure.axes
    assert all(ax.get_legend() is None for ax in axes)
    assert any(ax.get_xlabel() for ax in axes)
    assert any(ax.get_ylabel() for ax in axes)
    boxes = [ax.get_window_extent() for ax in axes]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(box) for box in boxes)
    title = figure._suptitle.get_window_extent()
    assert not any(title.overlaps(box) for box in [*boxes, legend])
    titles = [t.get_window_extent() for ax in axes for t in (ax.title, ax._left_title, ax._right_title) if t.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])


def test_exceedance_is_drawn_from_the_counts(result):
    figure = FIGURES["exceedance"](result)
    ax = next(ax for ax in figure.axes if ax.get_title(loc="left") == "EP 8")
    line = max(lines(ax, "#0072B2"), key=lambda line: line.get_linewidth())  # the thin one is of the bounds
    x, p = line.get_data()
    tail = result.tail[result.tail.given == ""]
    tail = tail.query("placement == 'round_robin' and ep_size == 8 and tokens == 64 and metric == 'imbalance'")
    for row in tail.itertuples():
        at = np.searchsorted(x, row.threshold - 1e-9)
        assert (p[at] if at < len(p) else 0.0) == pytest.approx(row.probability)
    assert "linear_legacy = linear" in ax.get_title(loc="right")
    assert not lines(ax, "#D55E00")


def test_the_thin_lines_are_the_rows_beyond_sampling(result):
    figure = FIGURES["exceedance"](result)
    ax = next(ax for ax in figure.axes if ax.get_title(loc="left") == "EP 8")
    line = min(lines(ax, "#0072B2"), key=lambda line: line.get_linewidth())
    rows = result.tail.query(
        "placement == 'round_robin' and ep_size == 8 and tokens == 64 and metric == 'imbalance' and given != ''"
    )
    drawn = dict(zip(*line.get_data(), strict=True))
    assert len(drawn) > 3
    assert min(drawn.values()) < 1e-13
    assert drawn.items() <= dict(zip(rows.threshold, rows.high, strict=True)).items()
    assert "drawn layers only" in figure._suptitle.get_text()


def test_unlucky_steps_are_the_tables_numbers(result):
    figure = FIGURES["unlucky_steps"](result)
    rows = result.tail.query("placement == 'linear' and tokens == 1 and metric == 'one_rank' and ep_size > 1")
    known = [row.probability for row in best_rows(rows).sort_values("ep_size").itertuples() if row.low > 0]
    line = lines(figure.axes[0], "#000000")[0]
    np.testing.assert_allclose([p for p in line.get_ydata() if p == p], known)


def test_worst_cases_and_means_are_the_tables_numbers(result):
    figure = FIGURES["worst_case_by_ep"](result)
    for ax, level in zip(figure.axes, (1.5, 2.0), strict=True):
        rows = result.tail[result.tail.given == ""].query(
            "placement == 'linear' and tokens == 64 and metric == 'imbalance' and threshold == @level"
        )
        rows = rows[(rows.ep_size > level)].sort_values("ep_size")
        np.testing.assert_allclose(lines(ax, "#000000")[0].get_ydata(), rows.probability.where(rows.probability > 0))
    figure = FIGURES["imbalance_by_tokens"](result)
    rows = result.summary.query("placement == 'linear' and ep_size == 12").sort_values("tokens")
    n = len(figure.axes) // 2
    for ax, column in ((figure.axes[1], "imbalance_mean"), (figure.axes[1 + n], "imbalance_p99")):
        np.testing.assert_allclose(lines(ax, "#000000")[0].get_data(), [rows.tokens, rows[column]])


def test_who_is_hot(result):
    """Linear's rank 0 under a popularity that falls with the index; linear_legacy's last rank at EP 48."""
    figure = FIGURES["load_by_rank"](result)
    of = {ax.get_title(loc="left"): ax for ax in figure.axes}
    linear = lines(of["EP 8"], "#000000")[0].get_ydata()
    assert linear.argmax() == 0
    assert linear.mean() == pytest.approx(1)
    assert lines(of["EP 48"], "#D55E00")[0].get_ydata().argmax() == 47


def test_fan_out_points_are_the_tables_numbers(result):
    figure = FIGURES["fan_out_trade"](result)
    row = result.summary.query("placement == 'node_aware' and ep_size == 48 and tokens == 64").iloc[0]
    column = next(i for i, ax in enumerate(figure.axes) if ax.get_title(loc="left") == "EP 48")
    for ax, what in ((figure.axes[column], "ranks"), (figure.axes[column + len(figure.axes) // 2], "nodes")):
        points = [line.get_xydata()[0].tolist() for line in lines(ax, "#009E73") if line.get_marker() == "v"]
        assert points[0] == pytest.approx([row[f"{what}_per_token_mean"], row.imbalance_mean])


def test_redundant_slots_look_different():
    names = [
        f"{base}{plus}" for base in ("linear", "eplb", "eplb_refined") for plus in ("", "+16", "+32", "+64", "+128")
    ]
    assert len({str(look(name)) for name in names}) == len(names)
