"""Whole steps of recorded traffic: layers share their tokens, or do not."""

from itertools import pairwise

import numpy as np
import pytest

from sim import InputError, load_workload, place
from sim.cli import main
from sim.cost.replay import MODES, compare_modes, replay_counts
from sim.traffic.recorded import build_record


def record_of(ids, lengths):
    return build_record("here", "file:here", np.asarray(ids, np.int16), np.asarray(lengths), "decode", "")


@pytest.fixture
def record():
    """40 sequences of 5 to 44 tokens, 3 layers that all route alike: 2 of 8 experts, none of them for a padding layer."""
    rng = np.random.default_rng(0)
    lengths = np.arange(5, 45)
    ids = np.argsort(rng.random((lengths.sum(), 1, 8)), axis=2)[:, :, :2]
    return record_of(np.repeat(ids, 3, axis=1), lengths)


@pytest.mark.parametrize("mode", MODES)
def test_every_step_has_its_tokens_in_every_layer(record, mode):
    counts = replay_counts(record, 8, 25, 12, mode)
    assert counts.shape == (12, 3, 8)
    assert (counts.sum(axis=2) == 50).all()


def test_layers_share_their_tokens_unless_they_are_independent(record):
    for mode in ("continuous", "together"):
        counts = replay_counts(record, 8, 25, 12, mode)
        assert (counts == counts[:, :1]).all()
    alone = replay_counts(record, 8, 25, 12, "independent")
    assert (alone != alone[:, :1]).any(axis=(1, 2)).all()


def test_sequences_go_on_token_by_token_and_are_replaced():
    """One slot, sequences whose tokens are numbered by their experts: each runs to its end, then one starts from its first."""
    ids = [[[token, 8 + s]] for s, n in enumerate((3, 4)) for token in range(n)]
    counts = replay_counts(record_of(ids, [3, 4]), 10, 1, 60, "continuous")
    path = [(int(step[0, :8].argmax()), int(step[0, 8:].argmax())) for step in counts]
    for (token, s), (after, other) in pairwise(path):
        assert (after, other) == (token + 1, s) or (token == (2, 3)[s] and after == 0)
    assert {s for _, s in path} == {0, 1}
    together = replay_counts(record_of(ids, [3, 4]), 10, 6, 1, "together")
    assert together[0, 0, 0] == 6


def test_layers_that_route_alike_have_as_much_more_variance(record):
    """Three equal layers: the variance of a step's mean is three times that of independent ones, within a fifth."""
    table = compare_modes(record, [place("linear", _Eight(), 4)], 25, 1500, seed=1).set_index("mode")
    assert table.variance_ratio["continuous"] == pytest.approx(3, rel=0.2)
    assert table.layers_mean["continuous"] == pytest.approx(table.layers_mean["independent"], rel=0.02)


def _Eight():  # noqa: N802
    from dataclasses import replace

    from sim import load_model

    return replace(load_model("mixtral-8x7b"), name="eight")


def test_gpt_oss_varies_as_other_replays_of_public_traces(shared):
    """Known: 1.3 to 2.5 times the variance of independent layers, correlation 0.2 to 0.4; more when all start together."""
    record = load_workload(f"file:{shared / 'traces' / 'gpt-oss-20b-tokens.npz'}")
    table = compare_modes(record, [place("linear", "gpt-oss-20b", 8)], 64, 512).set_index("mode")
    assert 1.2 < table.variance_ratio["continuous"] < 2.5
    assert 0.1 < table.autocorrelation["continuous"] < 0.5
    assert abs(table.autocorrelation["independent"]) < 0.15
    assert table.variance_ratio["together"] > 5


def test_bad_arguments(record, capsys, tmp_path):
    with pytest.raises(InputError, match="`mode` must be one of"):
        replay_counts(record, 8, 4, 4, "other")
    with pytest.raises(InputError, match="too many to replay"):
        replay_counts(record, 8, 2**20, 2**12, "together")
    assert main(["step", "--traffic", str(tmp_path / "none.npz"), "--ep", "8"]) == 2
    assert "error" in capsys.readouterr().err
