"""One self-contained page of sweeps and advice: pickers, curves with intervals, tables, provenance; no network.

The charts are Vega-Lite, declared with Vega-Altair: its bundle (vl-convert's, 0.9 MB) is a fifth of Plotly's, it draws to SVG,
which readers and browsers can zoom and print, and a chart is data that the page can give other rows and colours.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from sim.errors import InputError
from sim.files import whole_files
from sim.report.sources import read_sources

MAX_BYTES = 6_000_000
"""The most that a page may weigh: mail and chat refuse what is much larger."""


def write_report(folders: Sequence[Path | str], path: Path | str) -> Path:
    """Write a page of what `epsim sweep` and `epsim advise` wrote into folders; the page, replaced if it is there.

    Raises InputError where a folder holds neither, or something damaged, where Vega-Altair is not installed, and where the page
    would be too large; OSError.
    """
    path = Path(path)
    page = build_page([source for folder in folders for source in read_sources(Path(folder))]).encode()
    if len(page) > MAX_BYTES:
        raise InputError(
            f"the page would have {len(page) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: give fewer folders"
        )
    with whole_files(path) as (temporary,):
        temporary.write_bytes(page)
    return path


def build_page(sources: Sequence[dict[str, Any]]) -> str:
    """The page of sources as `read_sources` gives them; the same sources give the same page."""
    try:
        import altair
        import vl_convert
    except ImportError:
        raise InputError("the report needs Vega-Altair: pip install 'epsim[report]'") from None
    from sim.report.charts import charts

    names = list(dict.fromkeys(name for source in sources for name in source["placements"]))
    data = json.dumps({"sources": sources, "charts": charts(names)}, separators=(",", ":"), allow_nan=False)
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # the stub wants what has a default
    titles = list(dict.fromkeys(source["model"] for source in sources))
    parts = {
        "TITLE": escape(f"epsim: {', '.join(titles)}"),
        "BUNDLE": bundle.replace("</script", "<\\/script"),
        "DATA": base64.b64encode(gzip.compress(data.encode(), mtime=0)).decode(),
    }
    page = (files("sim.report") / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        before, mark, after = page.partition("{{" + name + "}}")
        assert mark
        page = before + text + after
    return page


__all__ = ["MAX_BYTES", "build_page", "write_report"]
