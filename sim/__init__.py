"""epsim: Monte-Carlo simulation of expert-parallel load imbalance.

>>> import sim
>>> model = sim.load_model("deepseek-v3")
>>> model.n_experts, model.top_k, model.n_group, model.topk_group
(256, 8, 8, 4)
>>> sim.place("round_robin", model, 8).rank_of_expert[:10].tolist()
[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
>>> loads = [250] + 255 * [100]
>>> sim.place("eplb", model, 16, loads=loads, redundant=16).logical_of_slot.tolist().count(0)
3
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.advice import advise
    from sim.cost import (
        Gpu,
        capacity,
        exchange_time_us,
        expert_time_us,
        gpu_names,
        load_gpu,
        predict_gain,
        predict_steps,
        rank_traffic,
    )
    from sim.errors import InputError
    from sim.model import ModelSpec, load_model, model_names
    from sim.placement import Placement, place
    from sim.results import SweepResult, read_result, write_result
    from sim.router import route
    from sim.scoring import score, score_tokens
    from sim.sweeps import sweep
    from sim.traffic import (
        LoadCounts,
        RecordedTraffic,
        SyntheticTraffic,
        Workload,
        load_workload,
        read_traffic,
        synthetic_traffic,
        workload_names,
    )
    from sim.verdicts import claims

_ROOM_OF = {
    "InputError": "errors",
    "ModelSpec": "model",
    "load_model": "model",
    "model_names": "model",
    "Workload": "traffic",
    "SyntheticTraffic": "traffic",
    "RecordedTraffic": "traffic",
    "LoadCounts": "traffic",
    "load_workload": "traffic",
    "synthetic_traffic": "traffic",
    "read_traffic": "traffic",
    "workload_names": "traffic",
    "route": "router",
    "Placement": "placement",
    "place": "placement",
    "score": "scoring",
    "score_tokens": "scoring",
    "SweepResult": "results",
    "read_result": "results",
    "write_result": "results",
    "sweep": "sweeps",
    "Gpu": "cost",
    "load_gpu": "cost",
    "gpu_names": "cost",
    "exchange_time_us": "cost",
    "expert_time_us": "cost",
    "predict_gain": "cost",
    "predict_steps": "cost",
    "capacity": "cost",
    "rank_traffic": "cost",
    "claims": "verdicts",
    "advise": "advice",
}
__all__ = list(_ROOM_OF)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `epsim --help` does not wait for numba."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'sim' has no attribute '{name}'")
    value = getattr(import_module(f"sim.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
