"""Traffic that is made: traces as engines record them, a wanted imbalance, and the preset that is fitted to real ones."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import fails

from sim import InputError, load_model, load_workload, read_traffic, workload_names
from sim.cli import main
from sim.fit.correlation import within_sequences
from sim.fit.made import make_traffic, match, mean_imbalances, misfits, scaled, trace_imbalance
from sim.traffic import FittedLayers
from sim.traffic.split import load_of

OSS = load_model("gpt-oss-20b")


def test_a_trace_has_the_form_that_readers_take_and_is_the_same_by_seed(tmp_path, capsys):
    words = "traffic make --model gpt-oss-20b --workload gpt-oss-20b --tokens 1001 --sequences 7".split()
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
    words = "traffic make --model gpt-oss-20b --workload gpt-oss-20b --imbalance 2.5 --ep 8".split()
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
    natural = mean_imbalances(workload, OSS, [8, 16])[1].mean
    as_it_is, even = (mean_imbalances(scaled(workload, OSS, 24, scale), OSS, [16])[0].mean for scale in (1.0, 0.0))
    assert as_it_is == pytest.approx(natural, rel=0.01)
    assert even < 1.1
    found = match(workload, OSS, 1.5, 16)
    assert found.scale < 1
    assert found.reached == pytest.approx(1.5, rel=0.01)
    assert (
        match(load_workload("uniform"), OSS, 3.0, 16).reached < 1.1
    )  # it has no popularity to scale, and says what it reached


def test_the_nearest_preset_is_named_and_the_scale_that_reaches_it(capsys):
    words = ["traffic", "match", "--ep", "8", "--tokens", "1024", "--model", "gpt-oss-20b"]
    assert main([*words, "--imbalance", "1.43"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Nearest as it is: gpt-oss-20b. Within the interval of gpt-oss-20b." in out
    assert main([*words, "--imbalance", "2.1", "--workload", "chat,uniform"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2.1 lies in no preset's interval" in out
    scale, sigma = re.search(r"chat with its popularity scaled by ([\d.]+), which is sigma ([\d.]+)", out).groups()
    wanted = load_workload("chat", sigma=float(sigma))
    assert float(sigma) == pytest.approx(0.65 * float(scale), rel=0.01)
    mean, half = mean_imbalances(wanted, OSS, [8], tokens=1024, n_layers=256, seed=5)[0]
    assert abs(mean - 2.1) < 3 * half
    fails(capsys, ["traffic", "match", "--imbalance", "9", "--ep", "8"], "lies from 1 to --ep 8")


@pytest.mark.slow
def test_presets_are_listed_with_their_imbalance_and_what_they_miss(capsys):
    assert main(["workloads", "--ep", "8,64", "--json"]) == 0
    rows = {(row["workload"], row["ep_size"]): row for row in json.loads(capsys.readouterr().out)}
    assert {name for name, _ in rows} == set(workload_names())
    assert rows["translation", 64]["model"] == "deepseek-v3"
    assert rows["gpt-oss-20b", 8]["model"] == "gpt-oss-20b"
    assert ("gpt-oss-20b", 64) not in rows  # of 32 experts
    assert rows["uniform", 8]["high"] < rows["chat", 8]["low"] < rows["mixed", 8]["low"] < rows["translation", 8]["low"]
    ((figure, found),) = misfits("one-subject")
    assert figure.low[0] < found[0].mean < figure.high[0]
    assert main(["workloads", "--ep", "8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"the worst of 24 layers: EP 8 2.40 to 2.80, here {found[0].mean:.2f} ± {found[0].half:.2f}" in out


def test_bad_usage_is_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = "traffic make --model gpt-oss-20b --workload gpt-oss-20b --tokens 64 --sequences 4".split()
    for words, message in (
        (["--imbalance", "2"], "--imbalance and --ep go together"),
        (["--tokens", "5", "--sequences", "6"], "--sequences 6: must be a whole number from 1 to 5"),
        (["--out", "trace.txt"], "must be the name of a .npz file"),
        (["--workload", "file:absent.npz"], "absent.npz"),
        (["--model", "deepseek-v3"], "is fitted to 32 experts"),
    ):
        fails(capsys, [*base, "--out", "t.npz", *words], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_normal_popularity_goes_from_the_mean_to_the_worst_layer_of_the_recorded_mix(shared):
    """Why one-subject has that family: scaled to the mix's mean share of the busiest of 8 ranks it has the worst of 24 layers
    within 5 %, Student's t with 6 degrees of freedom is 8 % above it or more. Fixed seed; standard errors are below 1 %.
    """
    trace = read_traffic(shared / "traces" / "gpt-oss-20b-tokens.npz", OSS)
    real = load_of(trace, 32).reshape(24, 8, 4).sum(axis=2)
    real = real.max(axis=1) / real.mean(axis=1)
    rng, errors = np.random.default_rng(0), []
    for mu in (rng.standard_normal((2400, 32)), rng.standard_t(6, (2400, 32))):
        drawn = replace(load_workload("gpt-oss-20b"), layers=FittedLayers.of(mu))
        scale = match(drawn, OSS, float(real.mean()), 8, tokens=1024).scale
        ((worst, _),) = mean_imbalances(scaled(drawn, OSS, 0, scale), OSS, [8], tokens=1024, worst_of=24)
        errors.append(worst / real.max() - 1)
    assert abs(errors[0]) < 0.05
    assert errors[1] > 0.08
