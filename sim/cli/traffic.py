"""Recorded routing or measured loads: show their statistics, fit a workload, or show how a placement goes stale on them.

epsim traffic show|fit|decay FILE
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import note, numbers, table, threads, whole_number
from sim.cli.traffic_decay import print_decay
from sim.errors import InputError, unknown
from sim.errors import whole_number as check_whole_number

_LAYERS_SHOWN = 12
_OPTIONS = {
    "show": ("against", "plot", "all_layers"),
    "fit": ("out", "hold_out", "half", "group_sigma", "threads"),
    "decay": ("against", "plot", "ep", "placement", "windows", "ranks_per_node", "markdown"),
}
"""The options of an action that not all actions have."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim traffic`."""
    parser.add_argument(
        "action",
        metavar="show|fit|decay",
        help="show: statistics; fit: a workload with these loads; decay: a load-aware placement that is fitted on a part of "
        "the file and scored on later ones, or on another file",
    )
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
        "--model", help="the model that the file was taken on: preset or config.json (fit and decay need it)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="show, decay: another file of the same layers, for the drift, or to fit on one and score on the other",
    )
    parser.add_argument(
        "--plot", metavar="DIR", help="show: draw a heat map and a page of plots there; decay: imbalance against age"
    )
    parser.add_argument("--all-layers", action="store_true", help="show: a row for every layer")
    parser.add_argument("--out", metavar="FILE.toml", help="fit: the workload that is written")
    parser.add_argument(
        "--hold-out", action="store_true", help="fit: first fit one half and predict the rank imbalance of the other"
    )
    parser.add_argument(
        "--half", action="store_true", help="fit: write the fit of the first half (goes with --hold-out)"
    )
    parser.add_argument(
        "--group-sigma",
        metavar="X",
        help="fit: group effect of a grouped router, which loads do not tell (default: 0.4)",
    )
    parser.add_argument("--ep", metavar="LIST", help="decay: EP sizes, which must divide the slots")
    parser.add_argument("--placement", metavar="LIST", help="decay: load-aware placements (default: eplb)")
    parser.add_argument("--windows", metavar="N", help="decay: windows that the file is cut into (default: 8)")
    parser.add_argument("--ranks-per-node", metavar="N", help="decay: ranks joined by NVLink, for eplb (default: 8)")
    parser.add_argument("--markdown", action="store_true", help="decay: print a Markdown table alone")
    parser.add_argument(
        "--seed",
        default="0",
        metavar="N",
        help="of the fit's random numbers, and of decay's random halves (default: 0)",
    )
    parser.add_argument("--threads", metavar="N", help="fit: default: all processors of this process")


def run(arguments: Namespace) -> None:
    """Run `epsim traffic`."""
    if arguments.action not in _OPTIONS:
        raise unknown("traffic", arguments.action, _OPTIONS)
    for option in dict.fromkeys(option for options in _OPTIONS.values() for option in options):
        if option not in _OPTIONS[arguments.action] and getattr(arguments, option) not in (None, False):
            raise InputError(f"--{option.replace('_', '-')} does not go with epsim traffic {arguments.action}")
    arguments.seed = check_whole_number("--seed", whole_number("--seed")(arguments.seed), 0, 2**63 - 1)
    if arguments.action != "show" and arguments.model is None:
        raise InputError(f"epsim traffic {arguments.action} needs --model: the router that the loads come from")
    from sim.model import load_model
    from sim.traffic import read_traffic

    model = None if arguments.model is None else load_model(arguments.model)
    traffic = read_traffic(arguments.file, model, arguments.phase or "decode")
    for text in traffic.notes:
        note(text)
    {"show": _show, "fit": _fit, "decay": print_decay}[arguments.action](arguments, model, traffic)


