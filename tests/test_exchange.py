"""Time of the exchange: each kind by its own traffic, against published and measured times."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from fit_cost import fit_layers, preset_of, table

from sim import Gpu, InputError, ModelSpec, load_gpu, load_model
from sim.cost import exchange_time_us
from sim.cost.exchange import BACKENDS, KINDS, REFUSED, exchange_kind
from sim.cost.tables import exchange_profile
from sim.measure.layer_compare import read_layers

V3 = load_model("deepseek-v3")


def exchange(**changes):
    good = {"model": V3, "gpu": "h800", "ep_size": 32, "tokens_per_rank": 128}
    return exchange_time_us(**(good | changes))


def test_deepep_times_come_back():
    """DeepEP's own, of February 2025: FP8 dispatch. The tables of one node are of a later version and name no type."""
    ep_size, dispatch_us, combine_us = table("deepep_low_latency")
    times = exchange(ep_size=ep_size)
    np.testing.assert_allclose(times.dispatch_us, dispatch_us, rtol=0.07)
    np.testing.assert_allclose(times.combine_us, combine_us, rtol=0.07)
    assert not times.extrapolated.any()
    np.testing.assert_allclose(times.total_us, times.dispatch_us + times.combine_us)


def test_exchanges_by_hand():
    """Pair, EP 32 on H800: 128 x 8 copies of 7392 bytes, 24 of 32 ranks beyond the network of 50 GB/s x 0.829, bent with the
    floor by 1.5. The others add up: floor, links, and what the GPU copies at 4.8 TB/s x 0.577.
    """
    link_us = 128 * 8 * 7392 * 0.75 / (50e3 * 0.829)
    assert exchange().dispatch_us == pytest.approx((51.0**1.5 + link_us**1.5) ** (1 / 1.5), rel=1e-6)
    one, row = {"gpu": "h200", "ep_size": 8, "tokens_per_rank": 1024}, 14336
    copy_us = row / (4.8e6 * 0.577)
    token = exchange(**one, kind="token", received_tokens=5000)
    link_us = 5000 * 7 / 8 * row / (450e3 * 0.77)
    assert token.dispatch_us == pytest.approx(15.7 + link_us + (2 * 8192 + 2 * 5000) * copy_us, rel=1e-6)
    assert token.combine_us == pytest.approx(15.7 + link_us + (8192 + 2 * 5000 + 1024) * copy_us, rel=1e-6)
    of_fp8 = exchange(
        **one, kind="token", received_tokens=5000, dtype="fp8"
    )  # 7168 bytes and 224 of scales instead of 14336
    assert of_fp8.dispatch_us - 15.7 == pytest.approx((token.dispatch_us - 15.7) * 7392 / 14336)
    assert of_fp8.combine_us == token.combine_us
    gather = exchange(**one, kind="gather")
    link_us = 8192 * 7 / 8 * row / (450e3 * 0.625)
    assert gather.dispatch_us == pytest.approx(7.2 + 7 * 1.9 + link_us + 2 * 8192 * copy_us, rel=1e-6)
    assert gather.combine_us == pytest.approx(7.2 + 7 * 1.9 + link_us + (8192 + 8192) * copy_us, rel=1e-6)
    of_fp8 = exchange(**one, kind="gather", dtype="fp8")
    assert of_fp8.dispatch_us - 20.5 == pytest.approx((gather.dispatch_us - 20.5) * 7392 / 14336)
    assert of_fp8.combine_us == gather.combine_us
    reduce = exchange(**one, kind="reduce")
    assert reduce.dispatch_us == 0
    link_us = 2 * 8192 * 7 / 8 * row / (450e3 * 0.766)
    assert reduce.combine_us == pytest.approx(9.5 + 14 * 1.9 + link_us + (3 * 8192 + 8192) * copy_us, rel=1e-6)
    assert exchange(**one, kind="none").total_us == 0
    # Two nodes: a node's cards share what comes from the other one; a token goes once to each of 1.5 nodes.
    two = one | {"ep_size": 16}
    link_us = 16384 * 15 / 16 * row / (450e3 * 0.625)
    gather = exchange(**two, kind="gather").dispatch_us
    assert gather == pytest.approx(7.2 + 7 * 1.9 + link_us + 2 * 8192 * copy_us, rel=1e-6)
    token = exchange(**two, kind="token", received_tokens=1000, nodes_per_token=1.5).combine_us
    link_us = 1024 * 1.5 / 2 * row / (50e3 * 0.86)
    assert token == pytest.approx(15.7 + link_us + (8192 + 2 * 1000 + 1024) * copy_us, rel=1e-6)


