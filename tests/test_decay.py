"""Placements that go stale: against a plain reference, loads whose decay is known, what must never be shared, and real data."""

import numpy as np
import pandas as pd
import pytest
from conftest import assert_nothing_overlaps, fails, record_of, run, write
from hypothesis import given
from hypothesis import strategies as st
from naive import eplb as ref_eplb
from naive import imbalance as ref_imbalance
from scipy.stats import t as student

from sim import InputError, load_model
from sim.figures.style import look
from sim.figures.traffic import decay_by_age
from sim.fit import decay, decay_against
from sim.model import ModelSpec
from sim.traffic import RecordedTraffic, read_traffic
from sim.traffic.counts import build_counts
from sim.traffic.split import cut_file, cut_windows, split_at_random

SMALL = ModelSpec("small", n_experts=16, top_k=4)
GROUPED = ModelSpec("grouped", n_experts=16, top_k=4, n_group=4, topk_group=2)


def steps_of(counts, name="file:x"):
    """Load counts of an array [steps, layers, experts] or [layers, experts]."""
    return build_counts("x", name, np.asarray(counts))[0]


def a_record(rng, lengths, n_layers=3, n_experts=16, top_k=4):
    ids = rng.random((sum(lengths), n_layers, n_experts)).argsort(axis=2)[:, :, :top_k]
    return record_of(ids, lengths)


def ref_interval(values):
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values), np.mean(values) - half, np.mean(values) + half