def _show(arguments: Namespace, model: Any, data: Any) -> None:
    from sim.fit.description import describe
    from sim.traffic import read_traffic

    other = None if arguments.against is None else read_traffic(arguments.against, model, arguments.phase or "decode")
    about = describe(data, model, other)
    per_token = "" if about.top_k is None else f", {about.n_tokens} tokens in {about.n_sequences} sequences"
    steps = f", {about.n_steps} steps" if about.n_steps > 1 else ""
    experts = f"{about.n_experts} experts" + ("" if about.top_k is None else f", top-{about.top_k}")
    print(f"{data.name}: {len(about.layers)} layers, {experts}{per_token}{steps}\n")
    columns = about.by_layer
    chosen = list(range(len(about.layers)))
    if len(chosen) > _LAYERS_SHOWN and not arguments.all_layers:
        chosen = [round(i * (len(chosen) - 1) / (_LAYERS_SHOWN - 1)) for i in range(_LAYERS_SHOWN)]
    rows = [[str(about.layers[i]), *(f"{values[i]:.3f}" for values in columns.values())] for i in chosen]
    rows.append(["mean", *(f"{values.mean():.3f}" for values in columns.values())])
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
    if about.drift is not None:
        drift = about.drift
        alike = drift.alike[drift.alike == drift.alike]  # level loads have none
        print(
            f"\ndrift, {drift.names[0]} against {drift.names[1]}: {drift.distance.mean():.1%} of the load moves (least "
            f"{drift.distance.min():.1%}, most {drift.distance.max():.1%});\n  correlation of shares "
            + (f"{alike.mean():.3f} (least {alike.min():.3f})" if len(alike) else "-: the loads are level")
        )
    if arguments.plot is not None:
        _plot(arguments.plot, data, about)


def _plot(folder: str, data: Any, about: Any) -> None:
    from sim.cli.text import folder as folder_name
    from sim.figures import save
    from sim.figures.traffic import load_map, traffic_page
    from sim.results import writable_folder

    out = folder_name("--plot", folder)
    with writable_folder(out):
        for name, figure in (("load_map", load_map(data.name, about)), ("traffic", traffic_page(data.name, about))):
            for suffix in ("png", "svg"):
                save(figure, out / f"{name}.{suffix}")
                print(out / f"{name}.{suffix}")


def _fit(arguments: Namespace, model: Any, data: Any) -> None:
    from sim.fit import fit_text, fit_traffic, hold_out
    from sim.fit.fitting import GROUP_SIGMA
    from sim.results import whole_files

    out = Path(arguments.out or "")
    if out.suffix != ".toml":
        raise InputError(f"--out {arguments.out or ''}: must be the name of a .toml file")
    if arguments.half and not arguments.hold_out:
        raise InputError("--half goes with --hold-out")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    seed, text, n_threads = arguments.seed, arguments.group_sigma, threads(arguments.threads)
    group_sigma, *more = [GROUP_SIGMA] if text is None else numbers("--group-sigma")(text)
    if more or not 0 <= group_sigma <= 5:
        raise InputError(f"--group-sigma {text}: must be a number from 0 to 5")
    if model.is_grouped and arguments.group_sigma is None:
        note(f"loads do not tell the group effect: group_sigma {GROUP_SIGMA} is that of the presets (--group-sigma)")
    fit = None
    if arguments.hold_out:
        held = hold_out(model, data, seed=seed, group_sigma=group_sigma, threads=n_threads)
        if held is None:
            note("there is too little to hold out: it takes 32 sequences, or 4 steps of loads")
        else:
            _print_held(held[1], "steps" if held[1] and held[1][0].phase == "steps" else "sequences")
            fit = held[0] if arguments.half else None
    whole = fit is None
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
    if fit.prefill is not None:
        print(
            f"prefill: request_sigma {fit.prefill.request_sigma:.2f}, {fit.prefill.tokens_per_request} tokens per request; "
            f"shares to {fit.rms[1].mean():.2%} rms (worst layer {fit.rms[1].max():.2%})"
        )
    phases = "" if fit.prefill is None else " (--phase decode or prefill)"
    print(f"written to {out}; use it as --workload {out}{phases}")


def _print_held(rows: list[Any], halves: str) -> None:
    print(f"held-out {halves}, linear placement, mean over layers of max / mean rank load:\n")
    cells = [
        [
            row.phase,
            str(row.tokens),
            str(row.ep_size),
            f"{row.real:.3f} ± {row.real_half:.3f}",
            f"{row.simulated:.3f} ± {row.simulated_half:.3f}",
            f"{row.simulated / row.real - 1:+z.1%}",
        ]
        for row in rows
    ]
    print(table(["blocks", "tokens", "EP", "real", "simulated", "error"], cells, "<>>>>>"))
    worst = max(rows, key=lambda row: abs(row.simulated / row.real - 1))
    n_off = sum(abs(row.simulated / row.real - 1) > 0.05 for row in rows)
    print(
        f"\nworst: {worst.phase}, {worst.tokens} tokens, EP {worst.ep_size}; {n_off} of {len(rows)} are off by more than 5 %. "
        f"± : 95 %, of real blocks over {halves}, of simulated ones over their sampling alone\n"
    )
