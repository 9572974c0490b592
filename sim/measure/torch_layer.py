"""One rank of an expert-parallel layer in PyTorch: NCCL and captured CUDA graphs on a GPU; gloo, for tests, on a processor."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.cost.inputs import expert_width
from sim.measure.experts import BackendError, Shape, Timing
from sim.measure.layer_plan import Cell, LayerSteps, RankPlan, Routed, plan_rank
from sim.measure.timers import GraphTimer, ProcessorTimer, Timer
from sim.measure.torch_kernels import (
    Rounded,
    Tensor,
    activations,
    dequantise,
    first_right,
    gemms,
    packings,
    quantise,
    relative_error,
    unpack,
    weighted_sums,
)
from sim.results import version_of

TOLERANCE = {"bf16": 2e-2, "fp8": 4e-2}
"""Largest relative error (Frobenius norms) of a layer against float32 on the same rounded weights, inputs and activations.

In FP8 an activation next to a rounding boundary may fall on its other side: 1.8e-2 at a width of 1024 on a processor.
"""
_COLD = 2  # a replay reads weights of at least so many times the L2 cache, however few experts are used
_REPLAY_US = 6_000  # a layer's replays are timed for about so long
_FEWEST, _MOST = 3, 12
_FREE = 1 / 3  # of the memory, at the least, when a cell begins; else what captures left behind is given back
_TIMEOUT = timedelta(seconds=100)
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


class Weights(NamedTuple):
    """Weights of a rank's slots in one layer."""

    gate_up: Rounded  # [slots, 2 * inner, width]
    down: Rounded  # [slots, width, inner]


