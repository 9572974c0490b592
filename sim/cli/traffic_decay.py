"""The answer of `epsim traffic decay`: load-aware placements that are fitted on one part of the traffic, scored on others."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from sim.cli.progress import shown_progress
from sim.cli.text import estimate, note, print_table
from sim.errors import InputError

_HEADS = ["imbalance (95 %)", "fresh", "linear", "minus linear (95 %)", "excess removed (95 %)", "gain lost (95 %)"]


def print_decay(arguments: Namespace, model: Any, data: Any) -> None:
    """Compute the table, print it and what it says, and draw it with --plot."""
    chosen: dict[str, Any] = {
        "placements": arguments.placements,
        "ep_sizes": arguments.ep_sizes,
        "ranks_per_node": arguments.ranks_per_node,
    }
    (_print_ages if arguments.against is None else _print_files)(arguments, model, data, chosen)


def _print_ages(arguments: Namespace, model: Any, data: Any, chosen: dict[str, Any]) -> None:
    from sim.fit import decay
    from sim.traffic.split import cut_windows

    out, n_windows = arguments.plot, 8 if arguments.n_windows is None else arguments.n_windows
    windows = cut_windows(data, model.n_experts, n_windows)
    halves, unit = windows.halves, windows.unit
    with shown_progress():
        table = decay(model, windows, **chosen)
    cells = [
        [row.placement, str(row.ep_size)]
        + (["any", "-"] if row.placement == "linear" else [str(row.age_windows), f"{getattr(row, f'age_{unit}'):,.0f}"])
        + [str(row.pairs), *_figures(row)]
        for row in table.itertuples()
    ]
    title = (
        f"{halves.name}, {model.name}: max / mean rank load of placements that are fitted on one of {n_windows} windows and "
        f"scored on it or on a later one\nage: from the fitted window to the scored one, in file order; of each window one half "
        f"is fitted, one scored: {halves.about}"
    )
    heads = ["placement", "EP", "age windows", f"age {unit}", "pairs", *_HEADS]
    print_table(title, heads, cells, arguments.markdown, align="<", keys=4)
    if not arguments.markdown:
        _explain("window", halves.fitted.shape[1])
        for name in _fitted_names(table):
            _say_ages(name, table[table.placement == name], unit)
    if out is not None:
        about = {"model": model.name, "file": halves.name, "digest": halves.digest, "windows": n_windows, **chosen}
        _draw(out, table, unit, about, arguments.formats)


def _print_files(arguments: Namespace, model: Any, data: Any, chosen: dict[str, Any]) -> None:
    from sim.fit import decay_against
    from sim.traffic import read_traffic
    from sim.traffic.split import cut_file

    for name, why in (("n_windows", "each file is one window"), ("plot", "it draws ages, and two files have none")):
        if getattr(arguments, name) is not None:
            raise InputError(f"`{name}` does not go with --against in epsim traffic decay: {why}")
    other = read_traffic(arguments.against, model, arguments.phase or "decode")
    for text in other.notes:
        note(text)
    first, second = (cut_file(part, model.n_experts, seed=arguments.seed) for part in (data, other))
    with shown_progress():
        table = decay_against(model, first, second, **chosen)
    cells = [
        [
            row.placement,
            str(row.ep_size),
            "any" if row.placement == "linear" else row.fitted,
            row.scored,
            *_figures(row),
        ]
        for row in table.itertuples()
    ]
    about = first.about if first.about == second.about else f"{first.name} {first.about}, {second.name} {second.about}"
    title = (
        f"{model.name}: max / mean rank load of placements that are fitted on one file and scored on it or on another\n"
        f"of each file one half is fitted, one scored: {about}"
    )
    heads = ["placement", "EP", "fitted on", "scored on", *_HEADS]
    print_table(title, heads, cells, arguments.markdown, align="<><<", keys=4)
    if not arguments.markdown:
        _explain("file", first.fitted.shape[1])
        for name in _fitted_names(table):
            _say_files(name, table[table.placement == name])


def _figures(row: Any) -> list[str]:
    """Cells of the heads that both tables have."""
    fresh = "-" if row.placement == "linear" else f"{row.fresh_mean:.3f}"
    of = [(row.change_mean, row.change_high, "+z.3f"), (row.removed_mean, row.removed_high, "z.0%")]
    of.append((row.lost_mean, row.lost_high, "z.0%"))
    shown = ["-" if row.placement == "linear" else estimate(*figure) for figure in of]
    return [estimate(row.imbalance_mean, row.imbalance_high, ".3f"), fresh, f"{row.linear_mean:.3f}", *shown]


def _fitted_names(table: Any) -> list[str]:
    return [name for name in dict.fromkeys(table.placement) if name != "linear"]


def _explain(part: str, n_layers: int) -> None:
    over = "none: the file has one layer"
    if n_layers > 1:
        over = (
            f"over {n_layers} layers, for these {part}s;\na share has no interval where what it is a share of may be 0, and is - "
            "where that is 0"
        )
    print(
        f"\nfresh, linear: on the same scored halves, fresh being fitted on the other half of the scored {part}; excess: "
        f"linear's imbalance - 1;\ngain lost: of fresh's gain over linear, above 100 % it is worse than linear; 95 %: {over}\n"
    )


def _say_ages(name: str, rows: Any, unit: str) -> None:
    """What is lost after one window and at the oldest age, and from which age on no gain is shown."""
    for age in dict.fromkeys((1, rows.age_windows.max())):
        of_age = rows[rows.age_windows == age]
        distance, pairs = of_age[f"age_{unit}"].iloc[0], of_age.pairs.iloc[0]
        lost = ", ".join(f"{_known(row.lost_mean, row.lost_high)} at EP {row.ep_size}" for row in of_age.itertuples())
        print(
            f"{name} at age {age} ({distance:,.0f} {unit}; {pairs} pair{'s' if pairs > 1 else ''} of windows): of the gain of a "
            f"fresh fit it has lost {lost}."
        )
    if rows.change_high.isna().any():
        return
    first = []
    for ep_size, of_size in rows.groupby("ep_size", sort=False):
        reached = of_size[of_size.change_high >= 0].age_windows
        first.append(f"EP {ep_size} {f'age {reached.min()}' if len(reached) else 'never'}")
    print(f"{name} is first no better than linear (the paired interval reaches 0) at: {', '.join(first)}.")


def _say_files(name: str, rows: Any) -> None:
    """How much of the gain survives on the other file."""
    for (fitted, scored), of in rows[rows.fitted != rows.scored].groupby(["fitted", "scored"], sort=False):
        kept = [f"{_known(1 - row.lost_mean, 1 - row.lost_low)} at EP {row.ep_size}" for row in of.itertuples()]
        print(
            f"{name} fitted on {fitted}, scored on {scored}: of the gain that a fit to {scored} has, it keeps "
            f"{', '.join(kept)} (below 0: worse than linear)."
        )


def _known(mean: float, high: float) -> str:
    """A share of a gain in words."""
    return estimate(mean, high, "z.0%") if mean == mean else "(there is none)"


def _draw(out: Path, table: Any, unit: str, about: dict[str, Any], formats: list[str]) -> None:
    from sim.figures import save_as
    from sim.figures.traffic import decay_by_age
    from sim.files import writable_folder
    from sim.results import write_table

    with writable_folder(out):
        write_table(table, out, "decay", about)
        drawn = save_as(decay_by_age(table, about["file"], about["model"], unit), out / "decay", formats)
    print(f"\nwritten to {out}: decay.csv, decay.json (what made it), {', '.join(path.name for path in drawn)}")