def test_each_kind_goes_with_its_own_traffic():
    """Received tokens for token, pairs for pair, tokens alone for gather and reduce."""
    one = {"gpu": "h200", "ep_size": 8, "tokens_per_rank": 1024}
    sees = {"token": {"received_tokens"}, "pair": {"pairs"}, "gather": set(), "reduce": set(), "none": set()}
    assert sees.keys() == KINDS.keys()
    for kind, own in sees.items():
        for name, few, many in (("received_tokens", 4000, 8000), ("pairs", 8192, 16384)):
            less, more = (exchange(**one, kind=kind, **{name: value}).total_us for value in (few, many))
            assert (more > less) == (name in own)
        if kind != "none":
            assert exchange(**one | {"tokens_per_rank": 2048}, kind=kind).total_us > exchange(**one, kind=kind).total_us
    even = exchange(**one, kind="token", received_tokens=8192 * (1 - (7 / 8) ** 8))
    assert exchange(**one, kind="token").total_us == pytest.approx(even.total_us)


def test_small_messages_take_the_floor_and_large_ones_the_bandwidth():
    for kind in ("token", "pair", "gather", "reduce"):
        small, large, twice = exchange(gpu="h200", ep_size=8, kind=kind, tokens_per_rank=[1, 2**18, 2**19]).total_us
        own = exchange_profile(kind, "h200")
        floor_us = sum(own.floor_us) + 14 * own.hop_us
        assert small == pytest.approx(floor_us, rel=0.06)
        assert twice / large == pytest.approx(2, rel=0.01)


def test_arrays_of_the_exchange_broadcast():
    times = exchange(gpu="h200", ep_size=[8, 16], tokens_per_rank=[[32], [64], [128]], pairs=[[[1000.0]], [[1100.0]]])
    assert times.dispatch_us.shape == times.combine_us.shape == times.extrapolated.shape == (2, 3, 2)
    assert exchange(gpu="gb200", ep_size=64, ranks_per_node=72).total_us < exchange(gpu="gb200", ep_size=64).total_us


def test_backends_stand_for_kinds():
    assert {exchange_kind(name) for name in BACKENDS} == {"token", "pair", "gather"}
    assert exchange_kind("deepep_low_latency") == exchange_kind("pair") == "pair"
    by_name = exchange(kind="allgather_reducescatter", gpu="h200")
    assert by_name.total_us == exchange(kind="gather", gpu="h200").total_us
    assert exchange_kind("naive") == exchange_kind("pplx") == "gather"  # vLLM runs its default in their place
    for name, why in REFUSED.items():
        with pytest.raises(InputError, match=re.escape(f"`exchange` {name}: {why}")):
            exchange(kind=name)
    with pytest.raises(InputError, match="'nccl' is not known"):
        exchange(kind="nccl")


def test_one_rank_exchanges_nothing_and_no_tokens_take_the_floor():
    """A rank alone sorts its pairs all the same, where the exchange's kernels do not."""
    for kind in (*KINDS, *BACKENDS):
        one = exchange(gpu="h200", ep_size=1, tokens_per_rank=[0, 64], kind=kind)
        sorts = "pairs" in exchange_profile(exchange_kind(kind), "h200", kind).copies if kind != "none" else False
        assert one.total_us[0] == 0
        assert (one.total_us[1] > 0) == sorts
        none, few = exchange(gpu="h200", ep_size=8, tokens_per_rank=[0, 1], kind=kind).total_us
        assert (0 < none <= few < 1.1 * none) or kind == "none"