class TorchLayer:
    """A rank that does its part of every layer. All ranks must call the same methods in the same order.

    In FP8 a token is quantised once, on its own rank and before the dispatch, to E4M3 with one scale; the dispatch carries
    values and scale in one message. Weights have a scale for each output column, the activation one for each row (GEMMs
    'rowwise'). Results are BF16, and so is what the combine carries. The exchange alone has the quantisation in it.
    """

    def __init__(self, steps: LayerSteps, rank: int, device: str, rendezvous: Path) -> None:
        os.environ |= _NO_MULTICAST
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # registering buffers would take most of a capture's time
        import torch
        import torch.distributed

        self._torch, self._dist = torch, torch.distributed
        names = dir(torch.distributed)  # their newer names, where they have them
        self._all_gather, self._reduce_scatter = (
            getattr(torch.distributed, new if new in names else old)
            for new, old in (
                ("all_gather_single", "all_gather_into_tensor"),
                ("reduce_scatter_single", "reduce_scatter_tensor"),
            )
        )
        self._steps, self._rank, self._ranks = steps, rank, steps.ep_size
        self._device = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
        if device == "cuda":
            torch.cuda.set_device(self._device)
        self._connect("nccl" if device == "cuda" else "gloo", rendezvous)
        self._timer: Timer = GraphTimer() if device == "cuda" else ProcessorTimer()
        self._shape, self._dtype = Shape.of(steps.model, steps.slots_per_rank, 0), steps.dtype
        with torch.inference_mode():
            self._choose_kernels()
            self._layers = [self._make_weights(layer) for layer in range(self._n_layers())]
            self._x = self._random((steps.tokens[-1], expert_width(steps.model)), 1.0, "tokens")
            self._nobody = quantise(self._random((16, self._shape.width), 1.0, "nobody"), self._dtype)
        self._checks = 0

    def _connect(self, backend: str, rendezvous: Path) -> None:
        store = self._dist.FileStore(str(rendezvous), self._ranks)
        self._dist.init_process_group(
            backend,
            store=store,
            rank=self._rank,
            world_size=self._ranks,
            timeout=_TIMEOUT,
            device_id=self._device if backend == "nccl" else None,
        )
        one = self._torch.ones(1, device=self._device)
        self._dist.all_reduce(one)
        if float(one) != self._ranks:
            raise BackendError(f"{backend}: a sum over {self._ranks} ranks gave {float(one):g}")

    @property
    def about(self) -> dict[str, str]:
        """Device, kernels and versions."""
        torch = self._torch
        cuda = self._device.type == "cuda"
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else "none"
        return {
            "gpu": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "kernel": self._kernel,
            "versions": f"torch {torch.__version__}; cuda {torch.version.cuda}; nccl {nccl}; triton {version_of('triton')}",
        }

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()

    def _n_layers(self) -> int:
        """Layers of a replay, each with weights of its own: at least two, so that none is left in the cache."""
        if self._device.type == "cpu":
            return 2
        cuda = self._torch.cuda.get_device_properties(self._device)
        l2_bytes = int(getattr(cuda, "L2_cache_size", 0)) or 64 << 20
        value_bytes = 2 if self._dtype == "bf16" else 1
        return int(np.clip(-(-_COLD * l2_bytes // (value_bytes * self._shape.expert_values)), 2, 16))

    def _make_weights(self, layer: int) -> Weights:
        slots = [self._matrices(layer, self._rank, slot) for slot in range(self._shape.local_experts)]
        return Weights(*map(self._stack, zip(*slots, strict=True)))

    def _stack(self, matrices: tuple[Rounded, ...]) -> Rounded:
        values, scales = zip(*matrices, strict=True)
        return Rounded(self._torch.stack(values), None if scales[0] is None else self._torch.stack(scales))

    def _matrices(self, layer: int, rank: int, slot: int) -> tuple[Rounded, Rounded]:
        """Gate and up, and down, of a slot: any rank can make them again."""
        width, inner = self._shape.width, self._shape.inner
        gate_up = self._random((2 * inner, width), width**-0.5, f"{layer} {rank} {slot} gate_up")
        down = self._random((width, inner), inner**-0.5, f"{layer} {rank} {slot} down")
        return quantise(gate_up, self._dtype), quantise(down, self._dtype)

    def _random(self, shape: tuple[int, int], deviation: float, what: str) -> Tensor:
        torch = self._torch
        key = int.from_bytes(what.encode(), "big") % (2**61 - 1) ^ self._steps.seed
        generator = torch.Generator(self._device).manual_seed(key % 2**63)
        return (torch.randn(shape, generator=generator, device=self._device) * deviation).to(torch.bfloat16)

    def _choose_kernels(self) -> None:
        """The first activation, GEMM, sum and packing that run; whether they are right shows in `check`."""
        torch, width, inner = self._torch, self._shape.width, self._shape.inner
        rows, weights = self._random((16, 2 * inner), 1.0, "rows"), self._random((2 * inner, width), 1.0, "w")[None]
        x, ends = self._random((16, width), 1.0, "x"), torch.tensor([16], dtype=torch.int32, device=self._device)
        index = torch.zeros((16, 1), dtype=torch.int32, device=self._device)
        kind, inputs = self._device.type, (*quantise(x, self._dtype), *quantise(weights, self._dtype))

        def first(what: str, choices: list[tuple[str, Any]], *arguments: Any) -> tuple[str, Any]:
            def error(kernel: Callable[..., Any]) -> float:
                kernel(*arguments)
                return 0.0

            return first_right(what, choices, error)

        gemm, self._gemm = first("grouped GEMM", gemms(self._dtype, kind), *inputs, ends)
        activation, self._activation = first("activation", activations(kind), rows, self._dtype)
        total, self._sum = first("weighted sum", weighted_sums(kind), x, index, index.float())
        self._kernel = f"{gemm} + {activation} + {total}"
        if self._dtype == "fp8":
            pack, self._pack = first("packing", packings(kind), x)
            self._kernel += f" + {pack}"

    def _on_device(self, plan: RankPlan) -> RankPlan:
        """The plan with tensors for arrays; how many rows are sent and received stays with the host."""
        tensors: list[Any] = [p if isinstance(p, list) else self._torch.from_numpy(p).to(self._device) for p in plan]
        assert all(isinstance(t, list) or t.is_contiguous() for t in tensors)  # the Triton kernels count on it
        return RankPlan(*tensors)

    def _start(self, exchange: str, tokens: int, x: Tensor) -> Tensor:
        """What a rank has of the step's tokens before the layer: its own, or all."""
        per_rank = tokens // self._ranks
        return x[:tokens] if exchange == "reduce" else x[self._rank * per_rank : (self._rank + 1) * per_rank]

    def _dispatched(self, exchange: str, plan: RankPlan, x: Tensor) -> Rounded:
        """The row of each pair, slot by slot, from the BF16 tokens that the rank starts with."""
        if self._dtype == "bf16":
            return Rounded(self._dispatch(exchange, plan, x).index_select(0, plan.rows), None)
        return unpack(self._dispatch(exchange, plan, self._pack(x)), plan.rows)

    def _dispatch(self, exchange: str, plan: RankPlan, x: Tensor) -> Tensor:
        if exchange == "reduce":
            return x
        if exchange == "gather":
            everything = x.new_empty((len(x) * self._ranks, x.shape[1]))
            self._all_gather(everything, x)
            return everything
        received = x.new_empty((sum(plan.receive_splits), x.shape[1]))
        sent = x.index_select(0, plan.send)
        self._dist.all_to_all_single(received, sent, plan.receive_splits, plan.send_splits)
        return received

    def _combine(self, exchange: str, plan: RankPlan, y: Tensor) -> Tensor:
        """Sums of pairs back to the ranks of their tokens."""
        part = self._sum(y, plan.back, plan.back_weights)
        if exchange == "reduce":
            self._dist.all_reduce(part)
            return part
        if exchange == "gather":
            own = part.new_empty((len(part) // self._ranks, part.shape[1]))
            self._reduce_scatter(own, part)
            return own
        returned = part.new_empty((sum(plan.send_splits), part.shape[1]))
        self._dist.all_to_all_single(returned, part, plan.send_splits, plan.receive_splits)
        return self._sum(returned, plan.home, plan.home_weights)

    def _experts(self, plan: RankPlan, rows: Rounded, weights: Weights) -> Tensor:
        """A rank without pairs computes rows that belong to nobody: its kernels run all the same, as they do in serving."""
        rows = rows if len(rows.values) else self._nobody
        gate_up, down = (of_slots.at(slice(len(plan.ends))) for of_slots in weights)
        middle = self._activation(self._gemm(*rows, *gate_up, plan.ends), self._dtype)
        return self._gemm(*middle, *down, plan.ends)

    def _layer(self, exchange: str, plan: RankPlan, x: Tensor, weights: Weights) -> Tensor:
        return self._combine(exchange, plan, self._experts(plan, self._dispatched(exchange, plan, x), weights))

    def measure(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows of a cell, one for each exchange and placement: the layer, the experts alone and the exchange alone."""
        with self._torch.inference_mode():
            if isinstance(self._timer, GraphTimer) and self.free_memory() < _FREE:
                self._timer.renew_pool()
            routed = {name: self._steps.routed(cell.workload, name, cell.step, cell.tokens) for name in cell.placements}
            replays = self._replays(cell.tokens)
            experts = {name: self._time_experts(routed[name], cell.tokens, replays) for name in cell.placements}
            return [
                {"exchange": exchange, "placement": name, "experts_us": experts[name], "replays": replays}
                | self._time_layer(exchange, routed[name], cell.tokens, replays)
                | routed[name].load(self._rank)
                for exchange in cell.exchanges
                for name in cell.placements
            ]

    def _time_experts(self, routed: Routed, tokens: int, replays: int) -> float:
        plan = self._on_device(plan_rank(routed, "reduce", self._rank))
        rows = self._dispatched("reduce", plan, self._x[:tokens])
        return self._time(lambda: [self._experts(plan, rows, weights) for weights in self._layers], replays)

    def _time_layer(self, exchange: str, routed: Routed, tokens: int, replays: int) -> dict[str, Any]:
        plan = self._on_device(plan_rank(routed, exchange, self._rank))
        start = self._start(exchange, tokens, self._x)
        results = self._x.index_select(0, plan.rows % len(self._x)) if self._dtype == "fp8" else None

        def layers() -> None:
            x = start
            for weights in self._layers:
                x = self._layer(exchange, plan, x, weights)

        def exchanges() -> None:
            x = start
            for _ in self._layers:
                rows = self._dispatched(exchange, plan, x).values
                x = self._combine(exchange, plan, rows if results is None else results)

        return {
            "layer_us": self._time(layers, replays),
            "exchange_us": self._time(exchanges, replays),
            "layers": len(self._layers),
        }

    def free_memory(self) -> float:
        """Share of the device's memory that is free; 1 on a processor."""
        if self._device.type == "cpu":
            return 1.0
        free, total = self._torch.cuda.mem_get_info(self._device)
        return float(free / total)

    def _replays(self, tokens: int) -> int:
        """Replays of every graph of a cell: all ranks must agree, so by the time of a layer at 100 us or 300 TFLOPS."""
        pairs = tokens * self._steps.model.top_k / self._ranks
        layer_us = 100 + 2 * self._shape.expert_values * pairs / 300e6
        return int(np.clip(_REPLAY_US / (len(self._layers) * layer_us), _FEWEST, _MOST))

    def _time(self, work: Callable[[], Any], replays: int) -> float:
        work()
        return Timing.of(self._timer.times_us(work, replays), len(self._layers)).time_us

    def check(self, workload: str, placement: str, exchange: str, tokens: int) -> float:
        """Relative error of this rank's tokens after one layer, on fresh inputs, against a plain computation."""
        with self._torch.inference_mode():
            self._checks += 1
            routed = self._steps.routed(workload, placement, 0, tokens)
            x = self._random((tokens, self._shape.width), 1.0, f"check {self._checks}")
            plan = self._on_device(plan_rank(routed, exchange, self._rank))
            found = self._layer(exchange, plan, self._start(exchange, tokens, x), self._layers[0])
            if exchange == "reduce":
                found = found[routed.own(self._rank)]
            return relative_error(found, self._plain(routed, x))

    def _plain(self, routed: Routed, x: Tensor) -> Tensor:
        """The tokens of this rank in float32, rounded where the type rounds them; weights are made again, whatever rank their
        slot is on.
        """
        torch, own = self._torch, routed.own(self._rank)
        slots, x = torch.from_numpy(routed.slots[own]).to(self._device), dequantise(quantise(x[own], self._dtype))
        weights = torch.from_numpy(routed.weights[own]).to(self._device)
        out = torch.zeros_like(x)
        for slot in slots.unique().tolist():
            gate_up, down = map(dequantise, self._matrices(0, *divmod(slot, routed.slots_per_rank)))
            token, place = torch.nonzero(slots == slot, as_tuple=True)
            gate, up = (x[token] @ gate_up.T).chunk(2, dim=-1)
            middle = dequantise(quantise(gate * torch.sigmoid(gate) * up, self._dtype))
            out[token] += weights[token, place, None] * (middle @ down.T)
        return out
