"""Recorded routing or measured loads: show their statistics, fit a workload, show how a placement goes stale; or make some."""

from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli import Verb, add_verbs
from sim.cli.progress import shown_progress
from sim.cli.text import add_forms, estimate, filled, note, print_rows, print_table, say_written, table
from sim.cli.traffic_decay import print_decay
from sim.cli.traffic_make import add_make, add_match, run_make, run_match
from sim.errors import InputError
from sim.options import FILE, NAMES, SEED, THREADS, WHOLE_NUMBERS, FigureOptions, Folder, Number, Whole, add_options

_LAYERS_SHOWN = 12
_COLUMNS = {
    "CV": "cv", "max/mean": "max_over_mean", "Gini": "gini", "top 12.5 %": "top_eighth_share", "tilt": "tilt",
    "same group": "same_group_lift", "pair lift": "pair_lift", "next lift": "next_lift",
}  # fmt: skip


def add_arguments(parser: ArgumentParser) -> None:
    """Add the verbs of `epsim traffic`."""
    add_verbs(
        parser,
        {
            "show": Verb("print the statistics of a file", _add_show, _run_show),
            "fit": Verb("fit a workload that has these loads", _add_fit, _run_fit),
            "decay": Verb(
                "fit a load-aware placement on a part of the file and score it on later ones, or on another file",
                _add_decay,
                _run_decay,
            ),
            "make": Verb("write synthetic recorded routing, with a wanted imbalance", add_make, run_make),
            "match": Verb("name the presets nearest to an imbalance that was read off a log", add_match, run_match),
        },
    )


def run(arguments: Namespace) -> None:
    """Run `epsim traffic`."""
    arguments.run(arguments)


def _add_file(parser: ArgumentParser, *, needs_model: bool) -> None:
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="experts of tokens (answers of vLLM and SGLang with routed_experts as JSON, .npz, .npy; a folder with a JSON file "
        "for each request) or loads of experts (.csv, .json, .npz, .npy, TensorRT-LLM's folder of expert statistics); .pt of "
        "SGLang's recorder with the extra epsim[torch]; text may be packed as .gz",
    )
    parser.add_argument(
        "--phase", metavar="PHASE", help="decode or prefill: which steps of a trace set are read (default: decode)"
    )
    parser.add_argument(
        "--model",
        required=needs_model,
        help="the model that the file was taken on: preset or config.json"
        + ("" if needs_model else " (default: any that fits)"),
    )