@pytest.mark.parametrize("model", [SMALL, GROUPED], ids=lambda model: model.name)
def test_ages_equal_a_plain_recomputation(model):
    """24 sequences of 10 tokens in 3 windows: every pair of windows, layer by layer, in plain loops."""
    record = a_record(np.random.default_rng(0), [10] * 24)
    load = np.zeros((24, 3, 16))
    for layer in range(3):
        for token in range(240):
            for e in record.topk_ids[layer, token]:
                load[token // 10, layer, e] += 1
    fitted = [[sum(load[8 * w + 2 * i, layer] for i in range(4)) for layer in range(3)] for w in range(3)]
    scored = [[sum(load[8 * w + 2 * i + 1, layer] for i in range(4)) for layer in range(3)] for w in range(3)]
    comp = decay(model, cut_windows(record, 16, 3), ["eplb", "eplb+8"], [2, 4], ranks_per_node=2)
    assert len(comp) == 2 * (1 + 2 * 3)
    rows = comp.set_index(["placement", "ep_size", "age_windows"])
    for ep_size in (2, 4):
        linear = [[ref_imbalance(scored[w][k], list(range(16)), ep_size) for k in range(3)] for w in range(3)]
        for name, n_slots in {"eplb": 16, "eplb+8": 24}.items():
            maps = [
                [ref_eplb(list(fitted[w][k]), n_slots, model.n_group, ep_size // 2, ep_size) for k in range(3)]
                for w in range(3)
            ]
            for age in range(3):
                pairs = [(i, i + age) for i in range(3 - age)]
                own = [np.mean([ref_imbalance(scored[j][k], maps[i][k], ep_size) for i, j in pairs]) for k in range(3)]
                fresh = [
                    np.mean([ref_imbalance(scored[j][k], maps[j][k], ep_size) for _, j in pairs]) for k in range(3)
                ]
                plain = [np.mean([linear[j][k] for _, j in pairs]) for k in range(3)]
                row = rows.loc[(name, ep_size, age)]
                assert (row.pairs, row.age_tokens) == (3 - age, 80 * age)
                assert row[["imbalance_mean", "imbalance_low", "imbalance_high"]].tolist() == pytest.approx(
                    ref_interval(own)
                )
                assert row[["linear_mean", "linear_low", "linear_high"]].tolist() == pytest.approx(ref_interval(plain))
                change = np.subtract(own, plain)
                assert row[["change_mean", "change_low", "change_high"]].tolist() == pytest.approx(ref_interval(change))
                assert row.fresh_mean == pytest.approx(np.mean(fresh))
                assert row.removed_mean == pytest.approx(-change.sum() / (np.sum(plain) - 3))
                gain = np.sum(plain) - np.sum(fresh)
                assert row.lost_mean == pytest.approx(
                    (np.sum(own) - np.sum(fresh)) / gain if gain > 0 else np.nan, nan_ok=True
                )
        row = rows.loc[("linear", ep_size, 0)]
        assert row.imbalance_mean == row.linear_mean == pytest.approx(np.mean(linear))
        assert (row.pairs, row.change_mean, row.removed_mean) == (3, 0, 0)


def test_a_load_that_moves_by_one_expert_per_window():
    """Loads 8 4 2 1 on two ranks, moved by one expert per window. EPLB pairs 8 with 1 and 4 with 2: 9 of a mean of 7.5. One
    window on these ranks hold 3 and 12, two on again 6 and 9. Linear holds 12 and 3, then 9 and 6.
    """
    loads = np.repeat([np.roll([8, 4, 2, 1], w) for w in range(4)], 2, axis=0)
    table = decay(ModelSpec("m", 4, 1), cut_windows(steps_of(loads[:, None]), 4, 4), ["eplb"], [2])
    ages = table[table.placement == "eplb"]
    np.testing.assert_allclose(ages.imbalance_mean, [1.2, 1.6, 1.2, 1.6])
    np.testing.assert_allclose(ages.fresh_mean, 1.2)
    np.testing.assert_allclose(ages.linear_mean, [1.4, 4 / 3, 1.4, 1.2])
    assert ages.age_steps.tolist() == [0, 2, 4, 6]
    assert table.imbalance_mean[0] == pytest.approx(1.4)
    assert table[["imbalance_low", "change_high", "removed_low"]].isna().all(axis=None)  # one layer


def test_the_further_a_hot_spot_has_moved_the_staler_is_the_placement():
    """A bump of popularity that moves over a ring of 64 experts, by one expert per window: the imbalance of each age is that
    of one pair, which the reference gives, and it rises up to 6 windows.
    """
    ring = np.minimum(np.arange(64), 64 - np.arange(64))
    base = 1000 * np.exp(-((ring / 8) ** 2)) + np.arange(64) / 1000  # no ties
    phy2log = ref_eplb(list(base), 64, 1, 1, 8)
    ref = [ref_imbalance(list(np.roll(base, age)), phy2log, 8) for age in range(7)]
    assert (np.diff(ref) > 0.01).all()
    loads = np.repeat([np.roll(base, w) for w in range(7)], 2, axis=0)
    table = decay(ModelSpec("m", 64, 1), cut_windows(steps_of(np.stack([loads, loads], axis=1)), 64, 7), ["eplb"], [8])
    np.testing.assert_allclose(table[table.placement == "eplb"].imbalance_mean, ref)


def test_a_stationary_load_does_not_go_stale():
    """Multinomial steps of one law for each of 24 layers: what is lost at each age is 0 within 5 standard errors of Student's
    t with 23 degrees of freedom (5e-5 each, 14 of them: false alarm below 1e-3), while a law that drifts is beyond that.
    """
    rng = np.random.default_rng(1)
    first, second = rng.dirichlet(np.full(32, 2.0), (2, 24))

    def ages(drift):
        laws = [first + drift * (second - first) * step / 63 for step in range(64)]
        counts = np.stack([rng.multinomial(4000, law) for law in laws])
        table = decay(ModelSpec("m", 32, 4), cut_windows(steps_of(counts), 32, 8), ["eplb"], [4, 8])
        return table[(table.placement == "eplb") & (table.age_windows > 0)]

    def errors(rows):
        return rows.lost_mean / ((rows.lost_high - rows.lost_mean) / student.ppf(0.975, 23))

    assert (np.abs(errors(ages(0.0))) < 5).all()
    drifting = ages(1.0)
    assert (errors(drifting)[drifting.age_windows > 1] > 5).all()
    for _, of_size in drifting.groupby("ep_size"):
        assert (np.diff(of_size.lost_mean[:4]) > 0).all()
        assert (of_size.lost_mean[4:] > 0.9).all()  # by then about all is lost


def test_intervals_cover_no_loss():
    """Stationary loads of 12 layers, 300 times: the 95 % interval of what is lost covers 0 in 92 to 98 % (binomial standard
    error 1.3 %).
    """
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(300):
        counts = rng.multinomial(1000, rng.dirichlet(np.full(16, 2.0), 12), size=(4, 12))
        row = decay(SMALL, cut_windows(steps_of(counts), 16, 2), ["eplb"], [4]).iloc[-1]
        assert row.age_windows == 1
        covered.append(row.lost_low <= 0 <= row.lost_high)
    assert 0.92 <= np.mean(covered) <= 0.98


@given(st.lists(st.integers(1, 40), min_size=8, max_size=60), st.integers(2, 4))
def test_windows_part_the_file_and_halves_are_disjoint(lengths, n_windows):
    """Sequence s takes expert s alone, so that a load tells where each sequence went."""
    n = len(lengths)
    ids = np.repeat(np.arange(n, dtype=np.int16), lengths)[None, :, None]
    record = RecordedTraffic("file:x", "decode", ids, np.concatenate([[0], np.cumsum(lengths)]), "digest")
    fitted, scored = cut_windows(record, n, n_windows).halves[2:4]
    assert not (fitted * scored).any()
    np.testing.assert_array_equal((fitted + scored).sum(axis=0)[0], lengths)
    window = [np.flatnonzero(load) for load in (fitted + scored)[:, 0]]
    assert np.concatenate(window).tolist() == list(range(n))
    for experts, first, second in zip(window, fitted[:, 0], scored[:, 0], strict=True):
        assert np.flatnonzero(first).tolist() == experts[::2].tolist()
        assert np.flatnonzero(second).tolist() == experts[1::2].tolist()


def test_windows_have_about_equal_load():
    """Each end lies within half an item of its place; steps without load, unused rows of SGLang's recorder, are left out."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, 200)
    halves = cut_windows(a_record(rng, lengths.tolist(), n_layers=1), 16, 5).halves
    ends = np.cumsum((halves.fitted + halves.scored).sum(axis=(1, 2)) / 4)
    assert (np.abs(ends - lengths.sum() * np.arange(1, 6) / 5) <= 15).all()
    counts = rng.poisson(20, (90, 2, 16)) * np.repeat([1, 2, 4], 30)[:, None, None]
    counts[::7] = 0
    windows = cut_windows(steps_of(counts), 16, 4)
    ends = np.cumsum((windows.halves.fitted + windows.halves.scored).sum(axis=(1, 2)))
    assert (np.abs(ends - counts.sum() * np.arange(1, 5) / 4) <= counts.sum(axis=(1, 2)).max() / 2).all()
    assert windows.unit == "steps"
    assert windows.middle[-1] < 77  # 77 steps have load


def test_halves_drawn_at_random_conserve_counts_and_have_the_law():
    """4000 dealings of a layer: means n/2 and variances of the hypergeometric law within 5 standard errors (6 of each)."""
    counts = np.array([[0, 1, 7, 40, 100, 53], [5, 5, 5, 5, 0, 0]])
    rng = np.random.default_rng(4)
    halves = [split_at_random(counts, rng) for _ in range(4000)]
    first, second = (np.stack(half) for half in zip(*halves, strict=True))
    np.testing.assert_array_equal(first + second, np.broadcast_to(counts, first.shape))
    assert first.min() == second.min() == 0
    assert (first.sum(axis=2) == [100, 10]).all()
    assert (second.sum(axis=2) == [101, 10]).all()
    n, total, drawn = counts[0], 201, 100
    variance = drawn * n / total * (1 - n / total) * (total - drawn) / (total - 1)
    error = np.sqrt(variance / 4000)
    assert (np.abs(first[:, 0].mean(axis=0) - n * drawn / total) <= 5 * error).all()
    assert (np.abs(first[:, 0].var(axis=0) - variance) <= 5 * 1.6 * variance / np.sqrt(4000)).all()


def test_one_table_is_halved_at_random_and_the_same_seed_gives_the_same_halves():
    table = np.random.default_rng(5).integers(50, 500, (3, 16))
    halves, again, other = (cut_file(steps_of(table), 16, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(halves.fitted, again.fitted)
    assert (halves.fitted != other.fitted).any()
    assert len(halves.fitted) == 16
    np.testing.assert_array_equal(halves.fitted + halves.scored, np.broadcast_to(table, (16, 3, 16)))
    assert cut_file(steps_of(table.astype(float)), 16).fitted.sum() == 16 * (table.sum(axis=1) // 2).sum()
    moved = cut_file(steps_of(table[:, ::-1], "file:y"), 16)
    against = decay_against(SMALL, halves, moved, ["eplb"], [4]).query("placement == 'eplb'")
    assert against.pairs.tolist() == [16, 256, 16, 256]  # within a file never halves of two dealings: they share pairs
    with pytest.raises(InputError, match="whole numbers, less than 1e9"):
        cut_file(steps_of(table + 0.5), 16)
    with pytest.raises(InputError, match="whole numbers, less than 1e9"):
        cut_file(steps_of(table * 10**7), 16)
    with pytest.raises(InputError, match="layer 1 has no load in a half"):
        cut_file(steps_of(np.vstack([table[0], np.eye(16, dtype=int)[0]])), 16)


def test_files_against_each_other_equal_a_plain_recomputation():
    """One file of steps, one of sequences: fitted on the even ones of either, scored on the odd ones of either."""
    rng = np.random.default_rng(6)
    counts, record = rng.poisson(rng.gamma(2, 10, (3, 16)), (6, 3, 16)), a_record(rng, [30] * 6)
    fitted, scored = ([counts[half::2].sum(axis=0)] for half in (0, 1))
    of_sequence = np.stack([[np.bincount(x.ravel(), minlength=16) for x in np.split(k, 6)] for k in record.topk_ids], 1)
    fitted.append(of_sequence[0::2].sum(axis=0))
    scored.append(of_sequence[1::2].sum(axis=0))
    second = cut_file(record, 16)._replace(name="file:y")
    table = decay_against(SMALL, cut_file(steps_of(counts), 16), second, ["eplb"], [4]).query("placement == 'eplb'")
    assert list(zip(table.fitted, table.scored, strict=True)) == [("x", "x"), ("x", "y"), ("y", "y"), ("y", "x")]
    for row, (i, j) in zip(table.itertuples(), ((0, 0), (0, 1), (1, 1), (1, 0)), strict=True):
        maps, own = ([ref_eplb([float(x) for x in fitted[a][k]], 16, 1, 1, 4) for k in range(3)] for a in (i, j))
        ref = [ref_imbalance(scored[j][k], maps[k], 4) for k in range(3)]
        fresh = [ref_imbalance(scored[j][k], own[k], 4) for k in range(3)]
        assert (row.imbalance_low, row.imbalance_high) == pytest.approx(ref_interval(ref)[1:])
        assert row.fresh_mean == pytest.approx(np.mean(fresh))
        assert row.linear_mean == pytest.approx(
            np.mean([ref_imbalance(scored[j][k], list(range(16)), 4) for k in range(3)])
        )


def test_no_interval_of_a_share_of_what_may_be_nothing():
    """Loads alike but for noise: the interval of the gain reaches 0, and so no share of it has one. Equal loads: no share."""
    table = decay(SMALL, cut_windows(a_record(np.random.default_rng(7), [8] * 16), 16, 2), ["eplb"], [4])
    row = table[table.placement == "eplb"].iloc[0]
    assert row.change_high > 0
    assert np.isnan(row.lost_high)
    even = steps_of(np.full((4, 2, 16), 5))
    table = decay(SMALL, cut_windows(even, 16, 2), ["eplb"], [4])
    assert (table.imbalance_mean == 1).all()
    assert table[["removed_mean", "lost_mean"]].isna().all(axis=None)


@pytest.fixture
def files(tmp_path):
    """Tokens of gpt-oss-20b's shape, counts by step, and a single table of counts."""
    rng = np.random.default_rng(8)
    popularity = rng.normal(0, 1, (2, 32))
    ids = np.argsort(popularity + rng.gumbel(size=(400, 2, 32)), axis=2)[:, :, -4:].astype(np.int16)
    tokens = write(tmp_path / "tokens.npz", topk_ids=ids, sequence_lengths=np.full(40, 10))
    counts = rng.poisson(np.exp(popularity) * 20, (12, 2, 32))
    return tokens, write(tmp_path / "steps.npy", x=counts), write(tmp_path / "table.npy", x=counts[1:].sum(axis=0))


RUN = ["traffic", "decay"]
GPT = ["--model", "gpt-oss-20b", "--ep", "4,8"]


def test_ages_are_printed_and_drawn(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*RUN, files[0], *GPT, "--windows", 4, "--placement", "eplb,eplb+16", "--plot", out) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert sorted(p.name for p in out.iterdir()) == ["decay.csv", "decay.json", "decay.png"]
    table = pd.read_csv(out / "decay.csv")
    model = load_model("gpt-oss-20b")
    windows = cut_windows(read_traffic(files[0], model), 32, 4)
    ref = decay(model, windows, ["eplb", "eplb+16"], [4, 8])
    pd.testing.assert_frame_equal(table, ref, rtol=1e-9, check_dtype=False)
    row = ref.query("placement == 'eplb' and ep_size == 8 and age_windows == 3").iloc[0]
    assert f"{row.imbalance_mean:.3f} ± {row.imbalance_high - row.imbalance_mean:.3f}" in text
    assert f"{row.change_mean:+.3f} ± {row.change_high - row.change_mean:.3f}" in text
    assert "eplb at age 3 (300 tokens; 1 pair of windows): of the gain of a fresh fit it has lost" in text
    assert f"{row.lost_mean:.0%} ± {row.lost_high - row.lost_mean:.0%} at EP 8." in text
    first = ref.query("placement == 'eplb' and ep_size == 4 and change_high >= 0").age_windows.min()
    assert f"eplb is first no better than linear (the paired interval reaches 0) at: EP 4 age {first}" in text
    assert "even and odd sequences" in text
    assert "time" not in text
    assert run(*RUN, files[0], *GPT, "--markdown") == 0
    markdown = capsys.readouterr().out
    assert markdown.startswith("| placement | EP | age windows | age tokens |")
    assert all(line.startswith("|") for line in markdown.splitlines())


def test_steps_and_single_tables(files, capsys):
    _, steps, table = files
    assert run(*RUN, steps, *GPT, "--windows", 3, "--markdown") == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][2:4] == ["age windows", "age steps"]
    assert [row[2:5] for row in rows[3:6]] == [["0", "0", "3"], ["1", "4", "2"], ["2", "8", "1"]]
    fails(capsys, [*RUN, table, *GPT], "one table of counts, which is one window", "--against FILE2")
    assert run(*RUN, table, *GPT, "--against", steps) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "its counts split at random, mean of 16 times (seed 0), file:steps.npy even and odd steps" in text
    assert "eplb fitted on table.npy, scored on steps.npy: of the gain that a fit to steps.npy has, it keeps" in text
    assert run(*RUN, table, *GPT, "--against", steps, "--seed", "5") == 0
    other = " ".join(capsys.readouterr().out.split())
    assert "(seed 5)" in other
    assert other.replace("seed 5", "seed 0") != text


def test_one_layer_has_no_interval(files, tmp_path, capsys):
    path = write(tmp_path / "one.npy", x=np.load(files[1])[:, :1])
    assert run(*RUN, path, *GPT, "--windows", 2, "--plot", tmp_path / "out") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "95 %: none: the file has one layer" in text
    assert "±" not in text
    assert "nan" not in text
    assert "no better" not in text


def test_files_of_the_same_name_are_told_apart(files, tmp_path, capsys):
    other = tmp_path / "b" / "steps.npy"
    other.parent.mkdir()
    np.save(other, np.load(files[1])[::-1] * 2)
    assert run(*RUN, files[1], *GPT, "--against", other) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eplb        4")]
    names = {(row[2], row[4]) for row in table}
    assert len(names) == 4
    assert len(table) % 4 == 0  # a wide table is cut into several, each with these columns


def test_bad_input_is_one_line_and_nothing_is_written(files, tmp_path, capsys):
    tokens, steps, table = files
    counts = np.load(steps).astype(float)
    bad = {name: counts.copy() for name in ("nan", "negative", "narrow", "deep", "empty")}
    bad["nan"][3, 1, 2], bad["negative"][3, 1, 2] = np.nan, -1
    bad["narrow"], bad["deep"] = counts[:, :, :16], np.tile(counts, (1, 2, 1))
    bad["empty"][:5, 1] = 0
    bad["whole"] = counts.sum(axis=0)
    paths = {name: write(tmp_path / f"{name}.npy", x=x) for name, x in bad.items()}
    one = write(tmp_path / "one.npz", topk_ids=np.load(tokens)["topk_ids"][:10], sequence_lengths=[10])
    few = write(tmp_path / "few.npy", x=np.eye(2, 32, dtype=int))
    before = set(tmp_path.iterdir())
    plot = ["--plot", tmp_path / "out"]
    for words, parts in (
        ([paths["nan"], *GPT], ["found NaN"]),
        ([paths["negative"], *GPT], ["must not be negative"]),
        ([paths["narrow"], *GPT], ["counts of 16 experts, model gpt-oss-20b has 32"]),
        ([tokens, "--model", "olmoe-1b-7b", "--ep", "4"], ["4 experts per token, model olmoe-1b-7b has top_k 8"]),
        ([steps, *GPT], ["has 12 steps with load; --windows 8 takes at least 16"]),
        ([tokens, *GPT, "--windows", "21"], ["has 40 sequences with load; --windows 21 takes at least 42"]),
        ([tokens, *GPT, "--windows", "1"], ["--windows 1: must be a whole number from 2 to 100"]),
        ([tokens, *GPT, "--windows", "10000"], ["--windows 10000: must be a whole number from 2 to 100"]),
        ([tokens, *GPT, "--windows", "x"], ["--windows 'x': expected a whole number"]),
        ([paths["empty"], *GPT, "--windows", "4"], ["layer 1 has no load in a half of a window; take fewer --windows"]),
        ([tokens, *GPT, "--placement", "linear"], ["--placement linear: only load-aware placements go stale"]),
        ([tokens, *GPT, "--placement", "epbl"], ["did you mean eplb"]),
        ([tokens, *GPT, "--placement", "eplb+1"], ["do not divide by 4 ranks"]),
        ([tokens, "--model", "gpt-oss-20b", "--ep", "12"], ["do not divide by 12 ranks"]),
        ([tokens, "--model", "gpt-oss-20b", "--ep", "33"], ["from 1 to the 32 experts"]),
        ([tokens, "--model", "gpt-oss-20b", "--ep", "1"], ["one rank has nothing to balance"]),
        ([tokens, *GPT, "--ranks-per-node", "0"], ["--ranks-per-node 0: must be a whole number from 1"]),
        ([tokens, "--model", "gpt-oss-20b"], ["needs --ep"]),
        ([tokens, "--ep", "4"], ["needs --model"]),
        ([tokens, *GPT, "--seed", "x"], ["--seed 'x': expected a whole number"]),
        ([tokens, *GPT, "--half"], ["--half does not go with epsim traffic decay"]),
    ):
        fails(capsys, [*RUN, *words, *plot], *parts)
    for words, parts in (
        ([steps, *GPT, "--against", steps], ["it is the same traffic"]),
        ([steps, *GPT, "--against", paths["deep"]], ["has 4 layers", "steps.npy has 2"]),
        ([steps, *GPT, "--against", one], ["has one sequence"]),
        ([steps, *GPT, "--against", few], ["layer 0 has no load in a half of the file"]),
        ([steps, *GPT, "--against", paths["narrow"]], ["counts of 16 experts"]),
        ([steps, *GPT, "--against", tmp_path / "absent.npy"], ["does not exist"]),
        ([steps, *GPT, "--against", tokens, "--windows", "4"], ["--windows does not go with --against"]),
        ([steps, *GPT, "--against", tokens, *plot], ["--plot does not go with --against"]),
        ([table, *GPT, "--against", tokens, "--seed", "-1"], ["--seed -1: must be a whole number"]),
        ([paths["whole"], *GPT, "--against", steps], ["has the same loads as file:whole.npy: it is the same traffic"]),
    ):
        fails(capsys, [*RUN, *words], *parts)
    fails(capsys, ["traffic", "show", tokens, "--ep", "4"], "--ep does not go with epsim traffic show")
    assert set(tmp_path.iterdir()) == before


def test_the_figure_shows_the_table(files):
    model = load_model("gpt-oss-20b")
    table = decay(model, cut_windows(read_traffic(files[1], model), 32, 3), ["eplb", "eplb+16"], [4, 8])
    figure = decay_by_age(table, "file:steps.npy", model.name, "steps")
    assert_nothing_overlaps(figure)
    for ax, ep_size in zip(figure.axes, (4, 8), strict=True):
        assert "windows of 4 steps" in ax.get_xlabel()
        rows = table[(table.ep_size == ep_size) & (table.placement == "eplb")]
        stale, fresh = (line for line in ax.get_lines() if line.get_color() == look("eplb")["color"])
        np.testing.assert_array_equal(stale.get_ydata(), rows.imbalance_mean)
        np.testing.assert_array_equal(fresh.get_ydata(), rows.fresh_mean)
        linear = next(line for line in ax.get_lines() if line.get_color() == look("linear")["color"])
        np.testing.assert_array_equal(linear.get_ydata(), rows.linear_mean)
    assert figure.axes[0].get_ylabel()


# Real data.


def test_a_placement_of_one_domain_is_worth_nothing_on_another(shared):
    """OLMoE, 3 layers: EPLB fitted on C4 is worse on GitHub than one fitted on GitHub, and the other way round, at every EP
    size; it keeps less than half of the gain.
    """
    model = load_model("olmoe-1b-7b")
    halves = [
        cut_file(read_traffic(shared / "traces" / f"olmoe-{name}-load.csv", model), 64) for name in ("c4", "github")
    ]
    table = decay_against(model, *halves, ["eplb", "eplb+32"], [8, 16, 32])
    for (_, _, scored), rows in table[table.placement != "linear"].groupby(["placement", "ep_size", "scored"]):
        own, other = rows[rows.fitted == scored].iloc[0], rows[rows.fitted != scored].iloc[0]
        assert other.imbalance_mean > own.imbalance_mean + 0.15
        assert other.fresh_mean == pytest.approx(own.imbalance_mean)
        assert own.imbalance_mean < own.linear_mean
        assert other.lost_mean > 0.5
        assert (own.pairs, other.pairs) == (16, 256)


def test_gpt_oss_goes_stale_from_subject_to_subject(shared):
    """24 layers, windows in the order of subjects: fresh EPLB is below linear at every EP size, and what is lost of its gain
    is more at 4 windows than at 1, and all of it at 7.
    """
    model = load_model("gpt-oss-20b")
    data = read_traffic(shared / "traces" / "gpt-oss-20b-tokens.npz", model)
    table = decay(model, cut_windows(data, 32, 8), ["eplb"], [4, 8, 16])
    for _, rows in table[table.placement == "eplb"].groupby("ep_size"):
        lost = rows.set_index("age_windows").lost_mean
        assert rows.change_high.iloc[0] < 0
        assert 0 < rows.lost_low[rows.age_windows == 1].iloc[0] < lost[1] < lost[4] < lost[7]
        assert rows.lost_high.iloc[-1] > 1
        assert rows.change_high.iloc[-1] > 0
