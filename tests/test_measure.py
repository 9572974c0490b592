"""Measurement: sampled shares of ranks, a table that survives a kill, and what is refused when it is read back."""

import itertools

import numpy as np
import pytest
from devices import H100, MadeUp, measured, steps_of, usual_steps

from sim.cost import expert_time_us
from sim.errors import InputError
from sim.measure.experts import Shape
from sim.measure.steps import busiest_ranks
from sim.measure.table import COLUMNS, partial_path, read_measured
from sim.model import ModelSpec
from sim.scoring import score

# What is measured


def test_all_placements_and_ep_sizes_share_the_tokens():
    steps = usual_steps()
    for workload, counts in steps.counts.items():
        assert counts.shape == (3, 2, 256)
        assert (counts.sum(axis=2) == np.array([8, 512]) * 8).all()
        assert (counts[:, 0] <= counts[:, 1]).all(), workload  # a shorter step begins a longer one
    assert steps.most_local_experts == 32
    loads = [score(slots, steps.counts[workload]).max_load.max() for (workload, _, _), slots in steps.placed.items()]
    assert steps.most_pairs == max(loads)


def test_copies_of_an_expert_share_its_tokens():
    """Each step has its own fitted slots; the tokens of an expert's copies add up to its own, and differ by one at most."""
    steps = steps_of(placements=["linear", "eplb+32"], ep_sizes=[32])
    for workload, counts in steps.counts.items():
        key = (workload, "eplb+32", 32)
        assert len(steps.placed[key].ranks) == 3
        for step, size in itertools.product(range(3), range(2)):
            of_slot, ranks = steps.slot_counts(key, step, size)
            assert np.bincount(ranks).tolist() == [9] * 32
            experts = steps.placed[key].experts[step]
            for e in range(256):
                mine = of_slot[experts == e]
                assert mine.sum() == counts[step, size, e]
                assert mine.max() - mine.min() <= 1
    assert steps.most_local_experts == 9


def test_the_busiest_ranks_and_one_other_are_measured():
    steps = usual_steps()
    for layers in steps.compared(H100, ["bf16", "fp8"]):
        for layer in layers:
            counts = steps.counts[layer.workload][layer.step, steps.tokens.index(layer.tokens)]
            of_ranks = score(steps.placed[layer.workload, layer.placement, layer.ep_size], counts)
            loads, distinct = of_ranks.loads, of_ranks.distinct_experts
            busiest = [rank.rank for rank in layer.ranks if rank.chosen == "busiest"]
            assert max(loads) == max(loads[busiest])
            assert max(distinct) == max(distinct[busiest])
            for dtype in ("bf16", "fp8"):
                us = expert_time_us(steps.model, H100, pairs=loads, distinct_experts=distinct, dtype=dtype)
                assert us.max() == us[busiest].max()
            assert [rank.chosen for rank in layer.ranks].count("random") == 1
            assert len({rank.rank for rank in layer.ranks}) == len(layer.ranks)
            for rank in layer.ranks:
                assert (rank.counts.sum(), (rank.counts > 0).sum()) == (loads[rank.rank], distinct[rank.rank])


def test_equal_loads_are_decided_by_distinct_experts():
    model = ModelSpec("small", 4, 1, hidden_size=64, moe_intermediate_size=32)
    counts, ranks = np.array([4, 0, 2, 2], np.int32), np.array([0, 0, 1, 1], np.int32)
    assert busiest_ranks(model, H100, counts, ranks, ["bf16"]) == [1]


def test_steps_are_outermost_and_the_first_placement_changes():
    groups = list(usual_steps().compared(H100, ["bf16"]))
    assert len(groups) == 3 * 2 * 2 * 2
    keys = [(g[0].step, g[0].tokens) for g in groups]
    assert keys == sorted(keys)
    for group in groups:
        assert len({layer[:4] for layer in group}) == 1
        assert [layer.placement for layer in group][group[0].step % 2] == "linear"


def test_a_seed_gives_the_same_ranks_and_every_other_rank_gets_its_turn():
    def random_ranks(seed):
        steps = steps_of(seed=seed, steps=40, ep_sizes=[8], tokens=[512])
        return [rank.rank for group in steps.compared(H100, ["bf16"]) for layer in group for rank in layer.ranks[-1:]]

    assert random_ranks(3) == random_ranks(3)
    assert random_ranks(3) != random_ranks(4)
    assert set(random_ranks(3)) == set(range(8))


def test_bad_steps_are_refused():
    for change, message in (
        ({"steps": 0}, "`steps` 0: must be a whole number from 1"),
        ({"tokens": [0]}, "`tokens` 0"),
        ({"tokens": []}, "`tokens` must name at least one"),
        ({"ep_sizes": [257]}, "`ep_sizes` 257"),
        ({"placements": ["linera"]}, "did you mean linear"),
        ({"seed": -1}, "`seed` -1"),
    ):
        with pytest.raises(InputError, match=message):
            steps_of(**change)


def test_models_without_gate_up_and_down_are_refused():
    with pytest.raises(InputError, match="not known: hidden_size"):
        Shape.of(ModelSpec("small", 4, 1), 4, 8)
    with pytest.raises(InputError, match="gate, up and down"):
        Shape.of(ModelSpec("small", 4, 1, hidden_size=8, moe_intermediate_size=8, expert_matrices=2), 4, 8)


# The run


