"""Claims: exact ones to the digit, verdicts that follow the traffic, and the table as a whole."""

import itertools

import numpy as np
import pytest
from conftest import fails
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim import InputError, load_model, place
from sim.cli import main
from sim.model import ModelSpec
from sim.verdicts import CLAIMS, claims
from sim.verdicts.loads import assigned_loads, most_on_a_rank, strided_loads
from sim.verdicts.verdict import needed_share, ranges_text, time_saved


@pytest.mark.slow
def test_every_claim_is_there_and_says_all():
    table = claims("uniform", effort=0.02)
    assert table.id.tolist() == list(CLAIMS)
    for row in table.itertuples():
        for text in (row.source, row.setup, row.claim, row.assumed, row.computed, row.why, row.unit):
            assert text.strip()
        assert row.verdict.startswith(("holds", "does not follow", "not explained by load alone"))
        assert np.isnan(row.low) or row.low <= row.value <= row.high


@pytest.mark.slow
def test_verdicts_follow_the_traffic():
    """Perfect balance has nothing to give under uniform traffic, and much under chat."""
    ids = ["balanced-18", "qpm-8", "less-waiting"]
    uniform, tilted = (claims(traffic, only=ids, effort=0.1).set_index("id") for traffic in ("uniform", "gpqa-tilted"))
    assert uniform.loc["balanced-18"].verdict == "not explained by load alone"
    assert tilted.loc["balanced-18"].verdict == "holds"
    assert uniform.loc["qpm-8"].verdict != tilted.loc["qpm-8"].verdict
    assert uniform.loc["less-waiting"].value > tilted.loc["less-waiting"].value


def test_a_claim_needs_more_of_the_step_where_less_is_plausible():
    strict, lenient = (claims(only=["balanced-18"], effort=0.1, plausible_share=share).iloc[0] for share in (0.2, 0.8))
    assert strict.verdict == "not explained by load alone"
    assert lenient.verdict == "holds"
    assert strict.needed_share == lenient.needed_share


def test_idle_half_to_the_digit():
    """SGLang PR #37741: loads before and after its change."""
    assert strided_loads(8, 16).tolist() == [8, 0] * 8
    assert assigned_loads(8, 16).tolist() == [4] * 16
    assert [bool(strided_loads(n, 16)[1::2].any()) for n in (16, 17, 31)] == [False, True, True]
    assert (strided_loads(512, 16) == 256).all()


def test_strided_loads_of_a_plain_loop():
    for n, ep, layer in itertools.product((1, 5, 40), (4, 8, 16, 32), (0, 7)):
        loads = [0] * ep
        for token in range(n):
            for j in range(8):
                loads[((token + layer + 32 * j) % 256) // (256 // ep)] += 1
        assert strided_loads(n, ep, layer).tolist() == loads


@given(st.integers(2, 12))
def test_most_on_a_rank_by_enumeration(ep_size):
    """Every choice of groups, every rank, in a small model."""
    model = ModelSpec("small", n_experts=12, top_k=3, n_group=4, topk_group=2)
    for strategy in ("linear", "round_robin"):
        ranks = place(strategy, model, ep_size).rank_of_expert
        ref = max(
            sum(1 for e in range(12) if ranks[e] == rank and e // 3 in groups)
            for groups in itertools.combinations(range(4), 2)
            for rank in range(ep_size)
        )
        assert most_on_a_rank(model, ranks) == min(ref, 3)


def test_one_rank_holds_from_24_ranks_on():
    model = load_model("deepseek-v3")
    can = [most_on_a_rank(model, place("round_robin", model, size).rank_of_expert) == 8 for size in range(2, 257)]
    assert max(size for size, possible in zip(range(2, 257), can, strict=True) if possible) == 23


def test_shares_that_a_claim_needs():
    assert time_saved(0.25) == pytest.approx(0.2)
    assert needed_share(0.1, (0.2, 0.1, 0.4)) == pytest.approx((0.5, 0.25, 1.0))
    assert needed_share(0.1, (0.0, -0.1, 0.2)) == (np.inf, 0.5, np.inf)


def test_ranges_in_words():
    for chosen, text in (
        ([True, False, False, False], "1 token"),
        ([True, True, False, True], "1 to 2 tokens, or 8 tokens or more"),
        ([False, True, True, False], "2 to 4 tokens"),
        ([False] * 4, ""),
    ):
        assert ranges_text([1, 2, 4, 8], chosen) == text


@pytest.mark.slow
def test_the_same_table_on_any_number_of_threads():
    one, two = (claims(only=["tput-14.57", "last-rank"], effort=0.1, threads=n) for n in (1, 2))
    assert one.equals(two)


def test_the_command(capsys, tmp_path):
    assert main(f"claims idle-half one-rank --out {tmp_path}".split()) == 0
    out = capsys.readouterr().out
    assert "idle-half: holds only when a batch has at most 16 tokens" in out
    assert "2 claims: 2 holds on a condition" in out
    assert {path.name for path in tmp_path.iterdir()} == {"claims.csv", "claims.json"}
    assert main(["claims", "idle-half", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| id | claim |")


def test_bad_usage_is_one_line_and_status_2(capsys):
    for words, message in (
        ("claims qpm-9", "claim 'qpm-9' is not known; did you mean qpm-8"),
        ("claims --workload chatty", "--workload 'chatty' is not known"),
        ("claims --seed -1", "--seed -1"),
    ):
        fails(capsys, words.split(), message)


def test_records_are_refused(tmp_path):
    path = tmp_path / "trace.npz"
    np.savez(path, topk_ids=np.tile(np.arange(1, 5, dtype=np.int16), (8, 2, 1)), sequence_lengths=np.array([8]))
    with pytest.raises(InputError, match="not under a record"):
        claims(sim.load_workload(f"file:{path}"))
