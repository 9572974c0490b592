"""Options, each declared once: its name, type, range, default, unit and help.

A class of options is a frozen dataclass whose fields are made by `option`. From it derive

- the options of the command line: `add_options(parser, SweepOptions)`, and `given(arguments, SweepOptions)` to read them back;
- the keys of a TOML file (`--config`): the options without their dashes (`config_words`);
- the checks of a Python call: `SweepOptions(**keywords)` raises InputError for what is out of range;
- signature and docstring of the functions that take them: `@takes(SweepOptions)`;
- what identifies a result in its provenance: `identity(values)`.

To add an option, add a field. To add a verb, write sim/cli/NAME.py with `add_arguments(parser)` and `run(arguments)`, and its
line in `sim.cli.VERBS`; it takes the classes that it needs, and gives `type=` one of the kinds below to options of its own.
A message about a parameter names it in backquotes, as in "`ep_sizes` 300: ...". The command line writes the option in its place.
"""

from sim.options.declare import (
    Option,
    Options,
    add_options,
    check,
    config_words,
    declarations,
    flag_of,
    flags_of,
    given,
    identity,
    named,
    option,
    takes,
)
from sim.options.groups import (
    DEFAULT_MAX_TRIALS,
    DEFAULT_TRIALS,
    LAYER_CORRELATION,
    LAYER_SETS,
    MOST_STEPS,
    THRESHOLDS,
    CapacityOptions,
    CellOptions,
    FigureOptions,
    LayerOptions,
    LinkOptions,
    PlotOptions,
    RestOptions,
    RunOptions,
    StepOptions,
    SweepOptions,
    TimeOptions,
    TrafficOptions,
)
from sim.options.kinds import (
    FILE,
    NAME,
    NAMES,
    SEED,
    THREADS,
    WHOLE_NUMBERS,
    Choice,
    Folder,
    Kind,
    Listed,
    Number,
    Seconds,
    Share,
    Whole,
)

__all__ = [
    "DEFAULT_MAX_TRIALS",
    "DEFAULT_TRIALS",
    "FILE",
    "LAYER_CORRELATION",
    "LAYER_SETS",
    "MOST_STEPS",
    "NAME",
    "NAMES",
    "SEED",
    "THREADS",
    "THRESHOLDS",
    "WHOLE_NUMBERS",
    "CapacityOptions",
    "CellOptions",
    "Choice",
    "FigureOptions",
    "Folder",
    "Kind",
    "LayerOptions",
    "LinkOptions",
    "Listed",
    "Number",
    "Option",
    "Options",
    "PlotOptions",
    "RestOptions",
    "RunOptions",
    "Seconds",
    "Share",
    "StepOptions",
    "SweepOptions",
    "TimeOptions",
    "TrafficOptions",
    "Whole",
    "add_options",
    "check",
    "config_words",
    "declarations",
    "flag_of",
    "flags_of",
    "given",
    "identity",
    "named",
    "option",
    "takes",
]
