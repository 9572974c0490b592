"""The `epsim` command: one short file per verb, imported only when the verb is asked for.

A verb is a module sim/cli/VERB.py with `add_arguments(parser)` and `run(arguments)`, and a line in VERBS. Its docstring is the
description of its help. A verb with verbs of its own (`epsim traffic show`) adds them with `add_verbs`. Options are declared in
`sim.options`.
"""

import contextlib
import difflib
import io
import os
import sys
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sim.errors import InputError, RunError, unknown

VERBS = {
    "sweep": "sample routed tokens and score placements on every EP size and step size",
    "show": "print the answer of a sweep again, or another part of it",
    "combine": "add sweeps of different seeds or machines",
    "plot": "draw the figures of a sweep",
    "report": "write a page to explore sweeps and advice in a browser",
    "gain": "predict the time that one placement saves over another, on a GPU",
    "depends": "which conclusions about placements hold for all traffic, and which do not",
    "step": "predict what an engine would log of each step; lay your own log beside it",
    "capacity": "how much room buffers need: received tokens and rows, in a layer, a step, a day of steps",
    "advise": "should I turn it on for my traffic: placements compared, and a verdict",
    "claims": "try published performance claims: computed figure, verdict, and why",
    "export": "write a placement as a file of a serving engine",
    "traffic": "recorded routing and measured loads: show them, fit a workload, show how a placement goes stale",
    "models": "list the model presets",
    "workloads": "list the traffic presets",
    "placements": "list the placements",
    "measure": "measure on a GPU what the experts of the busiest rank cost, beside the model",
    "gpus": "list the GPUs that times can be computed for",
}


class _Parser(ArgumentParser):
    """A parser whose errors are one line, raised as InputError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **options)

    def error(self, message: str) -> NoReturn:
        required = message.partition("the following arguments are required: ")[2]
        raise InputError(f"{self.prog} needs {required}" if required else message)


class Verb(NamedTuple):
    """A verb of a verb."""

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


def add_verbs(parser: ArgumentParser, verbs: dict[str, Verb]) -> None:
    """Give a verb verbs of its own, each with its options and its help; `arguments.run` is that of the one that is asked for."""
    parser.set_defaults(verbs=tuple(verbs))
    several = parser.add_subparsers(metavar="|".join(verbs), required=True)
    for name, verb in verbs.items():
        of_verb = several.add_parser(name, help=verb.help, description=verb.help)
        verb.add_arguments(of_verb)
        of_verb.set_defaults(run=verb.run, parser=of_verb)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit status: 0; 2 for bad usage and for an input file that is missing, unreadable or invalid; 1 for a failed write
        or run; 130 after an interrupt.
    """
    words = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    prog, flags = "epsim", dict[str, str]()
    try:
        for word in words:
            if any(0xD800 <= ord(letter) < 0xE000 for letter in word):
                raise InputError(f"argument {word!r} is not UTF-8")
        if not words or words[0] in ("-h", "--help"):
            print(_help())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"epsim {version('epsim')}")
            return 0
        if words[0] not in VERBS:
            raise unknown("command", words[0], VERBS)
        from sim.options import config_words, flags_of

        prog = f"epsim {words[0]}"
        verb = import_module(f"sim.cli.{words[0]}")
        parser = _Parser(prog=prog, description=verb.__doc__)
        verb.add_arguments(parser)
        parsed = _parse(parser, words[1:])
        if getattr(parsed, "config", None) is not None:
            parsed = _parse(parser, [*config_words(parsed.config, parser), *words[1:]])  # the command line wins
        flags = flags_of(getattr(parsed, "parser", parser))
        verb.run(parsed)
        sys.stdout.flush()
    except InputError as error:
        from sim.options import named

        return _fail(prog, named(str(error), flags), 2)
    except RunError as error:
        return _fail(prog, str(error), 1)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(prog, f"cannot write {error.filename or 'the output'}: {error.strerror or error}", 1)
    except MemoryError:
        return _fail(prog, "out of memory; take fewer cells or fewer --tokens", 1)
    except KeyboardInterrupt:
        kept = "; finished chunks are kept, and the same command goes on from them" if prog == "epsim sweep" else ""
        return _fail(prog, f"interrupted{kept}", 130)
    except SystemExit as stop:  # argparse leaves so after --help
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    verbs = parser.get_default("verbs")
    if verbs and words and words[0] not in verbs and not words[0].startswith("-"):
        raise unknown(parser.prog.rpartition(" ")[2], words[0], verbs, f"; its verbs: {', '.join(verbs)}")
    try:
        parsed, rest = parser.parse_known_args(words)
    except ArgumentError as error:
        if error.argument_name is None:
            parser.error(error.message)
        raise InputError(f"{error.argument_name} {error.message}") from None
    if rest:
        from sim.options import flags_of

        parser = getattr(parsed, "parser", parser)
        near = difflib.get_close_matches(rest[0], flags_of(parser).values(), n=1)
        raise InputError(f"{rest[0]} does not go with {parser.prog}" + (f"; did you mean {near[0]}?" if near else ""))
    return parsed


def _open_streams() -> None:
    """Standard streams that can be written: a closed one goes nowhere, a terminal without ± or ≥ shows a ? for them."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(prog: str, message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"{prog}: error: {' '.join(message.split())[:1000]}", file=sys.stderr)
    return status


def _help() -> str:
    verbs = "\n".join(f"  {name:<12}{text}" for name, text in VERBS.items())
    return (
        "usage: epsim VERB [options]\n\nMonte-Carlo simulation of expert-parallel load imbalance.\n\n"
        f"verbs:\n{verbs}\n\nepsim VERB --help shows the options of a verb; epsim --version the version.\n"
        "exit status: 0; 2 for bad usage and for an input file that is missing, unreadable or invalid; 1 for a failed write or\n"
        "run; 130 after an interrupt (the same epsim sweep goes on from what is finished)."
    )