def test_rows_are_what_was_measured(tmp_path):
    out, lines = measured(tmp_path)
    rows = read_measured(out)
    assert list(rows.columns) == list(COLUMNS)
    assert set(rows.dtype) == {"bf16", "fp8"}
    assert set(rows.groupby(["dtype", "workload", "tokens", "ep_size", "placement"]).step.nunique()) == {3}
    steps = usual_steps()
    row = rows.iloc[57]
    counts = steps.counts[row.workload][row.step, steps.tokens.index(row.tokens)]
    mine = counts[steps.placed[row.workload, row.placement, row.ep_size].rank_of_expert == row["rank"]]
    assert (row.pairs, row.distinct) == (mine.sum(), (mine > 0).sum())
    assert row.time_us == pytest.approx(MadeUp().time_layer(row["dtype"], mine).time_us, abs=1e-3)
    assert not partial_path(out).exists()
    assert any("step 3 of 3" in line for line in lines)
    assert any("not calibrated: no calibration" in line for line in lines)


def test_a_time_limit_keeps_pairs_together(tmp_path, monkeypatch):
    clock = iter(np.arange(0, 1e6, 0.5))
    monkeypatch.setattr("sim.measure.run.time.monotonic", lambda: float(next(clock)))
    out, lines = measured(tmp_path, time_limit_s=10)
    rows = read_measured(out)
    assert any("--time-limit is reached in step" in line for line in lines)
    assert len(rows) < 200
    assert (rows.groupby(["dtype", "workload", "tokens", "ep_size", "step"]).placement.nunique() == 2).all()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="nothing was measured"):
        measured(tmp_path / "other", time_limit_s=0.1)
    assert not list((tmp_path / "other").iterdir())


def test_one_type_that_fails_does_not_stop_the_other(tmp_path):
    out, lines = measured(tmp_path, MadeUp(fails=lambda dtype, calls: dtype == "fp8"))
    assert set(read_measured(out).dtype) == {"bf16"}
    assert any("fp8 is left out: no fp8 at all" in line for line in lines)
    (tmp_path / "later").mkdir()
    out, lines = measured(tmp_path / "later", MadeUp(fails=lambda dtype, calls: dtype == "bf16" and calls > 30))
    rows = read_measured(out)
    assert any("bf16 stops in step 1: CUDA error: made up" in line for line in lines)
    assert set(rows[rows.step == 2].dtype) == {"fp8"}
    assert (rows.groupby(["dtype", "workload", "tokens", "ep_size", "step"]).placement.nunique() == 2).all()
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="nothing that was asked for can be measured"):
        measured(tmp_path / "none", MadeUp(fails=lambda dtype, calls: True))
    assert not list((tmp_path / "none").iterdir())


def test_a_run_that_dies_leaves_its_rows_and_nothing_is_overwritten(tmp_path):
    def dies(dtype, calls):
        if calls > 40:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, MadeUp(fails=dies))
    partial = tmp_path / "measured.partial.csv"
    assert 10 < len(read_measured(partial)) <= 40
    assert not (tmp_path / "measured.csv").exists()
    with pytest.raises(InputError, match=r"measured.partial.csv is there already"):
        measured(tmp_path)
    partial.unlink()
    measured(tmp_path)
    with pytest.raises(InputError, match=r"measured.csv is there already"):
        measured(tmp_path)


# Reading back


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A sound table."""
    return measured(tmp_path_factory.mktemp("measured"), dtypes=["bf16"])[0].read_text()


def test_bad_tables_are_refused(tmp_path, text):
    out, lines = tmp_path / "measured.csv", text.splitlines()
    for column, value, message in (
        ("time_us", "nan", "time_us must be above 0"),
        ("time_us", "-1", "time_us must be above 0"),
        ("time_us", "fast", "column time_us must hold numbers"),
        ("spread_us", "-1", "spread_us must be"),
        ("tokens", "8.5", "column tokens must hold whole numbers"),
        ("tokens", "9" * 40, "column tokens must hold whole numbers"),
        ("tokens", "0", "tokens must be from 1"),
        ("rank", "8", "rank must be from 0"),
        ("ep_size", "0", "ep_size must be"),
        ("pairs", "-1", "pairs must be"),
        ("distinct", "100000", "distinct must be from 0 to pairs"),
        ("distinct", "0", "pairs need a distinct expert"),
        ("step", "-1", "must count something"),
        ("dtype", "fp4", "dtype must be bf16 or fp8"),
        ("chosen", "me", "chosen must be"),
        ("gpu", "h200", "column gpu must be the same"),
        ("kernel", "x" * 201, "fields of at most 200 printable letters"),
        ("workload", "\x1b[31mred", "fields of at most 200 printable letters"),
    ):
        fields = lines[2].split(",")
        fields[list(COLUMNS).index(column)] = value
        out.write_text("\n".join([*lines[:2], ",".join(fields), *lines[3:]]) + "\n")
        with pytest.raises(InputError, match=message) as error:
            read_measured(out)
        assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path, text):
    out = tmp_path / "measured.csv"
    head, first = text.splitlines()[:2]
    for broken, message in (
        ("", "first line must name the columns"), ("a,b\n1,2\n", "first line must name the columns"),
        (head + "\n", "has no rows"), ("\n" * 200_001, "more than 200000 lines"),
        (f"{head}\n{first}\n{first}\n", "is measured twice"), (f"{head}\n{first[:40]}\n", "line 2: expected 23 fields"),
        (head + "\n" + "\0" * 300_000 + "\n", "is not a table"),
    ):  # fmt: skip
        out.write_text(broken)
        with pytest.raises(InputError, match=message):
            read_measured(out)
    out.write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_measured(out)
    with pytest.raises(InputError, match="cannot be read"):
        read_measured(tmp_path / "absent.csv")
