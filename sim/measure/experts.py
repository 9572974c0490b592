"""The experts of one rank, computed for real: what a backend gives, and the plain numpy one that tests use."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sim.cost.inputs import expert_parameters, expert_width
from sim.errors import InputError
from sim.measure.timers import ProcessorTimer
from sim.model import ModelSpec

Say = Callable[[str], None]
DTYPES = ("bf16", "fp8")
FP8_MAX = 448.0  # the largest E4M3 number
GEMM_TOLERANCE = 1e-2
"""Largest relative error (Frobenius norms) of a GEMM against float32 on the same rounded inputs."""
ACTIVATION_TOLERANCE = {"bf16": 1e-2, "fp8": 4e-2}
"""The same for the activation; rounding to E4M3's three bits alone gives 2.6e-2."""


@dataclass(frozen=True)
class Shape:
    """Sizes that a backend must hold."""

    width: int  # of a token
    inner: int  # of what passes between an expert's two GEMMs
    local_experts: int  # the most of a rank
    pairs: int  # the most of a rank

    @classmethod
    def of(cls, model: ModelSpec, local_experts: int, pairs: int) -> "Shape":
        """Sizes of a model's experts; InputError where they are not known, or are not gate, up and down."""
        expert_parameters(model)
        if model.expert_matrices != 3:
            raise InputError(f"model {model.name}: experts of gate, up and down are measured, not of other matrices")
        return cls(expert_width(model), model.moe_intermediate_size, local_experts, pairs)

    @property
    def expert_values(self) -> int:
        """Parameters of one expert."""
        return 3 * self.width * self.inner


@dataclass(frozen=True)
class Timing:
    """Time of one layer on one rank."""

    time_us: float  # median over the replays
    spread_us: float  # their interquartile range
    layers: int  # with weights of their own, that a replay chains
    replays: int

    @classmethod
    def of(cls, replay_us: list[float], layers: int) -> "Timing":
        """Time of a layer from the times of whole replays."""
        low, median, high = np.quantile(np.array(replay_us) / layers, [0.25, 0.5, 0.75])
        return cls(float(median), float(high - low), layers, len(replay_us))


class BackendError(RuntimeError):
    """Nothing that this device offers computes a type's experts, and computes them right."""


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to BF16, half to even; finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def round_fp8(values: np.ndarray) -> np.ndarray:
    """Rows [..., n] rounded to E4M3 with one scale each, and scaled back: float32."""
    values = np.asarray(values, np.float32)
    scale = np.maximum(np.abs(values).max(axis=-1, keepdims=True, initial=0) / FP8_MAX, 1e-12)
    scaled = values / scale
    _, exponent = np.frexp(scaled)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 4, -9))  # three bits after the first; below 2**-6 a fixed step
    return np.clip(np.rint(scaled / step) * step, -FP8_MAX, FP8_MAX) * scale


def reference_layer(x: np.ndarray, counts: np.ndarray, gate_up: np.ndarray, down: np.ndarray, dtype: str) -> np.ndarray:
    """A rank's experts in float32, with what passes between the two GEMMs rounded to `dtype`: float32 [pairs, width].

    x float32 [pairs, width], rows of the first expert, then of the second, and so on; counts int [experts]; gate_up float32
    [experts, 2 * inner, width]; down float32 [experts, width, inner].
    """
    out = np.empty_like(x)
    last = 0
    for expert, count in enumerate(counts):
        rows = slice(last, last := last + int(count))
        gate, up = np.split(round_bf16(x[rows] @ gate_up[expert].T), 2, axis=1)
        middle = gate / (1 + np.exp(-gate)) * up
        middle = round_bf16(middle) if dtype == "bf16" else round_fp8(middle)
        out[rows] = round_bf16(middle @ down[expert].T)
    return out


class NumpyExperts:
    """Toy sizes on a processor, without PyTorch: the whole path, for tests. Its times say nothing about a GPU."""

    device = "cpu"
    versions = f"numpy {np.__version__}"
    _most_values = 2**27

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        if (values := shape.local_experts * shape.expert_values) > self._most_values:
            raise InputError(
                f"--device cpu is for toy sizes: a rank's {shape.local_experts} experts have {values / 1e6:.0f} M parameters, "
                f"and at most {self._most_values / 1e6:.0f} M are computed; take a small config.json or --device cuda"
            )
        random = np.random.default_rng(seed)
        self._x = random.standard_normal((max(shape.pairs, 1), shape.width), np.float32)
        scale = np.float32(shape.width**-0.5)
        self._gate_up = random.standard_normal((shape.local_experts, 2 * shape.inner, shape.width), np.float32) * scale
        self._down = random.standard_normal((shape.local_experts, shape.width, shape.inner), np.float32) * scale

    def prepare(self, dtype: str, say: Say) -> str:
        """The one kernel that there is."""
        return f"numpy, a loop over experts in float32, rounded to {dtype}"

    def time_layer(self, dtype: str, counts: np.ndarray) -> Timing:
        """Time a layer whose local experts get `counts` tokens, int [experts]."""
        x = self._x[: counts.sum()]
        return Timing.of(
            ProcessorTimer().times_us(lambda: reference_layer(x, counts, self._gate_up, self._down, dtype)), 1
        )

    def calibrate(self, dtype: str) -> dict[str, float]:
        """Time of an empty layer."""
        return {"empty_layer_us": self.time_layer(dtype, np.zeros(len(self._down), np.int64)).time_us}