def test_large_messages_of_nccl_have_a_floor_of_their_own_on_blackwell():
    """By hand, 16 MiB on 4 GB200s: a floor of 45.1 us from 8 MiB on, bent with the links by 1.5; at 2 MiB a quarter of the way
    from 12.9 us.
    """
    alone = dataclasses.replace(exchange_profile("gather", "gb200"), copies=())
    for mib, floor_us in ((16, 45.1), (2, 12.9 + (45.1 - 12.9) / 4)):
        tokens, link_us = mib * 2**20 / 14336 / 4, mib * 2**20 * 3 / 4 / (900e3 * 0.622)
        times = exchange(gpu="gb200", ep_size=4, kind="gather", tokens_per_rank=tokens, profile=alone)
        assert times.dispatch_us == pytest.approx((floor_us**1.5 + link_us**1.5) ** (1 / 1.5), rel=1e-6)


def test_a_backend_whose_kernels_were_measured_has_its_own_times():
    """DeepEP's normal kernels, 4,096 tokens on B200: 515 and 882 us, pairs sorted beside them. Others go by their kind."""
    one = {"gpu": "b200", "ep_size": 8, "tokens_per_rank": 4096, "dtype": "fp8"}
    alone = exchange(**one, kind="deepep_high_throughput", sorts_pairs=False)
    assert (alone.dispatch_us, alone.combine_us) == (pytest.approx(515.0, rel=0.05), pytest.approx(882.3, rel=0.05))
    assert not alone.extrapolated
    copy_us = 4096 * 7168 / (7.7e6 * 0.648)
    received = 8 * (1 - (7 / 8) ** 8)
    times = exchange(**one, kind="deepep_high_throughput")
    assert times.dispatch_us - alone.dispatch_us == pytest.approx(16 * (1 + 4 / 128) * copy_us)
    assert times.combine_us - alone.combine_us == pytest.approx((8 + received) * 2 * copy_us)
    assert exchange(**one | {"dtype": "bf16"}, kind="deepep_high_throughput").dispatch_us < 1.5 * times.dispatch_us
    for gpu, backend in (("h800", "deepep_high_throughput"), ("b200", "deepep_v2")):
        ours = exchange(**one | {"gpu": gpu}, kind=backend).total_us
        assert ours == exchange(**one | {"gpu": gpu}, kind="token").total_us


@pytest.mark.slow
def test_exchanges_of_measured_layers():
    """4 H100s: floors and shares are those of chat and gpqa-tilted traffic. What they did not see, in the median: uniform traffic
    within 9 %, 2 H100s, whose links do two thirds as much and whose own copies as much, within 6 % (a hop of the ring was read
    off their 8 tokens), and 4 H200s within 11 %.
    """
    folder = ROOT / "results" / "measured"
    fitted = fit_layers(read_layers(folder / "h100-ep4.csv.gz"), load_gpu("h100"))
    held_out = [
        (read_layers(folder / f"{name}.csv.gz"), off)
        for name, off in (("h100-ep4-uniform", 0.09), ("h100-ep2", 0.06), ("h200-ep4", 0.11))
    ]
    for kind, most in (("token", 0.03), ("gather", 0.07), ("reduce", 0.035)):
        own = exchange_profile(kind, "h100")
        floor_us, share, error = fitted[kind]
        assert (own.floor_us[1], own.scale_up_fraction[1]) == (round(floor_us, 1), round(share, 3))
        assert error < most
        for layers, off in held_out:
            rows = layers[layers.exchange == kind]
            times = exchange(
                gpu=preset_of(rows.gpu.iloc[0]), kind=kind, ep_size=rows.ep_size,
                tokens_per_rank=rows.tokens / rows.ep_size, received_tokens=rows.received, pairs=rows.pairs,
            )  # fmt: skip
            assert times.extrapolated[rows.tokens <= 8192].any() == (preset_of(rows.gpu.iloc[0]) == "h200")
            assert np.median(np.abs(times.total_us / rows.exchange_us - 1)) < off


