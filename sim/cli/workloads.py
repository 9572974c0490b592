"""List the traffic presets: how uneven each is, what it stands for, where its figures come from and how near it is to them."""

from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.progress import shown_progress
from sim.cli.text import add_forms, filled, note_compiling, print_rows, print_table
from sim.options import WHOLE_NUMBERS, TrafficOptions, add_options
from sim.traffic import load_workload, workload_names


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim workloads`."""
    parser.add_argument(
        "--ep", type=WHOLE_NUMBERS, default="8,16,32,64", metavar="LIST", help="EP sizes (default: 8,16,32,64)"
    )
    add_options(parser, TrafficOptions, only=("model",))
    add_forms(parser)


def run(arguments: Namespace) -> None:
    """Run `epsim workloads`."""
    import pandas as pd

    note_compiling()
    rows, fits = _rows(arguments.model, arguments.ep)
    table = pd.DataFrame(rows)
    if print_rows(table, arguments):
        return
    _print_imbalances(table, arguments.ep, arguments.markdown)
    if arguments.markdown:
        return
    for workload in map(load_workload, workload_names()):
        print(f"\n{workload.name}")
        law = ", ".join(f"{key} {value}" for key, value in workload.law.items())
        lines = [("", workload.about), ("law: ", law), ("source: ", workload.source)]
        lines += [("published, and here: ", text) for text in fits[workload.name]]
        for name, text in lines:
            print(filled(f"{name}{text}", "    ", "    " + " " * (8 if name else 0)))
    print(
        "\nOn another model than the one that it is fitted to, a preset is an assumption.\n"
        "Recorded routing: file:TRACE, expert ids of tokens in .npz, .npy or JSON lines\n"
        "  (epsim traffic show TRACE).\n"
        "Fitted to a record or to load counts: the .toml file of epsim traffic fit.\n"
        "Your own law: a .toml file with the keys popularity, sigma, group_sigma,\n"
        "  request_sigma, tokens_per_request; local_share, context_tokens and context_shares where\n"
        "  the effect of a request decays.\n"
        "Which is nearest to a number in your log: epsim traffic match."
    )


def _rows(name: str, ep_sizes: list[int]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Imbalance of each preset at each EP size, on the model if it goes with that, else on the one that it is fitted to; and
    in words its published figures with what it has there.
    """
    from sim.errors import whole_number
    from sim.fit.made import mean_imbalances, misfits
    from sim.model import load_model
    from sim.progress import track
    from sim.router import model_for

    asked, names = load_model(name), workload_names()
    for size in ep_sizes:
        whole_number("`ep`", size, 1, 2**15)
    rows, fits = [], {}
    with shown_progress():
        for preset in track(names, [1.0] * len(names), names):
            workload = load_workload(preset)
            model = model_for(workload, asked)
            sizes = [size for size in ep_sizes if size <= model.n_experts]
            about = {"workload": preset, "model": model.name}
            rows += [
                {**about, "ep_size": size, "imbalance": mean, "low": mean - half, "high": mean + half}
                for size, (mean, half) in zip(sizes, mean_imbalances(workload, model, sizes), strict=True)
            ]
            fits[preset] = [_fit_text(figure, found) for figure, found in misfits(preset)]
    return rows, fits


def _fit_text(figure: Any, found: Any) -> str:
    """A published figure at its EP sizes, and what the preset has there."""
    parts = []
    for size, wanted, low, high, (mean, half) in zip(
        figure.ep_sizes, figure.imbalance, figure.low, figure.high, found, strict=True
    ):
        text = f"{wanted:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        parts.append(f"EP {size} {text}, here {mean:.2f} ± {half:.2f} ({mean / wanted - 1:+z.1%})")
    worst = f", the worst of {figure.worst_of} layers" if figure.worst_of > 1 else ""
    return f"{figure.data}{worst}: {'; '.join(parts)}"


def _print_imbalances(table: Any, ep_sizes: list[int], markdown: bool) -> None:
    title = (
        "Imbalance: mean over layers of max / mean rank load of a large step, linear placement, on the model or on the one that "
        "a preset is fitted to; ± 95 %, over layers"
    )
    cells = []
    for (name, model), rows in table.groupby(["workload", "model"], sort=False):
        of_size = {row.ep_size: f"{row.imbalance:.2f} ± {row.high - row.imbalance:.2f}" for row in rows.itertuples()}
        cells.append([name, model, *(of_size.get(size, "-") for size in ep_sizes)])
    print_table(title, ["workload", "model", *(f"EP {size}" for size in ep_sizes)], cells, markdown, align="<<")
