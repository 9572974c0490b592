"""Traffic that is made: traces as engines record them, a wanted imbalance, and the preset that is fitted to real ones."""

import numpy as np
import pytest

from sim import InputError, load_model, load_workload, read_traffic
from sim.cli import main
from sim.fit.correlation import within_sequences
from sim.fit.made import make_traffic, match, mean_imbalance, mean_imbalances, scaled, trace_imbalance
from sim.traffic.split import load_of

OSS = load_model("gpt-oss-20b")


def test_a_trace_has_the_form_that_readers_take_and_is_the_same_by_seed(tmp_path, capsys):
    words = [
        "traffic",
        "make",
        "--model",
        "gpt-oss-20b",
        "--workload",
        "gpt-oss-20b",
        "--tokens",
        "1001",
        "--sequences",
        "7",
    ]
    for name in ("a.npz", "b.npz"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert main([*words, "--seed", "1", "--out", str(tmp_path / "c.npz")]) == 0
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "c.npz").read_bytes()
    trace = read_traffic(tmp_path / "a.npz", OSS)
    assert trace.topk_ids.shape == (24, 1001, 4)
    assert np.diff(trace.starts).tolist() == [143] * 7
    assert trace.layer_ids.tolist() == list(OSS.moe_layer_ids)
    assert "written to" in capsys.readouterr().out


def test_the_imbalance_that_is_asked_for_is_reached_and_said(tmp_path, capsys):
    path = tmp_path / "t.npz"
    words = [
        "traffic",
        "make",
        "--model",
        "gpt-oss-20b",
        "--workload",
        "gpt-oss-20b",
        "--imbalance",
        "2.5",
        "--ep",
        "8",
    ]
    assert main([*words, "--tokens", "8192", "--out", str(path)]) == 0
    trace = read_traffic(path, OSS)
    reached = trace_imbalance(trace, OSS, 8)
    assert reached == pytest.approx(2.5, rel=0.02)
    loads = (
        np.stack([np.bincount(layer.reshape(-1), minlength=32) for layer in trace.topk_ids])
        .reshape(24, 8, 4)
        .sum(axis=2)
    )
    assert reached == pytest.approx((loads.max(axis=1) / loads.mean(axis=1)).mean(), rel=1e-12)
    assert f"{reached:.3f} (asked for: 2.5)" in " ".join(capsys.readouterr().out.split())


def test_a_scale_of_one_is_the_workload_and_zero_is_even():
    workload = load_workload("gpt-oss-20b")
    natural = mean_imbalance(workload, OSS, 16)
    assert mean_imbalance(scaled(workload, OSS, 24, 1.0), OSS, 16) == pytest.approx(natural, rel=0.01)
    assert mean_imbalance(scaled(workload, OSS, 24, 0.0), OSS, 16) < 1.1
    assert mean_imbalances(workload, OSS, [8, 16])[1] == natural
    found = match(workload, OSS, 1.5, 16)
    assert found.scale < 1
    assert found.reached == pytest.approx(1.5, rel=0.01)
    assert (
        match(load_workload("uniform"), OSS, 3.0, 16).reached < 1.1
    )  # it has no popularity to scale, and says what it reached


def test_the_nearest_preset_is_named(capsys):
    assert (
        main(["traffic", "match", "--imbalance", "1.4", "--ep", "8", "--model", "gpt-oss-20b", "--tokens", "2048"]) == 0
    )
    out = capsys.readouterr().out
    assert "Nearest as it is: gpt-oss-20b" in " ".join(out.split())
    assert main(["traffic", "match", "--imbalance", "9", "--ep", "8"]) == 2
    assert "lies from 1 to --ep 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--imbalance", "2"], "--imbalance and --ep go together"),
        (["--tokens", "5", "--sequences", "6"], "--sequences 6: must be a whole number from 1 to 5"),
        (["--out", "trace.txt"], "must be the name of a .npz file"),
        (["--workload", "file:absent.npz"], "absent.npz"),
        (["--model", "deepseek-v3"], "is fitted to 32 experts"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [
        "traffic",
        "make",
        "--model",
        "gpt-oss-20b",
        "--workload",
        "gpt-oss-20b",
        "--tokens",
        "64",
        "--sequences",
        "4",
    ]
    assert main([*base, "--out", "t.npz", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_preset_has_the_loads_and_the_correlation_of_the_trace(shared):
    """Shares of experts of every layer within 3 % of the mean share, root mean square; imbalance of ranks within 3 %; variance
    over multinomial of 64 tokens of a sequence within 15 %.
    """
    trace = read_traffic(shared / "traces" / "gpt-oss-20b-tokens.npz", OSS)
    real = load_of(trace, 32) / trace.starts[-1] / 4
    made = make_traffic(load_workload("gpt-oss-20b"), OSS, 32_768, 64)
    share = load_of(made, 32) / made.starts[-1] / 4
    assert np.sqrt(((share - real) ** 2).mean(axis=1)).max() * 32 < 0.03
    for ep_size in (8, 16):
        assert trace_imbalance(made, OSS, ep_size) == pytest.approx(trace_imbalance(trace, OSS, ep_size), rel=0.03)
    prefill = make_traffic(load_workload("gpt-oss-20b", phase="prefill"), OSS, 65_536, 256)
    found, wanted = (within_sequences(record, 64, 32).mean() for record in (prefill, trace))
    assert found == pytest.approx(wanted, rel=0.15)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="lies from 1 to"):
        match(load_workload("gpt-oss-20b"), OSS, 0.5, 8)
    with pytest.raises(InputError, match="a trace has none"):
        make_traffic(load_workload("chat", dummy_tokens=4), load_model("deepseek-v3"), 8, 2)