def test_measured_layers_give_the_constants_of_their_exchange():
    """Made-up layers of the model's own times: floor and share come back, dispatch and combine together."""
    rng = np.random.default_rng(0)
    for kind in ("token", "gather", "reduce"):
        tokens = np.repeat([8, 512, 16384], 20)
        received = tokens * rng.uniform(0.6, 0.9, tokens.size)
        rows = pd.DataFrame(
            {"exchange": kind, "tokens": tokens, "received": received, "pairs": 2 * tokens, "ep_size": 4}
        )
        own = dataclasses.replace(exchange_profile(kind, "h100"), scale_up_fraction=(0.4, 0.4), bytes_per_value=(2, 2))
        us = exchange(
            gpu="h100", kind=kind, ep_size=4, tokens_per_rank=tokens / 4, received_tokens=received, pairs=2 * tokens,
            profile=own,
        ).total_us  # fmt: skip
        rows = rows.assign(model="deepseek-v3", exchange_us=us)
        floor_us, share, error = fit_layers(rows, load_gpu("h100"))[kind]
        assert (floor_us, share) == pytest.approx((own.floor_us[1], 0.4), rel=1e-3)
        assert error < 1e-3


def test_what_was_not_measured_is_marked():
    for change in (
        {"ep_size": 4}, {"ep_size": 320}, {"tokens_per_rank": 64}, {"pairs": 1100}, {"gpu": "h20", "ep_size": 8},
        {"gpu": "b300", "ep_size": 8}, {"gpu": "h200", "ep_size": 16},
        {"gpu": "h200", "ep_size": 8, "tokens_per_rank": 512}, {"ranks_per_node": 4}, {"kind": "token", "ep_size": 8},
        {"kind": "gather", "ep_size": 8}, {"kind": "reduce", "ep_size": 8}, {"model": "qwen3-235b-a22b"},
    ):  # fmt: skip
        assert exchange(**change).extrapolated.all()


def test_what_was_measured_is_not_marked():
    for gpu, ep_size in (("h100", 8), ("h200", 8), ("b200", 8), ("gb200", 4)):
        assert not exchange(gpu=gpu, ep_size=ep_size, tokens_per_rank=[1, 100, 256]).extrapolated.any()
    faster = dataclasses.replace(load_gpu("h200"), scale_up_gb_per_s=500)
    assert exchange(gpu=faster, ep_size=8).extrapolated


def test_bad_exchanges_are_refused():
    for change, message in (
        ({"ep_size": 0}, "ep_size 0: must be from 1"),
        ({"ep_size": 8.5}, "ep_size 8.5: must be a whole number"),
        ({"tokens_per_rank": -1}, "tokens_per_rank -1"),
        ({"pairs": -1}, "pairs -1"),
        ({"pairs": 1e9}, "pairs: cannot be above"),
        ({"kind": "token", "received_tokens": 1e9}, "received_tokens: cannot be above"),
        ({"kind": "token", "received_tokens": np.nan}, "received_tokens nan"),
        ({"ranks_per_node": 0}, "ranks_per_node 0"),
        ({"gpu": "h20"}, "gpu h20: scale_out_gb_per_s differs by cluster"),
        ({"model": ModelSpec("small", 8, 2)}, "not known: hidden_size"),
    ):
        with pytest.raises(InputError, match=message):
            exchange(**change)


def test_h20_exchanges_inside_a_node_and_with_a_network_of_its_own():
    assert exchange(gpu="h20", ep_size=8).total_us > 0
    cluster = dataclasses.replace(load_gpu("h20"), scale_out_gb_per_s=50)
    assert isinstance(cluster, Gpu)
    assert exchange(gpu=cluster).total_us == exchange(gpu="h200").total_us