def _add_show(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _add_file(parser, needs_model=False)
    add("--against", type=Path, metavar="FILE", help="another file of the same layers, for the drift between them")
    add("--plot", type=Folder(), metavar="DIR", help="draw a heat map and a page of plots there")
    add_options(parser, FigureOptions)
    add("--all-layers", action="store_true", help="a row for every layer")
    add_forms(parser)
    add("--seed", type=SEED, default=0, help=SUPPRESS)  # statistics have no random numbers


def _add_fit(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _add_file(parser, needs_model=True)
    add("--out", type=FILE, default="", metavar="FILE.toml", help="the workload that is written")
    add("--hold-out", action="store_true", help="first fit each half, and predict the rank imbalance of the other")
    add("--half", action="store_true", help="write the fit of the first half (goes with --hold-out)")
    add(
        "--group-sigma",
        type=Number(0, 5),
        metavar="X",
        help="group effect of a grouped router, which loads do not tell (default: 0.4)",
    )
    add("--seed", type=SEED, default=0, metavar="N", help="of the fit's random numbers (default: 0)")
    add("--threads", type=THREADS, metavar="N", help="default: all processors of this process")


def _add_decay(parser: ArgumentParser) -> None:
    add = parser.add_argument
    _add_file(parser, needs_model=True)
    add(
        "--against",
        type=Path,
        metavar="FILE",
        help="another file of the same layers: fit on one, and score on the other",
    )
    add("--plot", type=Folder(), metavar="DIR", help="draw imbalance against age there")
    add_options(parser, FigureOptions)
    add(
        "--ep",
        dest="ep_sizes",
        type=WHOLE_NUMBERS,
        required=True,
        metavar="LIST",
        help="EP sizes, which must divide the slots",
    )
    add(
        "--placement",
        dest="placements",
        type=NAMES,
        default="eplb",
        metavar="LIST",
        help="load-aware placements (default: eplb)",
    )
    add("--windows", dest="n_windows", type=Whole(), metavar="N", help="windows that the file is cut into (default: 8)")
    add("--ranks-per-node", type=Whole(), default=8, metavar="N", help="ranks joined by NVLink, for eplb (default: 8)")
    add("--markdown", action="store_true", help="print a Markdown table alone")
    add("--seed", type=SEED, default=0, metavar="N", help="of the random halves (default: 0)")


def _read(arguments: Namespace) -> tuple[Any, Any]:
    """The model, None where it is not named, and what the file holds."""
    from sim.model import load_model
    from sim.traffic import read_traffic

    model = None if arguments.model is None else load_model(arguments.model)
    traffic = read_traffic(arguments.file, model, arguments.phase or "decode")
    for text in traffic.notes:
        note(text)
    return model, traffic


def _run_show(arguments: Namespace) -> None:
    _show(arguments, *_read(arguments))


def _run_fit(arguments: Namespace) -> None:
    _fit(arguments, *_read(arguments))


def _run_decay(arguments: Namespace) -> None:
    print_decay(arguments, *_read(arguments))


def _show(arguments: Namespace, model: Any, data: Any) -> None:

    from sim.fit.description import describe
    from sim.traffic import read_traffic

    other = None if arguments.against is None else read_traffic(arguments.against, model, arguments.phase or "decode")
    about = describe(data, model, other)
    if arguments.plot is not None:
        _plot(arguments, data, about)
    if print_rows(_by_layer(about), arguments):
        return
    per_token = "" if about.top_k is None else f", {about.n_tokens} tokens in {about.n_sequences} sequences"
    steps = f", {about.n_steps} steps" if about.n_steps > 1 else ""
    experts = f"{about.n_experts} experts" + ("" if about.top_k is None else f", top-{about.top_k}")
    columns = about.by_layer
    chosen = list(range(len(about.layers)))
    if len(chosen) > _LAYERS_SHOWN and not arguments.all_layers:
        chosen = [round(i * (len(chosen) - 1) / (_LAYERS_SHOWN - 1)) for i in range(_LAYERS_SHOWN)]
    rows = [[str(about.layers[i]), *(_or_dash(values[i]) for values in columns.values())] for i in chosen]
    rows.append(["mean", *(_or_dash(_mean(values)) for values in columns.values())])
    if arguments.markdown:
        print_table("", ["layer", *columns], rows, True)
        return
    print(f"{data.name}: {len(about.layers)} layers, {experts}{per_token}{steps}\n")
    print(table(["layer", *columns], rows, ">" * (1 + len(columns))))
    if len(chosen) < len(about.layers):
        print("(some of the layers; --all-layers shows each)")
    print(
        "\nCV: sd / mean of an expert's load; top 12.5 %: share of the load that the most used eighth of the experts takes;\n"
        "tilt: slope of load / mean on the expert index from 0 to 1"
        + ("; same group: pairs of a token's\nexperts in one group, over chance" if "same group" in columns else "")
    )
    if about.group_shares is not None:
        print(
            f"\ngroup shares over uniform, mean of layers: {' '.join(f'{x:.2f}' for x in about.group_shares.mean(axis=0))}"
        )
    if about.top_k is not None:
        print("\nvariance of expert counts over multinomial (1: independent tokens), mean of layers (least, most):")
        for name, found in (("one sequence", about.within), ("different sequences", about.across)):
            values = [f"{n} tokens {x.mean():.2f} ({x.min():.2f}, {x.max():.2f})" for n, x in found.items()]
            print(f"  {name}: {'; '.join(values) or 'too few, or too short, sequences'}")
    if about.by_lag:
        print("\ncorrelation of the experts of two tokens of a sequence by their distance, mean of layers:")
        lags = [lag for lag in about.by_lag if lag & (lag - 1) == 0]
        rows = [["measured", *(f"{about.by_lag[lag].mean():.3f}" for lag in lags)]]
        if about.decay is not None:
            rows.append(["fitted", *(f"{x:.3f}" for x in about.decay.at(lags).mean(axis=0))])
        print(table(["tokens", *map(str, lags)], rows, "<" + ">" * len(lags)))
    if about.decay is not None:
        decay = about.decay
        parts = [f"{t:g} ({s:.0%})" for t, s in zip(decay.tokens, decay.shares, strict=True)]
        print(
            f"fitted to blocks: {decay.near.mean():.3f} in one context of a sequence, {decay.far.mean():.3f} in two; mean tokens "
            f"of a context (share of tokens): {', '.join(parts)}"
        )
    if about.drift is not None:
        drift = about.drift
        alike = drift.alike[drift.alike == drift.alike]  # level loads have none
        print(
            f"\ndrift, {drift.names[0]} against {drift.names[1]}: {drift.distance.mean():.1%} of the load moves (least "
            f"{drift.distance.min():.1%}, most {drift.distance.max():.1%});\n  correlation of shares "
            + (f"{alike.mean():.3f} (least {alike.min():.3f})" if len(alike) else "-: the loads are level")
        )
    if about.together is not None:
        _print_together(about.together)


def _mean(values: Any) -> float:
    """Mean over layers that have a value; NaN where none has."""
    held = [value for value in values if value == value]
    return sum(held) / len(held) if held else float("nan")


def _or_dash(x: float) -> str:
    return f"{x:.3f}" if x == x else "-"


def _by_layer(about: Any) -> Any:
    """A row for each layer, with all columns."""
    import pandas as pd

    columns = {_COLUMNS[name]: values for name, values in about.by_layer.items()}
    if about.together is not None:
        columns |= {name: about.together[name][:-1].to_numpy(float) for name in about.together if name != "layer"}
    return pd.DataFrame({"layer": about.layers, **columns})


def _print_together(found: Any) -> None:
    """What of co-selection holds for all layers."""
    of_all = found.iloc[-1]

    def lift(name: str) -> str:
        of_layers = found[name][:-1].dropna()
        return (
            f"{of_all[name]:.2f} (± {of_all[f'{name}_high'] - of_all[name]:.2f}; layers {of_layers.min():.2f} to "
            f"{of_layers.max():.2f})"
        )

    print(
        "\nexperts that go together, lift over chance in other sequences (1: they have nothing to do with each other):"
    )
    if of_all["pair_lift"] == of_all["pair_lift"]:
        few = of_all["excess_in_few"]
        print(filled(
            f"two experts of a token, over popularity and groups: {lift('pair_lift')}; {of_all['excess']:.1%} of the pairs are "
            "above chance" + (f", {few:.0%} of these in 5 % of the pairs of experts" if few == few else ""), "  ", "    ",
        ))  # fmt: skip
    if of_all["next_lift"] == of_all["next_lift"]:
        print(filled(
            f"an expert and one of the layer before: {lift('next_lift')}; with the tokens of each sequence shuffled: "
            f"{of_all['next_lift_shuffled']:.2f}", "  ", "    ",
        ))  # fmt: skip


def _plot(arguments: Namespace, data: Any, about: Any) -> None:
    from sim.figures import save_as
    from sim.figures.traffic import load_map, traffic_page
    from sim.files import writable_folder

    out = arguments.plot
    with writable_folder(out):
        for name, figure in (("load_map", load_map(data.name, about)), ("traffic", traffic_page(data.name, about))):
            for path in save_as(figure, out / name, arguments.formats):
                say_written(str(path), arguments)


def _fit(arguments: Namespace, model: Any, data: Any) -> None:
    import numpy as np

    from sim.files import whole_files
    from sim.fit import fit_text, fit_traffic, hold_out
    from sim.fit.fitting import GROUP_SIGMA
    from sim.progress import phase

    out = Path(arguments.out)
    if out.suffix != ".toml":
        raise InputError(f"--out '{arguments.out}': must be the name of a .toml file")
    if arguments.half and not arguments.hold_out:
        raise InputError("--half goes with --hold-out")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    seed, n_threads = arguments.seed, arguments.threads
    group_sigma = GROUP_SIGMA if arguments.group_sigma is None else arguments.group_sigma
    if model.is_grouped and arguments.group_sigma is None:
        note(f"loads do not tell the group effect: group_sigma {GROUP_SIGMA} is that of the presets (--group-sigma)")
    fit = None
    sizes = {"hold-out": 2.0 if arguments.hold_out else 0.0, "fit": 0.0 if arguments.half else 1.0}
    if arguments.hold_out:
        with shown_progress(), phase("hold-out", sizes):
            held = hold_out(model, data, seed=seed, group_sigma=group_sigma, threads=n_threads)
        if held is None:
            note("there is too little to hold out: it takes 32 sequences, or 4 steps of loads")
        else:
            _print_held(held[1])
            fit = held[0] if arguments.half else None
    whole = fit is None
    with shown_progress(), phase("fit", sizes):
        fit = fit or fit_traffic(model, data, seed=seed, group_sigma=group_sigma, threads=n_threads)
    for text in fit.notes:
        note(text)
    with whole_files(out) as (temporary,):
        temporary.write_text(fit_text(fit), encoding="utf-8")
    what = "all of the file" if whole else "the first half (--half)"
    print(
        f"fitted to {what}: {fit.decode.n_layers} layers, shares to {fit.rms[0].mean():.2%} rms (worst layer "
        f"{fit.rms[0].max():.2%}) on fresh random numbers, {fit.seconds.mean():.1f} s per layer of a thread"
    )
    layers = fit.decode.layers
    if layers is not None and layers.kind_shares is not None:
        n_kinds = layers.kind_shares.shape[1]
        print(f"tokens of {n_kinds} kinds in each layer, which take experts together as those of the file do")
    if fit.prefill is not None:
        of = fit.prefill
        local = np.mean(of.local_share)
        lengths = " and ".join(f"{tokens:g}" for tokens in of.context_tokens)
        print(
            f"prefill: request_sigma {of.request_sigma:.2f}, {of.tokens_per_request} tokens per request, {local:.0%} of its "
            f"variance local, in contexts of {lengths} tokens;\n  shares to {fit.rms[1].mean():.2%} rms (worst layer "
            f"{fit.rms[1].max():.2%})"
        )
    phases = "" if fit.prefill is None else " (--phase decode or prefill)"
    print(f"written to {out}; use it as --workload {out}{phases}")


_HELD = {
    "imbalance": "max / mean rank load",
    "received": "tokens that the busiest rank receives / tokens of the block",
    "ranks_per_token": "ranks that a token is sent to",
}


def _print_held(rows: list[Any]) -> None:
    halves = "steps" if rows[0].phase == "steps" else "sequences"
    which = "the first half of the steps predicts the second" if halves == "steps" else "even predict odd ones"
    print(f"held-out {halves}, linear placement: {which}")
    keys = dict.fromkeys((row.figure, row.statistic) for row in rows)
    for figure, statistic in keys:
        # The ranks of a token do not depend on the block that it lies in.
        shown = [row for row in rows if (row.figure, row.statistic) == (figure, statistic)]
        least = {row.phase: row.tokens for row in reversed(shown)}
        shown = [row for row in shown if figure != "ranks_per_token" or row.tokens == least[row.phase]]
        cells = [
            [
                row.phase, str(row.tokens), str(row.ep_size), _range(row.real, ".3f"), _range(row.simulated, ".3f"),
                _range(row.error, "+z.1%"), f"{row.halves:+z.1%}", estimate(row.both_ways.value, row.both_ways.high, "+z.1%"),
            ]
            for row in shown
        ]  # fmt: skip
        of = "mean over blocks and layers" if statistic == "mean" else f"{statistic} of blocks of all layers"
        print(f"\n{_HELD[figure]}, {of}:\n")
        heads = ["blocks", "tokens", "EP", "measured", "predicted", "error", "halves", "both ways"]
        print(table(heads, cells, "<" + ">" * (len(heads) - 1)))
        missed = [row for row in shown if row.error.low > 0 or row.error.high < 0]
        worst = max(shown, key=lambda row: abs(row.error.value))
        print(
            f"\n{len(missed)} of {len(shown)} errors are beyond chance (their interval leaves out 0); the largest is "
            f"{worst.error.value:+.1%}: {worst.phase}, {worst.tokens} tokens, EP {worst.ep_size}"
        )
    print()
    for head, text in (
        ("measured", f"the held-out half, with its 95 % interval over {halves} (- : too few for a bound)"),
        ("predicted", "traffic fitted to the other half, as uncertain as that half is"),
        ("error", "predicted / measured - 1, with the chance of both halves"),
        ("halves", "the measured fitted half / the measured held-out one - 1: a difference that no fit can know"),
        ("both ways", "mean error with each half predicted from the other, ± over layers: the halves' difference is out of it, "
         "what is left is the model's own"),
    ):  # fmt: skip
        print(filled(text, f"{head:<11}", " " * 11))
    print()


def _range(of: Any, form: str) -> str:
    """A value with the bounds of its interval."""
    low, high = (format(x, form) if x == x else "-" for x in (of.low, of.high))
    return f"{of.value:{form}} ({low}, {high})"
