"""The charts of the page, as Vega-Lite declared with Vega-Altair; the page fills in their rows."""

from typing import Any

import altair as alt

from sim.figures.style import look

_SHAPES = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "<": "triangle-left", ">": "triangle-right",
    "D": "diamond", "d": "diamond", "P": "cross", "X": "cross", "*": "triangle", "h": "circle", "p": "square",
}  # fmt: skip
_DASHES = {"-": [1, 0], "--": [6, 3], "-.": [6, 2, 2, 2], ":": [2, 2]}
_FORMAT = ".6~g"


def charts(placements: list[str]) -> dict[str, Any]:
    """Specifications by name: a metric against tokens per step and against EP size, and how often the imbalance reaches x."""
    return {
        "by_tokens": _curves(placements, "tokens", "tokens per step (whole EP group)"),
        "by_ep": _curves(placements, "ep_size", "EP size (ranks)"),
        "tail": _tail(placements),
    }


def _style(placements: list[str]) -> dict[str, Any]:
    """Colour, dashes and shape of each placement, as in the figures."""
    looks = [look(name) for name in placements]
    dashes = [_DASHES[style["linestyle"]] if isinstance(style["linestyle"], str) else [3, 1, 1, 1] for style in looks]
    legend = alt.Legend(title=None, orient="top", labelLimit=220, symbolSize=80, symbolOpacity=1)
    return {
        "color": alt.Color("placement:N", legend=legend).scale(
            domain=placements, range=[style["color"] for style in looks]
        ),
        "strokeDash": alt.StrokeDash("placement:N", legend=legend).scale(domain=placements, range=dashes),
        "shape": alt.Shape("placement:N", legend=legend).scale(
            domain=placements, range=[_SHAPES[style["marker"]] for style in looks]
        ),
    }


def _curves(placements: list[str], x: str, title: str) -> dict[str, Any]:
    """Lines with bands and points; exact values and intervals on hover."""
    style = _style(placements)
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X(f"{x}:Q", title=title, axis=alt.Axis(format="d", labelOverlap="greedy", labelSeparation=6)).scale(
            type="log", base=2, nice=False
        ),
        color=style["color"],
    )
    labels = alt.Axis(
        labelExpr=f"format(datum.value, '{_FORMAT}')", labelOverlap=True
    )  # a log scale's own leave some out
    y = alt.Y("value:Q", title=None, axis=labels).scale(type="log", nice=False)
    tooltip = [
        alt.Tooltip("placement:N"),
        alt.Tooltip("ep_size:Q", title="EP size"),
        alt.Tooltip("tokens:Q", title="tokens per step"),
        alt.Tooltip("exact:N", title="value"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
    return _drawn(base, y, style, tooltip, "placement:N")


def _tail(placements: list[str]) -> dict[str, Any]:
    """Sampled curves with their bands, and thin what goes beyond sampling."""
    style = _style(placements)
    base = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X("threshold:Q", title="imbalance x").scale(type="log", base=2, nice=False), color=style["color"]
    )
    y = alt.Y("value:Q", title="P(imbalance ≥ x)", axis=alt.Axis(format=".0e", tickCount=8)).scale(
        type="log", nice=False
    )
    tooltip = [
        alt.Tooltip("placement:N"),
        alt.Tooltip("threshold:Q", title="imbalance x", format=_FORMAT),
        alt.Tooltip("exact:N", title="probability"),
        alt.Tooltip("interval:N", title="95 % interval or bounds"),
        alt.Tooltip("method:N"),
    ]
    width = alt.condition("datum.sampled", alt.value(2.2), alt.value(0.9))
    return _drawn(base, y, style, tooltip, "method:N", width)


def _drawn(
    base: alt.Chart, y: alt.Y, style: dict[str, Any], tooltip: list[Any], detail: str, width: Any = alt.Undefined
) -> Any:
    """Bands, lines, points, and larger invisible points that make hovering easy."""
    band = base.mark_area(opacity=0.15).encode(y=y, y2="high:Q", detail=[detail]).transform_calculate(value="datum.low")
    line = base.mark_line().encode(y=y, strokeDash=style["strokeDash"], strokeWidth=width, detail=[detail])
    points = base.mark_point(filled=True, size=45).encode(y=y, shape=style["shape"])
    hover = base.mark_point(filled=True, size=500, opacity=0).encode(y=y, tooltip=tooltip)
    chart = alt.layer(band, line, points, hover).properties(width="container", height=300)
    return chart.resolve_scale(color="shared", shape="shared").to_dict(validate=False)
