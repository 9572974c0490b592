"""Loads -> time: GPUs, expert computation, exchange, and what engines log over layers; and loads -> buffers."""

from sim.cost.buffers import capacity
from sim.cost.exchange import exchange_time_us
from sim.cost.expert import expert_time_us
from sim.cost.gain import predict_gain
from sim.cost.gpu import Gpu, gpu_names, load_gpu
from sim.cost.links import rank_traffic
from sim.cost.step_log import predict_steps

__all__ = [
    "Gpu",
    "capacity",
    "exchange_time_us",
    "expert_time_us",
    "gpu_names",
    "load_gpu",
    "predict_gain",
    "predict_steps",
    "rank_traffic",
]
