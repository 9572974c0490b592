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

if TYPE_CHECKING:  # `as` exports a name to type checkers
    from sim.advice import advise as advise
    from sim.cost import Gpu as Gpu
    from sim.cost import capacity as capacity
    from sim.cost import exchange_time_us as exchange_time_us
    from sim.cost import expert_time_us as expert_time_us
    from sim.cost import gpu_names as gpu_names
    from sim.cost import load_gpu as load_gpu
    from sim.cost import predict_gain as predict_gain
    from sim.cost import predict_steps as predict_steps
    from sim.cost import rank_traffic as rank_traffic
    from sim.errors import InputError as InputError
    from sim.model import ModelSpec as ModelSpec
    from sim.model import load_model as load_model
    from sim.model import model_names as model_names
    from sim.placement import Placement as Placement
    from sim.placement import place as place
    from sim.results import SweepResult as SweepResult
    from sim.results import read_result as read_result
    from sim.results import write_result as write_result
    from sim.router import route as route
    from sim.scoring import score as score
    from sim.scoring import score_tokens as score_tokens
    from sim.sweeps import sweep as sweep
    from sim.traffic import LoadCounts as LoadCounts
    from sim.traffic import RecordedTraffic as RecordedTraffic
    from sim.traffic import SyntheticTraffic as SyntheticTraffic
    from sim.traffic import Workload as Workload
    from sim.traffic import load_workload as load_workload
    from sim.traffic import read_traffic as read_traffic
    from sim.traffic import synthetic_traffic as synthetic_traffic
    from sim.traffic import workload_names as workload_names
    from sim.verdicts import claims as claims

_NAMES_OF_ROOM = {
    "errors": ["InputError"],
    "model": ["ModelSpec", "load_model", "model_names"],
    "traffic": [
        *("Workload", "SyntheticTraffic", "RecordedTraffic", "LoadCounts"),
        *("load_workload", "synthetic_traffic", "read_traffic", "workload_names"),
    ],
    "router": ["route"],
    "placement": ["Placement", "place"],
    "scoring": ["score", "score_tokens"],
    "results": ["SweepResult", "read_result", "write_result"],
    "sweeps": ["sweep"],
    "cost": [
        *("Gpu", "load_gpu", "gpu_names", "exchange_time_us", "expert_time_us"),
        *("predict_gain", "predict_steps", "capacity", "rank_traffic"),
    ],
    "verdicts": ["claims"],
    "advice": ["advise"],
}
_ROOM_OF = {name: room for room, names in _NAMES_OF_ROOM.items() for name in names}
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
