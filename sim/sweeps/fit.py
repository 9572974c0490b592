"""What load-aware placements are fitted on, and the slots that come of it: never the tokens that are scored."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.errors import InputError, shown, unknown, whole_number
from sim.model import ModelSpec
from sim.placement import Placement, check_loads, is_load_aware, place_balanced, place_fixed, split_name
from sim.replicas import REPLICA_CHOICES
from sim.traffic import RecordedTraffic, SyntheticTraffic, Workload, load_table

MAX_TOKENS = 2**24
DEFAULT_FIT_TOKENS = 2**14
_MOST_HASHED_TOKENS = 2**20  # per step: the experts of every token are held


class Fit(NamedTuple):
    """What load-aware placements are fitted on, and the traffic that is left to score: never the same tokens."""

    scored: Workload
    about: str = ""
    tokens: int = 0  # of each draw of a law
    loads: np.ndarray | None = None  # of the layers of a record, float64 [layers, n_experts]


def choose_fit(names: list[str], model: ModelSpec, workload: Workload, tokens: int | None, other: Any) -> Fit:
    """By law: other tokens of each layer draw. Recorded: every second sequence. Recorded or fitted: other traffic (a file, or
    what was read from one) of the same layers.
    """
    if not any(map(is_load_aware, names)):
        for option, value in (("--fit-tokens", tokens), ("--fit-on", other)):
            if value is not None:
                raise InputError(f"{option} goes with a load-aware placement (eplb, eplb_refined); there is none")
        return Fit(workload)
    if other is not None and workload.n_layers is None:
        raise InputError(
            f"--fit-on {shown(str(other))}: goes with recorded or fitted traffic; the layers of {workload.name} are drawn, and "
            "those of other traffic are unrelated to them (--fit-tokens sets what is fitted)"
        )
    if other is not None and tokens is not None:
        raise InputError("--fit-tokens and --fit-on exclude each other: tokens of the same layers, or other traffic")
    if isinstance(workload, SyntheticTraffic) and other is None:
        n = whole_number("--fit-tokens", DEFAULT_FIT_TOKENS if tokens is None else tokens, 1, MAX_TOKENS)
        return Fit(workload, f"{n} other tokens of each layer draw", n)
    if tokens is not None:
        raise InputError("--fit-tokens goes with traffic by law; recorded traffic is fitted on every second sequence")
    if isinstance(workload, RecordedTraffic) and other is None:
        fitted, scored = workload.halves()
        return Fit(scored, "even sequences of the record", loads=fitted.count_experts(model.n_experts).astype(float))
    table = load_table(Path(other.removeprefix("file:")) if isinstance(other, str) else other, model)
    about = f"--fit-on {table.name.removeprefix('file:')}"
    loads = check_loads(table.loads, model.n_experts, about, layers=True)
    if len(loads) != workload.n_layers:
        raise InputError(f"{about} has {len(loads)} layers, workload {workload.name} has {workload.n_layers}")
    if (
        table.digest == getattr(workload, "digest", "") or table.digest in workload.source
    ):  # a law names what it is fitted to
        raise InputError(f"{about} is the traffic that is scored; leave it out to fit on other tokens")
    return Fit(workload, f"{table.name.removeprefix('file:')} ({table.digest[:16]})", loads=loads)


def slots_of_pair(
    name: str, model: ModelSpec, ep_size: int, ranks_per_node: int, loads: np.ndarray | None
) -> Placement | None:
    """Placement of a pair, of one layer or all; None where each draw has its own."""
    if is_load_aware(name):
        return None if loads is None else place_balanced(name, model, ep_size, ranks_per_node, loads)
    if name == "random":
        return None
    return place_fixed(name, model, ep_size, ranks_per_node)


def layout_id(name: str, slots: Placement | None, fit: str, replica_choice: str) -> str:
    """What tells the layout of a pair from another's: a digest of fixed slots, or how each draw gets its own."""
    if slots is None:
        layout, replicas = name if name == "random" else f"{name}, fitted on {fit}", split_name(name)[1] > 0
    else:
        replicas = slots.has_replicas
        table = slots.ranks.tobytes() + slots.experts.tobytes() if replicas else slots.expert_ranks.tobytes()
        layout = hashlib.sha256(table).hexdigest()[:16]
    return f"{layout}, {replica_choice}" if replicas and replica_choice != "even" else layout


def check_replica_choice(choice: str, workload: Workload, largest_step: int) -> None:
    """Refuse a choice that is not known, or that needs tokens which cannot be had."""
    if choice not in REPLICA_CHOICES:
        raise unknown("--replica-choice", shown(choice), REPLICA_CHOICES)
    if choice != "vllm_hash":
        return
    if isinstance(workload, RecordedTraffic) and workload.phase == "prefill":
        raise InputError("--replica-choice vllm_hash: not with --phase prefill of recorded traffic")
    if largest_step > _MOST_HASHED_TOKENS:
        raise InputError(
            f"--replica-choice vllm_hash holds every token of a step: at most {_MOST_HASHED_TOKENS} tokens, not {largest_step}"
        )
