"""The experts of one rank on a CUDA device, timed by replays of captured graphs; on a CPU the same arithmetic, for tests."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sim.measure.experts import ACTIVATION_TOLERANCE, GEMM_TOLERANCE, BackendError, Say, Shape, Timing
from sim.measure.timers import GraphTimer, ProcessorTimer, Timer, copy_tb_per_s, cuda_torch, dense_tflops
from sim.measure.torch_kernels import (
    Activation,
    Gemm,
    Rounded,
    Tensor,
    activations,
    dequantise,
    first_right,
    gemms,
    quantise,
    reference_gemm,
    relative_error,
)
from sim.results import version_of

_POOL_BYTES = 24e9  # of weights for each type, where the memory has it
_POOL_SHARE = 0.3  # of the free memory, at most
_COLD = 8  # a replay reads at least so many times the L2 cache
_CHECKED_COUNTS = ((3, 0, 17, 1, 130, 0, 64, 5), (700, 0, 513))  # tokens of the experts that are checked: few, and many


class _Experts(NamedTuple):
    """Weights of a pool of experts, and rows that go into them."""

    gate_up: Rounded  # [pool, 2 * inner, width]
    down: Rounded  # [pool, width, inner]
    x: Rounded  # [rows, width]


class _Kernels(NamedTuple):
    gemm: Gemm
    activation: Activation


class TorchExperts:
    """Experts in PyTorch's grouped GEMMs. A layer's time has its kernels' launches taken out, and its weights cold.

    The weights of a pool of experts are resident. A replay chains layers, each on its own slice of the pool, that
    together read several times the L2 cache; the next measurement begins at the next slice.
    """

    def __init__(self, shape: Shape, device: str = "cuda", seed: int = 0) -> None:
        if device == "cuda":
            cuda = cuda_torch().cuda.get_device_properties(0)
            self.device, self._l2_bytes = str(cuda.name), int(getattr(cuda, "L2_cache_size", 0)) or 64 << 20
            self._timer: Timer = GraphTimer()
        else:
            self.device, self._l2_bytes = "cpu", 0
            self._timer = ProcessorTimer()
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._shape = shape
        self._experts: dict[str, _Experts] = {}
        self._kernels: dict[str, _Kernels] = {}
        self._next_slice = 0
        self.versions = f"torch {torch.__version__}; cuda {torch.version.cuda}; triton {version_of('triton')}"
        torch.manual_seed(seed)

    def prepare(self, dtype: str, say: Say) -> str:
        """Fill the pool, and take the first activation and the first GEMM that come out right: their names; say what was passed
        over. Raises BackendError.
        """
        with self._torch.inference_mode():
            self._experts[dtype] = self._make_experts(dtype)
            try:
                name, activation = self._choose_activation(dtype, say)
                gemm_name, gemm = self._choose_gemm(dtype, activation, say)
            except BackendError:
                del self._experts[dtype]  # its memory is for the other type
                raise
        self._kernels[dtype] = _Kernels(gemm, activation)
        return f"{gemm_name} + {name}"

    def _make_experts(self, dtype: str) -> _Experts:
        shape, value = self._shape, 2 if dtype == "bf16" else 1
        n_experts = max(shape.local_experts, min(self._pool_bytes() // (shape.expert_values * value), 8192))
        gate_up = self._random((n_experts, 2 * shape.inner, shape.width), shape.width**-0.5, dtype)
        down = self._random((n_experts, shape.width, shape.inner), shape.inner**-0.5, dtype)
        rows = max(shape.pairs, 16, *map(sum, _CHECKED_COUNTS))
        x = self._random((1, rows, shape.width), 1.0, dtype)
        return _Experts(gate_up, down, x.at(0))

    def _pool_bytes(self) -> int:
        if self._device.type == "cpu":
            return 2 * self._shape.local_experts * self._shape.expert_values
        free, _ = self._torch.cuda.mem_get_info()
        return int(min(_POOL_BYTES, _POOL_SHARE * free))

    def _random(self, shape: tuple[int, int, int], deviation: float, dtype: str) -> Rounded:
        """Normal values, made one matrix at a time: random numbers draw the power that real ones draw, zeros do not."""
        torch, (n, rows, columns) = self._torch, shape
        kind = torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn
        values = torch.empty((n, rows, columns), dtype=kind, device=self._device)
        scale = None if dtype == "bf16" else torch.empty((n, rows), dtype=torch.float32, device=self._device)
        for i in range(n):
            rounded = quantise(torch.randn((rows, columns), device=self._device) * deviation, dtype)
            values[i] = rounded.values
            if scale is not None:
                scale[i] = rounded.scale
        return Rounded(values, scale)

    def _choose_activation(self, dtype: str, say: Say) -> tuple[str, Activation]:
        torch = self._torch
        gate_up = torch.randn((33, 2 * self._shape.inner), device=self._device).to(torch.bfloat16)
        gate, up = gate_up.float().chunk(2, dim=-1)
        wanted = gate * torch.sigmoid(gate) * up
        return first_right(
            "activation",
            activations(self._device.type),
            lambda activation: relative_error(dequantise(Rounded(*activation(gate_up, dtype))), wanted),
            ACTIVATION_TOLERANCE[dtype],
            say,
        )

    def _choose_gemm(self, dtype: str, activation: Activation, say: Say) -> tuple[str, Gemm]:
        def error(gemm: Gemm) -> float:
            return float(np.max([self._gemm_error(dtype, gemm, activation, tokens) for tokens in _CHECKED_COUNTS]))

        return first_right("grouped GEMM", gemms(dtype, self._device.type), error, GEMM_TOLERANCE, say)

    def _gemm_error(self, dtype: str, gemm: Gemm, activation: Activation, tokens: tuple[int, ...]) -> float:
        """Larger relative error of the two GEMMs at the sizes that are measured, for experts with so many tokens."""
        experts = self._experts[dtype]
        counts = np.array(tokens[: self._shape.local_experts])
        ends, rows = self._ends(counts)
        x = experts.x.at(slice(rows))
        gate_up, down = (weights.at(slice(len(counts))) for weights in (experts.gate_up, experts.down))
        first = gemm(*x, *gate_up, ends)
        middle = Rounded(*activation(first, dtype))
        second = gemm(*middle, *down, ends)
        of_first = relative_error(first, reference_gemm(x, gate_up, ends))
        of_second = relative_error(second, reference_gemm(middle, down, ends))
        return float(np.max([of_first, of_second]))  # NaN where one of them is

    def _ends(self, counts: np.ndarray) -> tuple[Tensor, int]:
        """Where each expert's rows end, on the device, and all rows. Without tokens there are rows that belong to nobody,
        so that the kernels run all the same, as they do in serving.
        """
        ends = np.cumsum(counts)
        tensor = self._torch.tensor(ends, dtype=self._torch.int32, device=self._device)
        return tensor, int(ends[-1]) or 16

    def time_layer(self, dtype: str, counts: np.ndarray) -> Timing:
        """Time a layer whose local experts get `counts` tokens, int [experts]."""
        with self._torch.inference_mode():
            layers = list(self._layers(dtype, counts))

            def run() -> None:  # and keep no output: the next layer writes where the last one did
                for layer in layers:
                    layer()

            layers[0]()
            return Timing.of(self._timer.times_us(run), len(layers))

    def _layers(self, dtype: str, counts: np.ndarray) -> Iterator[Callable[[], Tensor]]:
        """As many layers as make the weights cold, each on its own slice of the pool."""
        experts, kernels = self._experts[dtype], self._kernels[dtype]
        ends, rows = self._ends(counts)
        x = experts.x.at(slice(rows))
        slices = len(experts.down.values) // len(counts)
        for _ in range(self._n_layers(dtype, counts, slices)):
            first = self._next_slice % slices * len(counts)
            mine = slice(first, first + len(counts))
            self._next_slice += 1
            gate_up, down = (weights.at(mine) for weights in (experts.gate_up, experts.down))

            def layer(gate_up: Rounded = gate_up, down: Rounded = down) -> Tensor:
                middle = kernels.activation(kernels.gemm(*x, *gate_up, ends), dtype)
                return kernels.gemm(*middle, *down, ends)

            yield layer

    def _n_layers(self, dtype: str, counts: np.ndarray, slices: int) -> int:
        read_bytes = np.count_nonzero(counts) * self._shape.expert_values * (2 if dtype == "bf16" else 1)
        wanted = -(-_COLD * self._l2_bytes // max(int(read_bytes), 1))
        return int(np.clip(wanted, min(2, slices), min(16, slices)))

    def calibrate(self, dtype: str) -> dict[str, float]:
        """What a copy and a dense matrix product reach, and what an empty layer takes."""
        empty = np.zeros(self._shape.local_experts, np.int64)
        found = {"empty_layer_us": self.time_layer(dtype, empty).time_us}
        if self._device.type == "cuda":
            with self._torch.inference_mode():
                found["copy_tb_per_s"] = copy_tb_per_s(self._timer)
                found["dense_tflops"] = dense_tflops(self._timer, dtype)
            self._torch.cuda.empty_cache()
        return found
