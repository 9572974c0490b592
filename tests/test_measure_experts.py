"""Experts that are computed for real: arithmetic in numpy, and in PyTorch where it is installed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from sim.measure.experts import BackendError, Shape, reference_layer, round_bf16, round_fp8
from sim.measure.timers import GraphTimer

# Arithmetic


def test_bf16_keeps_eight_bits_half_to_even():
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159265, 0, 1e-30], np.float32)
    expected = [1, 1, 1 + 2**-6, 1 + 2**-7, -3.140625, 0]
    np.testing.assert_array_equal(round_bf16(values)[:6], np.array(expected, np.float32))
    assert round_bf16(values)[6] == pytest.approx(1e-30, rel=2**-8)


def test_fp8_takes_the_nearest_of_all_e4m3_numbers():
    mantissa, exponent = np.meshgrid(np.arange(8), np.arange(1, 16))
    positive = np.concatenate([np.arange(8) * 2.0**-9, ((1 + mantissa / 8) * 2.0 ** (exponent - 7)).ravel()])
    positive = positive[positive <= 448]
    assert len(positive) == 127  # all but NaN
    random = np.random.default_rng(0)
    row = np.concatenate([random.uniform(-448, 448, 500), random.normal(size=500) * 0.02, [448.0]]).astype(np.float32)
    nearest = np.abs(np.abs(row)[:, None] - positive).min(axis=1)
    np.testing.assert_array_equal(np.abs(row - round_fp8(row)), nearest.astype(np.float32))
    np.testing.assert_array_equal(round_fp8(positive), positive.astype(np.float32))
    assert not round_fp8(np.zeros((2, 4))).any()
    assert round_fp8(np.zeros((0, 4))).shape == (0, 4)


def test_the_reference_is_the_experts_formula():
    random = np.random.default_rng(1)
    x, gate_up, down = random.normal(size=(6, 8)), random.normal(size=(3, 10, 8)), random.normal(size=(3, 8, 5))
    owner = [0, 0, 2, 2, 2, 2]
    plain = []
    for row, e in zip(x, owner, strict=True):
        gate, up = gate_up[e, :5] @ row, gate_up[e, 5:] @ row
        plain.append(down[e] @ (gate / (1 + np.exp(-gate)) * up))
    single = [array.astype(np.float32) for array in (x, gate_up, down)]
    for dtype, tolerance in (("bf16", 0.01), ("fp8", 0.06)):
        out = reference_layer(single[0], np.array([2, 0, 4]), single[1], single[2], dtype)
        assert np.linalg.norm(out - plain) / np.linalg.norm(plain) < tolerance


# PyTorch


def test_graphs_are_captured_once_and_replayed(monkeypatch):
    """The order of calls, on a made-up torch: 5 replays of 600 us for 3 ms, one after another between events."""
    calls, clock = [], [0.0]

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append("begin")

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")
            clock[0] += 0.6

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Stream:
        def __enter__(self):
            calls.append("stream")

        def __exit__(self, *error):
            return False

    cuda = SimpleNamespace(
        is_available=lambda: True, Stream=Stream, stream=lambda s: s, graph_pool_handle=lambda: (0, 1),
        CUDAGraph=Graph, Event=Event, synchronize=lambda: calls.append("wait"), empty_cache=lambda: calls.append("empty"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, zeros=lambda *a, **k: None))
    timer = GraphTimer()
    calls.clear()
    assert timer.times_us(lambda: calls.append("work")) == pytest.approx([600.0] * 5)
    assert calls[:6] == ["wait", "stream", "begin", "work", "end", "wait"]
    assert calls.count("replay") == 1 + 1 + 1 + 5
    calls.clear()
    timer.renew_pool()  # the graph that keeps the old pool is let go before the cache is emptied
    assert calls == ["wait", "empty", "wait", "stream", "begin", "end", "wait"]
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        timer.times_us(lambda: 1 / 0)
    assert calls[-1] == "end"  # a capture that is left open would break all that comes after


def torch_or_skip():
    return pytest.importorskip("torch", reason="PyTorch is not installed (extra: epsim[gpu])")


SHAPE = Shape(width=64, inner=32, local_experts=6, pairs=200)
COUNTS = np.array([3, 0, 17, 130, 0, 1])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_pytorch_computes_what_numpy_does(dtype):
    torch_or_skip()
    from sim.measure.torch_experts import TorchExperts
    from sim.measure.torch_kernels import dequantise

    backend = TorchExperts(SHAPE, "cpu", seed=3)
    assert "loop" in backend.prepare(dtype, print)
    experts = backend._experts[dtype]
    x, gate_up, down = (dequantise(part).numpy() for part in (experts.x, experts.gate_up, experts.down))
    out = next(backend._layers(dtype, COUNTS))().float().numpy()
    wanted = reference_layer(x[:151], COUNTS, gate_up[:6], down[:6], dtype)
    assert np.linalg.norm(out - wanted) / np.linalg.norm(wanted) < 1e-2
    assert backend.time_layer(dtype, COUNTS).time_us > 0
    assert backend.calibrate(dtype)["empty_layer_us"] > 0


def test_pytorch_rounds_as_numpy_does():
    torch = torch_or_skip()
    from sim.measure.torch_kernels import dequantise, quantise

    values = np.random.default_rng(0).standard_normal((40, 96), np.float32)
    for dtype, rounding in (("bf16", round_bf16), ("fp8", round_fp8)):
        np.testing.assert_allclose(
            dequantise(quantise(torch.from_numpy(values), dtype)).numpy(), rounding(values), rtol=1e-6
        )


def test_pytorchs_own_grouped_gemm_passes_the_check():
    """The kernel that runs on a GPU has a CPU version for BF16, with uneven groups and empty ones."""
    torch = torch_or_skip()
    from sim.measure.torch_experts import TorchExperts
    from sim.measure.torch_kernels import gemms, plain_activation

    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip(f"torch {torch.__version__} has no grouped_mm")
    backend = TorchExperts(SHAPE, "cpu")
    backend.prepare("bf16", print)
    _, gemm = gemms("bf16", "cuda")[0]
    with torch.inference_mode():
        assert backend._gemm_error("bf16", gemm, plain_activation, COUNTS) < 1e-2
        assert backend._gemm_error("bf16", lambda *of: 1.05 * gemm(*of), plain_activation, COUNTS) > 1e-2


def test_layers_of_a_replay_have_weights_of_their_own():
    torch_or_skip()
    from sim.measure.torch_experts import TorchExperts

    backend = TorchExperts(SHAPE, "cpu")
    backend._l2_bytes = 1 << 20
    assert backend._n_layers("bf16", COUNTS, slices=100) == 16
    assert backend._n_layers("bf16", COUNTS, slices=3) == 3
    backend._l2_bytes = 4 * SHAPE.expert_values  # 8 of them are 8 x 4 / (4 x 2) layers of four experts in BF16
    assert backend._n_layers("bf16", COUNTS, slices=100) == 4
    assert backend._n_layers("fp8", COUNTS, slices=100) == 8
    assert backend._n_layers("bf16", np.full(600, 1), slices=100) == 2


def test_kernels_that_do_not_work_are_passed_over_and_named(monkeypatch):
    torch_or_skip()
    from sim.measure import torch_experts
    from sim.measure.torch_kernels import gemms

    def absent(*arguments):
        raise NotImplementedError("no such kernel\nhere")

    name, right = gemms("bf16", "cpu")[0]
    wrong = "wrong", lambda *arguments: 2 * right(*arguments)
    missing = "missing", absent
    empty = "empty", lambda *arguments: right(*arguments) * float("nan")
    backend = torch_experts.TorchExperts(SHAPE, "cpu")
    monkeypatch.setattr(torch_experts, "gemms", lambda *a: [missing, wrong, empty, (name, right)])
    assert backend.prepare("bf16", print).startswith(name)
    monkeypatch.setattr(torch_experts, "gemms", lambda *a: [missing, wrong, empty])
    said = []
    with pytest.raises(BackendError, match="no grouped GEMM comes out right"):
        backend.prepare("fp8", said.append)
    assert said[0] == "missing is passed over: no such kernel"
    assert "wrong is passed over: relative error 1" in said[1]
    assert said[2] == "empty is passed over: relative error nan"
    assert "fp8" not in backend._experts


def test_the_fused_activation_is_the_plain_one():
    """Triton's interpreter runs the kernel on a processor; the variable must be set before Triton is imported. It does not
    carry into the exponent when it rounds to E4M3, so values that round up to a power of two are left out there.
    """
    torch_or_skip()
    pytest.importorskip("triton", reason="Triton is not installed")
    program = """
import torch
from sim.measure.fused import silu_mul
from sim.measure.torch_kernels import plain_activation
rows = torch.randn((7, 2 * 48), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
rows[3] = 0
gate, up = rows.float().chunk(2, dim=1)
wanted = gate * torch.sigmoid(gate) * up
found, scale = silu_mul(rows, "bf16")
assert scale is None and float((found.float() - wanted).norm() / wanted.norm()) < 1e-2
(found, scale), (plain, plain_scale) = silu_mul(rows, "fp8"), plain_activation(rows, "fp8")
torch.testing.assert_close(scale, plain_scale)
found, plain = found.float(), plain.float()
whole = torch.frexp(plain).mantissa.abs() != 0.5
assert whole.float().mean() > 0.8
assert float((found - plain)[whole].norm() / plain[whole].norm()) < 1e-2
assert not found[3].any()
assert silu_mul(rows[:0], "fp8")[0].shape == (0, 48)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
