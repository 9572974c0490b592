"""Several tokens of each request in a decode step, as speculative decoding verifies them."""

import numpy as np
import pytest
from conftest import fails

import sim
from sim import InputError, load_model, load_workload
from sim.router import draw, draw_trials
from sim.traffic.recorded import build_record

V3, TOY = load_model("deepseek-v3"), load_model("mixtral-8x7b")


@pytest.fixture(scope="module")
def record():
    """Sequences of 3, 9, 40 and 1 tokens through 2 layers, in which a token's experts tell its place from its neighbours'."""
    ids = np.stack([np.arange(53) % 8, (np.arange(53) + 1 + np.arange(53) // 8) % 8], axis=1)
    ids[:, 1] = np.where(ids[:, 0] == ids[:, 1], (ids[:, 1] + 1) % 8, ids[:, 1])
    return build_record("here", "file:here", np.repeat(ids[:, None], 2, axis=1), np.array([3, 9, 40, 1]), "decode", "")


def test_one_token_of_each_request_is_the_default():
    """Bit for bit, in synthetic and in recorded traffic."""
    trials, tokens = range(20), np.array([4, 12])
    for name in ("chat", "gpt-oss-20b"):
        model = load_model("gpt-oss-20b") if "oss" in name else V3
        ref, comp = (
            draw_trials(model, load_workload(name, **of), 0, trials, 20, tokens)
            for of in ({}, {"tokens_per_request": 1})
        )
        np.testing.assert_array_equal(ref[0], comp[0])


def test_a_preset_without_request_effect_takes_that_of_prefill():
    chat, prefill = (load_workload(name, tokens_per_request=4) for name in ("chat", "prefill"))
    assert chat.law == prefill.law
    assert chat.name == "chat (4 tokens per request)"
    fitted = load_workload("gpt-oss-20b", tokens_per_request=2)
    assert fitted.layers.digest == load_workload("gpt-oss-20b", phase="prefill").layers.digest


def test_tokens_of_a_request_share_more_experts_than_those_of_two():
    """Of 4,000 pairs each, on DeepSeek-V3; standard errors of 0.0014, against a difference of 0.05."""
    strong = load_workload("prefill-strong", tokens_per_request=2)
    _, ids = draw_trials(V3, strong, 0, range(1000), 1000, np.array([8]), 8)
    alike = [(ids[:, i::2][..., None] == ids[:, j::2][..., None, :]).any(-1).mean() for i, j in ((0, 1), (0, 0))]
    across = (ids[:, 0:6:2][..., None] == ids[:, 3:8:2][..., None, :]).any(-1).mean()
    assert alike[1] == 1
    assert 0.03 < alike[0] - across < 0.07


def test_a_recorded_sequence_gives_a_run_of_consecutive_tokens(record):
    """Each run lies in one sequence; sequences that are too short give none; all places of the others are reached."""
    runs = load_workload(record, tokens_per_request=3)
    assert runs.notes == ("1 sequences of fewer than 3 tokens are left out",)
    counts, ids = draw_trials(TOY, runs, 0, range(400), 2, np.array([3, 6]), 6)
    np.testing.assert_array_equal(counts[:, 1].sum(axis=1), 12)
    places = {tuple(record.topk_ids[0, i : i + 3].ravel()): i for i in range(51)}
    seen = {places[tuple(run.ravel())] for run in ids.reshape(-1, 3, 2)}
    assert seen == {0, *range(3, 10), *range(12, 50)}


def test_logits_of_requests_are_held_for_some_trials_at_a_time(monkeypatch):
    workload = load_workload("gpt-oss-20b", tokens_per_request=2)
    options = load_model("gpt-oss-20b"), workload, 0, range(3, 20), 24, np.array([8])
    ref = draw_trials(*options)
    monkeypatch.setattr(draw, "_HELD_LOGITS", 300)
    np.testing.assert_array_equal(draw_trials(*options)[0], ref[0])


def test_the_command_line_says_which_number_does_not_fit(capsys):
    for verb in ("sweep", "gain", "step"):
        words = [verb, "--tokens-per-request", "3", "--ep", "8", "--tokens", "8"]
        fails(capsys, words, "--tokens 8: --tokens-per-request 3 must divide the tokens of a step")


def test_wrong_numbers_of_tokens_are_refused(record):
    cells = {"ep_sizes": 8, "placements": "linear", "trials": 2}
    for workload in (load_workload("chat", tokens_per_request=3), load_workload(record, tokens_per_request=3)):
        model = V3 if workload.name.startswith("chat") else TOY
        with pytest.raises(InputError, match="`tokens` 8: `tokens_per_request` 3 must divide the tokens of a step"):
            sim.sweep(model, workload, tokens=[6, 8], **cells)
    with pytest.raises(InputError, match="`tokens` 131072: at most 32768 requests in a step"):
        sim.sweep(V3, load_workload("chat", tokens_per_request=2), tokens=2**17, **cells)
    with pytest.raises(InputError, match="no sequence of file:here has as many tokens"):
        load_workload(record, tokens_per_request=41)
    with pytest.raises(InputError, match="`tokens_per_request` 2: only decode takes so many"):
        load_workload(load_workload(record, phase="prefill"), tokens_per_request=2)
    with pytest.raises(InputError, match="has no request effect"):
        load_workload(sim.synthetic_traffic(name="mine"), tokens_per_request=2)
    with pytest.raises(InputError, match="`tokens_per_request` 0: must be a whole number"):
        load_workload("chat", tokens_per_request=0)
    record = load_workload(record, tokens_per_request=3)
    with pytest.raises(InputError, match="the tokens of a request are not independent"):
        sim.capacity(TOY, record, ep_sizes=2, tokens=6, placements="linear", horizon_steps=9)
