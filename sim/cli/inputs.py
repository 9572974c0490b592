"""The inputs that verbs share: model, traffic, GPUs and placements as the options name them, and remarks about them."""

from argparse import Namespace
from typing import Any

from sim.cli.terminal import note, note_compiling
from sim.errors import InputError
from sim.files import model_label
from sim.options import LAYER_CORRELATION, StepOptions, TimeOptions
from sim.options.declare import given


def read_inputs(arguments: Namespace) -> tuple[Any, Any]:
    """The model, and the traffic with what its options say of it."""
    from sim.model import load_model
    from sim.traffic import load_workload

    names = [name for name in ("phase", "tokens_per_request", "dummy_tokens") if hasattr(arguments, name)]
    model = load_model(arguments.model)
    workload = load_workload(arguments.workload, model, **{name: getattr(arguments, name) for name in names})
    note(*getattr(workload, "notes", ()))
    return model, workload


def read_file(path: Any, model: Any, phase: str | None) -> Any:
    """What a file of traffic holds, decode steps where nothing else is asked for."""
    from pathlib import Path

    from sim.traffic import read_traffic

    path, phase = Path(str(path).removeprefix("file:")), "decode" if phase is None else phase
    try:
        traffic = read_traffic(path, model, phase)
    except InputError as error:
        if model is None or f"model {model.name} has" not in str(error):
            raise
        end = "" if str(error).endswith("?") else "."
        raise InputError(f"{error}{end} {_models_like(read_traffic(path, None, phase))}") from None
    note(*traffic.notes)
    return traffic


def _models_like(traffic: Any) -> str:
    """Which presets have the shape of a file."""
    from sim.model import load_model, model_names

    shape = [traffic.n_experts, *([traffic.topk_ids.shape[2]] if hasattr(traffic, "topk_ids") else [])]
    alike = [model for model in map(load_model, model_names()) if [model.n_experts, model.top_k][: len(shape)] == shape]
    names = [model.name for model in alike if model.n_moe_layers == traffic.n_layers] or [model.name for model in alike]
    named = ", ".join([*names[:6], "..."] if len(names) > 6 else names) or "no preset"
    return f"With {', top-'.join([f'{shape[0]} experts', *map(str, shape[1:])])}: {named}; or give its config.json (--model)"


def check_there(rows: Any, wanted: dict[str, list[Any] | None], where: str) -> None:
    """Refuse a value of a column that a table does not have; None wants all."""
    for column, values in wanted.items():
        there = list(dict.fromkeys(rows[column])) if column in rows else [f"no column {column}"]
        for value in values or []:
            if value not in there:
                raise InputError(f"`{column}` {value}: {where} has {', '.join(map(str, there))}")


def rows_of(rows: Any, wanted: dict[str, list[Any] | None]) -> Any:
    """Rows that have one of the wanted values in each column."""
    for column, values in wanted.items():
        rows = rows if values is None else rows[rows[column].isin(values)]
    return rows


def step_options(arguments: Namespace, model: Any, gpus: list[Any]) -> dict[str, Any]:
    """Keyword arguments that stand for the options of steps, their sampling and their times."""
    from sim.cost.inputs import dtype_of

    options = given(arguments, StepOptions) | given(arguments, TimeOptions)
    return options | {"dtype": dtype_of(model, gpus, arguments.dtype)}


def identity_of(model: Any, workload: Any, options: dict[str, Any], gpus: list[Any], **more: Any) -> dict[str, Any]:
    """All that a table depends on, as JSON values."""
    from dataclasses import asdict

    identity = {name: value for name, value in options.items() if name != "threads"}
    identity |= {"model": model.name, "workload": workload.name}
    return identity | {"law": law_of(workload), "gpus": [asdict(gpu) for gpu in gpus]} | more


def law_of(traffic: Any) -> dict[str, Any]:
    """What tells traffic apart: its law, or the digest of load counts."""
    return traffic.law if hasattr(traffic, "law") else {"counts": traffic.digest}


def say_about_inputs(model: Any, workload: Any) -> None:
    """Notes on a model that was not verified, and on traffic that was fitted to another one."""
    if model.unverified:
        note(f"{model_label(model.name)}: not read from the checkpoint itself: {'; '.join(model.unverified)}")
    if model.caveat:
        note(f"{model_label(model.name)}: {model.caveat}")
    fitted_to = getattr(workload, "fitted_to", "")
    alike = ("deepseek-r1", "deepseek-v3")  # one router
    same = model.name.startswith(alike) if fitted_to.startswith(alike) else model.name == fitted_to
    if fitted_to and not same:
        note(f"{workload.name} traffic is fitted to {fitted_to}; on {model_label(model.name)} it is an assumption")
    if getattr(workload, "whole_requests", False) and hasattr(workload, "request_sigma"):
        note(
            f"{workload.name}: the tokens of a request share an effect of sd {workload.request_sigma:g} (request_sigma) on each "
            "expert's logit"
        )


def say_about_layers(layer_correlation: float | None) -> None:
    """Where a layer correlation comes from."""
    if layer_correlation == LAYER_CORRELATION:
        note(
            f"layer correlation {layer_correlation:g}: measured on gpt-oss-20b's recorded steps (1.2 to 2.9 by placement, EP "
            "size and tokens); epsim step --traffic FILE measures yours"
        )


def say_about_times(model: Any, workload: Any, gpus: list[Any], options: dict[str, Any]) -> None:
    """Notes on numbers that were not verified, or that are assumed."""
    from sim.cost.inputs import NETWORK_GB_PER_S

    note_compiling()
    say_about_inputs(model, workload)
    if options["dtype"] not in model.routed_dtype:
        stored = f"its experts are stored as {model.routed_dtype}"
        stored = "how its experts are stored is not known" if model.routed_dtype == "unknown" else stored
        note(f"{model_label(model.name)}: {stored}, times and memory are for {options['dtype']} (--dtype)")
    has_network = options["exchange"] not in ("none", ["none"]) and not options["network_gb_per_s"]
    for gpu in gpus:
        if gpu.unverified:
            note(f"{gpu.name}: not verified: {', '.join(gpu.unverified)}")
        if has_network and gpu.scale_out_gb_per_s is None:
            note(
                f"{gpu.name}: its network differs by cluster; taken as {NETWORK_GB_PER_S:g} GB/s (--network-gb sets it)"
            )


def say_about_maps(names: list[str], model: Any, ep_sizes: list[int], ranks_per_node: int) -> None:
    """Notes on placements that are read from files."""
    from sim.placement import notes_on, place_fixed

    for name in names:
        for size in ep_sizes if name.startswith("file:") else []:
            note(*notes_on(place_fixed(name, model, size, ranks_per_node)))
