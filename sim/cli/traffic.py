"""`epsim traffic`: statistics of recorded routing or measured loads, and workloads fitted to them."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sim.cli import add_verbs
from sim.cli.inputs import read_file
from sim.cli.terminal import add_output, answer, estimate, note, print_lines, print_table, say, shown_progress
from sim.cli.traffic_decay import add_decay, run_decay
from sim.cli.traffic_make import add_make, add_match, run_make, run_match
from sim.errors import InputError, counted
from sim.options import FigureOptions, FileOptions
from sim.options.declare import add_options
from sim.options.kinds import NewFile

_LAYERS_SHOWN = 12
_COLUMNS = {
    "CV": "cv", "max/mean": "max_over_mean", "Gini": "gini", "top 12.5 %": "top_eighth_share", "tilt": "tilt",
    "same group": "same_group_lift", "pair lift": "pair_lift", "next lift": "next_lift",
}  # fmt: skip


_FILE_HELP = (
    "experts of tokens (answers of vLLM and SGLang with routed_experts as JSON, .npz, .npy; a folder with a JSON file for each "
    "request) or loads of experts (.csv, .json, .npz, .npy, TensorRT-LLM's folder of expert statistics); .pt of SGLang's "
    "recorder with the extra epsim[torch]; text may be .gz"
)


def add_traffic(parser: ArgumentParser) -> None:
    """Recorded routing or measured loads: show them, fit a workload, see how a placement goes stale; or make some."""
    verbs = {"show": (_add_show, _run_show), "fit": (_add_fit, _run_fit), "decay": (add_decay, run_decay)}
    add_verbs(parser, verbs | {"make": (add_make, run_make), "match": (add_match, run_match)})


def _add_show(parser: ArgumentParser) -> None:
    """Print the statistics of a file."""
    parser.add_argument("file", type=Path, metavar="FILE", help=_FILE_HELP)
    add_options(parser, FileOptions, only=("model", "phase", "against", "plot", "all_layers"), model=None)
    add_options(parser, FigureOptions)
    add_output(parser)


def _add_fit(parser: ArgumentParser) -> None:
    """Fit a workload that has these loads."""
    parser.add_argument("file", type=Path, metavar="FILE", help=_FILE_HELP)
    add_options(
        parser, FileOptions, only=("model", "phase", "hold_out", "placement", "half", "group_sigma", "threads", "seed")
    )
    out = NewFile(endings=(".toml",))
    parser.add_argument("--out", type=out, required=True, metavar="FILE.toml", help="the workload that is written")


def _run_show(arguments: Namespace) -> None:
    from sim.fit.description import describe
    from sim.model import load_model

    model = None if arguments.model is None else load_model(arguments.model)
    data = read_file(arguments.file, model, arguments.phase)
    other = None if arguments.against is None else read_file(arguments.against, model, arguments.phase)
    about = describe(data, model, other)
    answer(
        arguments.plot, arguments, lambda: _print_description(data.name, about, arguments), {}, {},
        lambda: _figures(data.name, about), _by_layer(about),
    )  # fmt: skip


def _print_description(name: str, about: Any, arguments: Namespace) -> None:
    import pandas as pd

    columns, chosen = about.by_layer, list(range(len(about.layers)))
    if len(chosen) > _LAYERS_SHOWN and not arguments.all_layers:
        chosen = [round(i * (len(chosen) - 1) / (_LAYERS_SHOWN - 1)) for i in range(_LAYERS_SHOWN)]
    table = pd.DataFrame(columns, index=about.layers, dtype=float)
    table = pd.concat([table.iloc[chosen], table.mean().to_frame("mean").T])
    rows = [[str(layer), *(f"{x:.3f}" if x == x else "-" for x in values)] for layer, *values in table.itertuples()]
    parts = [counted(len(about.layers), "layer"), f"{about.n_experts} experts"]
    if about.top_k is not None:
        tokens = f"{counted(about.n_tokens, 'token')} in {counted(about.n_sequences, 'sequence')}"
        parts += [f"top-{about.top_k}", tokens]
    parts += [f"{about.n_steps} steps"] if about.n_steps > 1 else []
    title = f"{name}: {', '.join(parts)}"
    print_lines(title, ["layer", *columns], rows, arguments.markdown)
    if arguments.markdown:
        return
    if len(chosen) < len(about.layers):
        print("(some of the layers; --all-layers shows each)")
    print()
    say(
        "CV: sd / mean of an expert's load; top 12.5 %: share of the load that the most used eighth of the experts takes; tilt: "
        "slope of load / mean on the expert index from 0 to 1"
        + ("; same group: pairs of a token's experts in one group, over chance" if "same group" in columns else "")
    )
    if about.group_shares is not None:
        shares = " ".join(f"{x:.2f}" for x in about.group_shares.mean(axis=0))
        print(f"\ngroup shares over uniform, mean of layers: {shares}")
    _print_correlation(about)
    if about.drift is not None:
        _print_drift(about.drift)
    if about.together is not None:
        _print_together(about.together)


def _print_correlation(about: Any) -> None:
    """How alike the tokens of a sequence are, by the size of a block and by their distance."""
    if about.top_k is not None:
        print("\nvariance of expert counts over multinomial (1: independent tokens), mean of layers (least, most):")
        for name, found in (("one sequence", about.within), ("different sequences", about.across)):
            values = [f"{n} tokens {x.mean():.2f} ({x.min():.2f}, {x.max():.2f})" for n, x in found.items()]
            say(f"{name}: {'; '.join(values) or 'too few, or too short, sequences'}", "  ", "    ")
    if about.by_lag:
        lags = [lag for lag in about.by_lag if lag & (lag - 1) == 0]
        rows = [["measured", *(f"{about.by_lag[lag].mean():.3f}" for lag in lags)]]
        if about.decay is not None:
            rows.append(["fitted", *(f"{x:.3f}" for x in about.decay.at(lags).mean(axis=0))])
        print()
        title = "correlation of the experts of two tokens of a sequence by their distance, mean of layers:"
        print_lines(title, ["tokens", *map(str, lags)], rows, markdown=False, align="<")
    if about.decay is not None:
        decay = about.decay
        parts = [f"{t:g} ({s:.0%})" for t, s in zip(decay.tokens, decay.shares, strict=True)]
        say(
            f"fitted to blocks of 2 to 256 tokens: {decay.near.mean():.3f} in one context of a sequence, "
            f"{decay.passage.mean():.3f} in two of one passage ({decay.passage_tokens:g} tokens in the mean), "
            f"{decay.far.mean():.3f} in two passages; mean tokens of a context (share of tokens): {', '.join(parts)}"
        )


def _print_drift(drift: Any) -> None:
    alike = drift.alike[drift.alike == drift.alike]  # level loads have none
    print()
    say(
        f"drift, {drift.names[0]} against {drift.names[1]}: {drift.distance.mean():.1%} of the load moves (least "
        f"{drift.distance.min():.1%}, most {drift.distance.max():.1%}); correlation of shares "
        + (f"{alike.mean():.3f} (least {alike.min():.3f})" if len(alike) else "-: the loads are level"), "", "  ",
    )  # fmt: skip


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
        say(
            f"two experts of a token, over popularity and groups: {lift('pair_lift')}; {of_all['excess']:z.1%} of the pairs are "
            "above chance" + (f", {few:.0%} of these in 5 % of the pairs of experts" if of_all["excess"] >= 0.0005 else ""),
            "  ", "    ",
        )  # fmt: skip
    if of_all["next_lift"] == of_all["next_lift"]:
        say(
            f"an expert and one of the layer before: {lift('next_lift')}; with the tokens of each sequence shuffled: "
            f"{of_all['next_lift_shuffled']:.2f}", "  ", "    ",
        )  # fmt: skip


def _figures(name: str, about: Any) -> dict[str, Any]:
    from sim.figures.traffic import load_map, traffic_page

    return {"load_map": load_map(name, about), "traffic": traffic_page(name, about)}


def _run_fit(arguments: Namespace) -> None:
    import numpy as np

    from sim.files import whole_files
    from sim.fit import fit_text, fit_traffic, hold_out
    from sim.fit.fitting import GROUP_SIGMA
    from sim.fit.hold_out import MOST_LAYERS
    from sim.model import load_model
    from sim.progress import phase

    for given, name in ((arguments.half, "--half"), (arguments.placement != "linear", "--placement")):
        if given and not arguments.hold_out:
            raise InputError(f"{name} goes with --hold-out")
    model = load_model(arguments.model)
    data = read_file(arguments.file, model, arguments.phase)
    how = {"seed": arguments.seed, "threads": arguments.threads}
    how |= {"group_sigma": GROUP_SIGMA if arguments.group_sigma is None else arguments.group_sigma}
    if model.is_grouped and arguments.group_sigma is None:
        note(f"loads do not tell the group effect: group_sigma {GROUP_SIGMA} is that of the presets (--group-sigma)")
    fit = None
    sizes = {"hold-out": 2.0 if arguments.hold_out else 0.0, "fit": 0.0 if arguments.half else 1.0}
    if arguments.hold_out:
        with shown_progress(), phase("hold-out", sizes):
            most_layers = None if arguments.half else MOST_LAYERS
            held = hold_out(model, data, **how, most_layers=most_layers, placement=arguments.placement)
        if held is None:
            note("there is too little to hold out: it takes 32 different sequences, or 4 steps of loads")
        else:
            _print_held(held[1], arguments.placement)
            n_layers, n_held = len(data.layer_ids), held[0].decode.n_layers or 0
            if n_held < n_layers:
                note(f"held out: {n_held} of the {n_layers} layers, at even distances")
            fit = held[0] if arguments.half else None
    whole = fit is None
    with shown_progress(), phase("fit", sizes):
        fit = fit or fit_traffic(model, data, **how)
    note(*fit.notes)
    with whole_files(arguments.out) as (temporary,):
        temporary.write_text(fit_text(fit), encoding="utf-8")
    what = "all of the file" if whole else "the first half (--half)"
    say(
        f"fitted to {what}: {counted(len(fit.rms[0]), 'layer')}, shares to {_rms(fit, 0)} on fresh random numbers, "
        f"{fit.seconds.mean():.1f} s per layer of a thread"
    )
    layers = fit.decode.layers
    if layers is not None and layers.kind_shares is not None:
        n_kinds = layers.kind_shares.shape[1]
        print(f"tokens of {n_kinds} kinds in each layer, which take experts together as those of the file do")
    if fit.prefill is not None:
        of = fit.prefill
        lengths = " and ".join(f"{tokens:g}" for tokens in of.context_tokens)
        say(
            f"prefill: request_sigma {of.request_sigma:.2f}, {of.tokens_per_request} tokens per request, "
            f"{np.mean(of.local_share):.0%} of its variance local, in contexts of {lengths} tokens and passages of "
            f"{of.passage_tokens:g}; sd of the logarithm of its strength {of.strength_sd:g}; shares to {_rms(fit, 1)}"
        )
    phases = "" if fit.prefill is None else " (--phase decode or prefill)"
    say(f"written to {arguments.out}; use it as --workload {arguments.out}{phases}")


def _rms(fit: Any, phase: int) -> str:
    return f"{fit.rms[phase].mean():.2%} rms (worst layer {fit.rms[phase].max():.2%})"


_HELD = {
    "imbalance": "max / mean rank load",
    "received": "tokens received by the busiest rank / tokens of the block",
    "ranks_per_token": "ranks that a token is sent to",
}


def _print_held(rows: list[Any], placement: str) -> None:
    halves = "steps" if rows[0].phase == "steps" else "sequences"
    which = "the first half of the steps predicts the second" if halves == "steps" else "even predict odd ones"
    columns: dict[str, Any] = {
        "tokens": "tokens", "EP": "ep_size", "measured": lambda row: f"{row.real.value:.3f}",
        "predicted": lambda row: f"{row.simulated.value:.3f}", "error": lambda row: _range(row.error, "+z.1%"),
        "halves": "halves:+z.1%", "both ways": lambda row: estimate(row.both_ways.value, row.both_ways.high, "+z.1%"),
    }  # fmt: skip
    print(f"held-out {halves}, placement {placement}: {which}")
    by_part: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        by_part.setdefault((row.phase, row.figure, row.statistic), []).append(row)
    verdict: dict[str, Any] = {
        "blocks": lambda part: part[0].phase,
        "of": lambda part: f"{part[0].figure.replace('_', ' ')}, {part[0].statistic}",
        "largest error": lambda part: _most(row.error.value for row in part),
        "both ways": lambda part: _most(row.both_ways.value for row in part),
        "halves differ by": lambda part: _most(row.halves for row in part),
        "beyond chance": lambda part: f"{sum(map(_is_missed, part))} of {len(part)}",
    }
    parts = [part for (_, figure, statistic), part in by_part.items() if (figure, statistic) == ("imbalance", "mean")]

    def within(of: Callable[[Any], float]) -> str:
        """The largest of an error of mean imbalance, phase by phase."""
        return " and ".join(f"{max(abs(of(row)) for row in part):.1%} in {part[0].phase}" for part in parts)

    say(
        f"mean imbalance is predicted within {within(lambda row: row.error.value)}; by chance, the halves themselves differ by "
        f"up to {within(lambda row: row.halves)}; what is left of the error when each half predicts the other, the model's own, "
        f"is at most {within(lambda row: row.both_ways.value)}"
    )
    print()
    tokens, sizes = ([getattr(row, name) for row in rows] for name in ("tokens", "ep_size"))
    title = f"the largest of blocks of {min(tokens)} to {max(tokens)} tokens and EP {min(sizes)} to {max(sizes)}:"
    print_table(title, by_part.values(), verdict, markdown=False, align="<<")
    missed = [row for row in rows if _is_missed(row)]
    print()
    say(
        f"{len(missed)} of {len(rows)} errors are beyond chance (their 95 % interval leaves out 0; of right predictions, "
        f"about {len(rows) / 20:.0f} are)" + (f"; the largest is {_where(max(missed, key=_size))}" if missed else "")
    )
    for (phase, figure, statistic), part in by_part.items():
        # The ranks of a token do not depend on the block that it lies in.
        shown = [row for row in part if figure != "ranks_per_token" or row.tokens == part[0].tokens]
        of = "mean over blocks and layers" if statistic == "mean" else f"{statistic} of blocks of all layers"
        print()
        print_table(f"{phase}: {_HELD[figure]}, {of}", shown, columns, markdown=False, keys=2)
    print()
    for head, text in (
        ("measured", "the held-out half"),
        ("predicted", "traffic fitted to the other half"),
        ("error", "predicted / measured - 1, 95 %, with the chance of both halves (- : too few for a bound)"),
        ("halves", "the measured fitted half / the measured held-out one - 1: a difference that no fit can know"),
        ("both ways", "mean error with each half predicted from the other, ± over layers: the halves' difference is out of it, "
         "what is left is the model's own"),
    ):  # fmt: skip
        say(text, f"{head:<11}", " " * 11)
    print()


def _is_missed(row: Any) -> bool:
    """Whether an error is beyond chance."""
    return bool(row.error.low > 0 or row.error.high < 0)


def _size(row: Any) -> float:
    return abs(float(row.error.value))


def _most(errors: Iterable[float]) -> str:
    """The largest of some errors, with its sign."""
    return f"{max(errors, key=abs):+z.1%}"


def _where(row: Any) -> str:
    what = f"{row.figure.replace('_', ' ')} ({row.statistic})"
    return f"{row.error.value:+.1%}: {what}, {row.phase}, {row.tokens} tokens, EP {row.ep_size}"


def _range(of: Any, form: str) -> str:
    """A value with the bounds of its interval."""
    low, high = (format(x, form) if x == x else "-" for x in (of.low, of.high))
    return f"{of.value:{form}} ({low}, {high})"
