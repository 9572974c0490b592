"""The `epsim` command: one short file per verb, imported only when the verb is asked for."""

import contextlib
import io
import os
import sys
from argparse import ArgumentParser
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from sim.errors import InputError, RunError, unknown

VERBS = {
    "sweep": "sample routed tokens and score placements on every EP size and step size",
    "show": "print the answer of a sweep again, or another part of it",
    "combine": "add sweeps of different seeds or machines",
    "plot": "draw the figures of a sweep",
    "gain": "predict the time that one placement saves over another, on a GPU",
    "step": "predict what an engine would log of each step; lay your own log beside it",
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
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status: 0, 2 for bad usage or input, 1 for a failed write or run, 130 when interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    prog = "epsim"
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
        prog = f"epsim {words[0]}"
        verb = import_module(f"sim.cli.{words[0]}")
        parser = _Parser(prog=prog, description=verb.__doc__, allow_abbrev=False)
        verb.add_arguments(parser)
        verb.run(parser.parse_args(words[1:]))
        sys.stdout.flush()
    except InputError as error:
        return _fail(prog, str(error), 2)
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
        f"verbs:\n{verbs}\n\nepsim VERB --help shows the options of a verb; epsim --version the version."
    )
