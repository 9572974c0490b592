"""`epsim traffic decay`: load-aware placements that are fitted on one part of the traffic, scored on others."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.inputs import read_file
from sim.cli.terminal import add_output, answer, estimate, print_rows, print_table, say, shown_progress
from sim.errors import InputError, counted
from sim.files import model_label
from sim.options import FigureOptions, FileOptions, PlacedOptions
from sim.options.declare import add_options


def add_decay(parser: ArgumentParser) -> None:
    """Fit a load-aware placement on a part of the file and score it on later ones, or on another file."""
    parser.add_argument("file", type=Path, metavar="FILE", help="recorded routing or load counts (epsim traffic show)")
    add_options(parser, PlacedOptions, only=("ep_sizes", "placements", "ranks_per_node"), placements="eplb",
        helps={"placements": "load-aware ones, fitted and scored beside linear: eplb, eplb_refined, eplb+N, ..."})  # fmt: skip
    add_options(parser, FileOptions, only=("model", "phase", "against", "plot", "n_windows", "seed"))
    add_options(parser, FigureOptions)
    add_output(parser)


def run_decay(arguments: Namespace) -> None:
    from sim.model import load_model

    model = load_model(arguments.model)
    data = read_file(arguments.file, model, arguments.phase)
    chosen = {name: getattr(arguments, name) for name in ("placements", "ep_sizes", "ranks_per_node")}
    (_of_ages if arguments.against is None else _of_files)(arguments, model, data, chosen)


def _unless_linear(text: Any) -> Any:
    """A column that linear, which is fitted on nothing, does not have."""
    return lambda row: "-" if row.placement == "linear" else text(row)


_CELL: dict[str, Any] = {"placement": "placement", "EP": "ep_size"}
_FIGURES: dict[str, Any] = {
    "imbalance (95 %)": lambda row: estimate(row.imbalance_mean, row.imbalance_high, ".3f"),
    "fresh": _unless_linear(lambda row: f"{row.fresh_mean:.3f}"),
    "linear": "linear_mean:.3f",
    "minus linear (95 %)": _unless_linear(lambda row: estimate(row.change_mean, row.change_high, "+z.3f")),
    "excess removed (95 %)": _unless_linear(lambda row: estimate(row.removed_mean, row.removed_high, "z.0%")),
    "gain lost (95 %)": _unless_linear(lambda row: estimate(row.lost_mean, row.lost_high, "z.0%")),
}


def _of_ages(arguments: Namespace, model: Any, data: Any, chosen: dict[str, Any]) -> None:
    from sim.fit import decay
    from sim.traffic.split import cut_windows

    n_windows = 8 if arguments.n_windows is None else arguments.n_windows
    windows = cut_windows(data, model.n_experts, n_windows)
    halves, unit = windows.halves, windows.unit
    with shown_progress():
        table = decay(model, windows, **chosen)

    def show() -> None:
        title = (
            f"{halves.name}, {model_label(model.name)}: max / mean rank load of placements that are fitted on one of "
            f"{n_windows} windows and scored on it or on a later one\n"
            "age: from the fitted window to the scored one, in file order; of each window one "
            f"half is fitted, one scored: {halves.about}"
        )
        columns = _CELL | {
            "age windows": lambda row: "any" if row.placement == "linear" else str(row.age_windows),
            f"age {unit}": _unless_linear(lambda row: f"{getattr(row, f'age_{unit}'):,.0f}"),
            "pairs": "pairs",
        }
        if not arguments.markdown:
            for name in _fitted_names(table):
                _say_ages(name, table[table.placement == name], unit)
            print()
        print_table(title, table.itertuples(), columns | _FIGURES, arguments.markdown, align="<", keys=4)
        if not arguments.markdown:
            _explain("window", halves.fitted.shape[1])

    about = {"model": model.name, "file": halves.name, "digest": halves.digest, "windows": n_windows, **chosen}

    def figures() -> dict[str, Any]:
        from sim.figures.traffic import decay_by_age

        return {"decay": decay_by_age(table, halves.name, model_label(model.name), unit)}

    answer(arguments.plot, arguments, show, {"decay": table}, about, figures)


def _of_files(arguments: Namespace, model: Any, data: Any, chosen: dict[str, Any]) -> None:
    from sim.fit import decay_against
    from sim.traffic.split import cut_file

    for name, why in (("n_windows", "each file is one window"), ("plot", "it draws ages, and two files have none")):
        if getattr(arguments, name) is not None:
            raise InputError(f"`{name}` does not go with --against in epsim traffic decay: {why}")
    other = read_file(arguments.against, model, arguments.phase)
    first, second = (cut_file(part, model.n_experts, seed=arguments.seed) for part in (data, other))
    with shown_progress():
        table = decay_against(model, first, second, **chosen)
    if print_rows(table, arguments):
        return
    about = first.about if first.about == second.about else f"{first.name} {first.about}, {second.name} {second.about}"
    title = (
        f"{model_label(model.name)}: max / mean rank load of placements that are fitted on one file and scored on it or "
        f"on another\nof each file one half is fitted, one scored: {about}"
    )
    columns = _CELL | {
        "fitted on": lambda row: "any" if row.placement == "linear" else row.fitted,
        "scored on": "scored",
    }
    if not arguments.markdown:
        for name in _fitted_names(table):
            _say_files(name, table[table.placement == name])
        print()
    print_table(title, table.itertuples(), columns | _FIGURES, arguments.markdown, align="<><<", keys=4)
    if not arguments.markdown:
        _explain("file", first.fitted.shape[1])


def _fitted_names(table: Any) -> list[str]:
    return [name for name in dict.fromkeys(table.placement) if name != "linear"]


def _explain(part: str, n_layers: int) -> None:
    over = "none: the file has one layer"
    if n_layers > 1:
        over = (
            f"over {n_layers} layers, for these {part}s; a share has no interval where what it is a share of may be 0, and is - "
            "where that is 0"
        )
    print()
    say(
        f"fresh, linear: on the same scored halves, fresh being fitted on the other half of the scored {part}; excess: linear's "
        f"imbalance - 1; gain lost: of fresh's gain over linear, above 100 % it is worse than linear; 95 %: {over}"
    )


def _say_ages(name: str, rows: Any, unit: str) -> None:
    """What is lost after one window and at the oldest age, and from which age on no gain is shown."""
    for age in dict.fromkeys((1, rows.age_windows.max())):
        of_age = rows[rows.age_windows == age]
        distance, pairs = of_age[f"age_{unit}"].iloc[0], of_age.pairs.iloc[0]
        lost = ", ".join(f"{_known(row.lost_mean, row.lost_high)} at EP {row.ep_size}" for row in of_age.itertuples())
        say(
            f"{name} at age {age} ({distance:,.0f} {unit}; {counted(pairs, 'pair')} of windows): of the gain of a "
            f"fresh fit it has lost {lost}."
        )
    if rows.change_high.isna().any():
        return
    first = []
    for ep_size, of_size in rows.groupby("ep_size", sort=False):
        reached = of_size[of_size.change_high >= 0].age_windows
        first.append(f"EP {ep_size} {f'age {reached.min()}' if len(reached) else 'never'}")
    say(f"{name} is first no better than linear (the paired interval reaches 0) at: {', '.join(first)}.")


def _say_files(name: str, rows: Any) -> None:
    """How much of the gain survives on the other file."""
    for (fitted, scored), of in rows[rows.fitted != rows.scored].groupby(["fitted", "scored"], sort=False):
        kept = [f"{_known(1 - row.lost_mean, 1 - row.lost_low)} at EP {row.ep_size}" for row in of.itertuples()]
        say(
            f"{name} fitted on {fitted}, scored on {scored}: of the gain that a fit to {scored} has, it keeps {', '.join(kept)} "
            "(below 0: worse than linear)."
        )


def _known(mean: float, high: float) -> str:
    """A share of a gain in words."""
    return estimate(mean, high, "z.0%") if mean == mean else "(there is none)"
