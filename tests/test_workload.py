import functools

import numpy as np
import pytest

from sim import InputError, load_model, load_workload, sweep, workload_names
from sim.router import check_pair, draw_trials
from sim.streams import stream_key
from sim.traffic.presets import published_figures
from sim.traffic.read import read_recorded

KEY = stream_key(0, "popularity")


def test_presets_are_the_stated_ones():
    assert workload_names() == [
        "uniform", "chat", "mixed", "translation", "gpqa-tilted", "prefill", "prefill-strong", "gpt-oss-20b", "one-subject"
    ]  # fmt: skip
    chat, prefill = load_workload("chat"), load_workload("prefill-strong")
    assert (chat.sigma, chat.group_sigma, chat.request_sigma) == (0.65, 0.4, 0.0)
    assert (prefill.sigma, prefill.request_sigma, prefill.tokens_per_request) == (0.65, 1.05, 1024)
    assert all(load_workload(name).source for name in workload_names())


def test_overrides_files_and_misspellings(tmp_path):
    assert load_workload("chat", sigma=0.9).sigma == 0.9
    path = tmp_path / "mine.toml"
    path.write_text('popularity = "lognormal"\nsigma = 0.3\n')
    assert load_workload(path).law == {"popularity": "lognormal", "group_sigma": 0.0, "x0": -4.0, "sigma": 0.3}
    with pytest.raises(InputError, match="did you mean chat"):
        load_workload("chta")
    with pytest.raises(InputError, match="did you mean sigma"):
        load_workload("chat", sgma=1.0)
    with pytest.raises(InputError, match="`phase` goes with"):
        load_workload("chat", phase="prefill")
    bad_laws = 'popularity = "zipf"', "sigma = -1", "sigma = nan", "tokens_per_request = 0", "sigma = true", "nonsense"
    for bad in bad_laws:
        path.write_text(bad)
        with pytest.raises(InputError, match="mine"):
            load_workload(path)


def test_popularity_laws_have_their_moments_and_draws_do_not_depend_on_how_they_are_grouped():
    """False-alarm rate below 1e-5: five standard errors, fixed seed."""
    n = 4000
    mu = load_workload("chat").draw_popularity(KEY, np.arange(n), 256)
    np.testing.assert_array_equal(load_workload("chat").draw_popularity(KEY, np.array([7, 5]), 256), mu[[7, 5]])
    assert abs(mu.mean()) < 5 * 0.65 / np.sqrt(mu.size)
    assert abs(mu.std() - 0.65) < 5 * 0.65 / np.sqrt(2 * mu.size)
    assert not load_workload("uniform").draw_popularity(KEY, np.arange(3), 256).any()
    tilted = load_workload("gpqa-tilted").draw_popularity(KEY, np.arange(n), 256)
    np.testing.assert_array_equal(
        load_workload("gpqa-tilted").draw_popularity(KEY, np.array([7, 5]), 256), tilted[[7, 5]]
    )
    u = (np.arange(256) + 0.5) / 256
    slope = (tilted - tilted.mean(axis=1, keepdims=True)) @ (u - u.mean()) / ((u - u.mean()) ** 2).sum()
    # mean tilt: 8/58 of 1.485, else a normal cut at 0 (which adds less than 0.003 to 0.566)
    assert abs(-slope.mean() - (8 / 58 * 1.485 + 50 / 58 * 0.568)) < 5 * slope.std() / np.sqrt(n)


@functools.cache
def swept(name):
    """A sweep over the EP sizes of the published figures of a preset."""
    workload, figure = load_workload(name), published_figures(name)[0]
    return sweep(
        workload.fitted_to, workload, ep_sizes=figure.ep_sizes, tokens=figure.tokens, placements="linear", trials=1500,
        bound_layers=0, received="off",
    )  # fmt: skip


@pytest.mark.slow
# The design states 6 % for chat and 4 % for mixed; 1 % more covers sampling. Of GPQA nothing is promised.
@pytest.mark.parametrize(
    ("name", "within"), [("chat", 0.06), ("mixed", 0.05), ("translation", 0.03), ("one-subject", 0.04)]
)
def test_presets_reproduce_published_imbalance(name, within):
    """Each figure in presets.toml, on the model that it was taken on, under linear placement; what is a range, within it."""
    result, figures = swept(name), published_figures(name)
    for figure in figures:
        for ep_size, target, low, high in zip(figure.ep_sizes, figure.imbalance, figure.low, figure.high, strict=True):
            if figure.worst_of == 1:
                found = result.summary.set_index("ep_size").imbalance_mean[ep_size]
            else:  # the mean of the largest of so many layers, from the distribution of one
                curve = result.exceedance("imbalance", "linear", ep_size, figure.tokens)
                largest = 1 - (1 - curve.probability) ** figure.worst_of
                found = curve.value.iloc[0] + (np.diff(curve.value) * largest.to_numpy()[1:]).sum()
            assert abs(found / target - 1) < within, f"{figure.data} EP {ep_size}: {found:.3f} for {target}"
            assert low * (1 - within) < found < high * (1 + within)


@pytest.mark.slow
def test_chat_has_the_figures_of_the_design():
    np.testing.assert_allclose(swept("chat").summary.imbalance_mean, (1.65, 2.13, 3.01, 4.75), rtol=0.02)


def test_copies_even_translation_out_as_far_as_was_published():
    """EPLB with 32 redundant slots, EP 32, steps of 4096 tokens: 1.109 (TensorRT-LLM tech blog 4, table 1); it was not fitted.
    The preset stays 1 to 4 % above it.
    """
    result = sweep(
        "deepseek-r1", "translation", ep_sizes=32, tokens=4096, placements="eplb+32", trials=200, bound_layers=0,
        received="off",
    )  # fmt: skip
    assert 1.01 < result.summary.imbalance_mean[0] / 1.109 < 1.04


def write_trace(path, ids, lengths, **more):
    np.savez(path, topk_ids=ids, sequence_lengths=lengths, **more)
    return path


@pytest.fixture
def trace(tmp_path):
    """Ten sequences of 20 tokens; sequence s takes experts s and s + 1, and 16 more in layer 1."""
    ids = np.array(
        [[[s % 16, (s + 1) % 16], [s % 16 + 16, (s + 1) % 16 + 16]] for s in range(10) for _ in range(20)], np.int16
    )
    return write_trace(tmp_path / "trace.npz", ids, np.full(10, 20))


def _replay(path, phase, tokens, trials=8):
    workload = read_recorded(path, phase)
    counts, ids = np.empty((trials, len(tokens), 32), np.int32), np.empty((trials, 1, 2), np.int16)
    workload.sample(KEY, np.arange(len(counts)), np.array(tokens), counts, ids)
    return counts, ids


def test_decode_takes_each_token_from_another_sequence(trace):
    counts, ids = _replay(trace, "decode", [1, 10, 20, 25])
    for t in range(len(counts)):
        own = counts[t, :, 16 * (t % 2) : 16 * (t % 2) + 16]  # layers alternate with trials
        assert (counts[t].sum(axis=1) == own.sum(axis=1)).all()
        once = np.bincount(np.arange(10), minlength=16) + np.bincount(np.arange(1, 11), minlength=16)
        np.testing.assert_array_equal(own[1], once)
        np.testing.assert_array_equal(own[2], 2 * once)
        assert own[3].sum() == 50
        assert set(np.flatnonzero(own[0]) + 16 * (t % 2)) == set(ids[t, 0].tolist())
    assert len({tuple(row) for row in counts[:, 0].tolist()}) > 2


def test_prefill_takes_consecutive_tokens_of_one_sequence(trace):
    counts, _ = _replay(trace, "prefill", [8, 20, 30])
    for t in range(len(counts)):
        own = counts[t, :, 16 * (t % 2) : 16 * (t % 2) + 16]
        assert sorted(own[0][own[0] > 0].tolist()) == [8, 8]
        assert sorted(own[1][own[1] > 0].tolist()) == [20, 20]
        assert own[2].sum() == 60


GOOD = np.tile([0, 1], (6, 1, 1))


def test_bad_records_are_refused(tmp_path):
    """Other ids and unsound files: test_readers."""
    for ids, lengths, message in (
        (GOOD, [5], "add up to the 6 tokens"),
        (GOOD, [7, -1], "at least 1"),
        (GOOD, [[6]], "at least 1"),
        (GOOD, [], "whole numbers"),
        (GOOD, [2**62, 2**62, 2**62, 2**62, 6], "add up"),
        (np.zeros((6, 1, 2), int), [6], "no tokens with routing: all 0"),
    ):
        with pytest.raises(InputError, match=message):
            read_recorded(write_trace(tmp_path / "bad.npz", ids, np.array(lengths)))


def test_ids_without_lengths_are_one_request_or_a_request_each(tmp_path):
    for arrays, n_sequences, note in (
        ({"topk_ids": GOOD}, 1, "named topk_ids: one request"),
        ({"routed_experts": np.stack([GOOD, GOOD])}, 2, "named routed_experts: a request each"),
        ({"a": GOOD, "b": GOOD}, 2, "arrays of expert ids [tokens, layers, top_k], a request each"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        found = read_recorded(tmp_path / "x.npz")
        assert found.n_sequences == n_sequences
        assert note in found.notes[0]


def test_a_record_goes_with_its_model_and_a_known_phase_only(trace):
    with pytest.raises(InputError, match="`phase` must be"):
        read_recorded(trace, "train")
    with pytest.raises(InputError, match="2 experts per token"):
        check_pair(load_model("olmoe-1b-7b"), read_recorded(trace))
    with pytest.raises(InputError, match="expert id 26"):
        check_pair(load_model("phi-3.5-moe"), read_recorded(trace))


def test_real_routing_is_replayed_in_its_own_proportions(shared):
    """Decode over the gpt-oss record: per layer, shares of the experts agree with the record's, sequences weighing alike."""
    workload = load_workload(f"file:{shared / 'traces' / 'gpt-oss-20b-tokens.npz'}")
    n = 24 * 40
    total = np.zeros((24, 32))
    for start in range(0, n, 24):
        counts, _ = draw_trials(load_model("gpt-oss-20b"), workload, 0, range(start, start + 24), 24, np.array([494]))
        total += counts[:, 0]
    record = np.zeros((24, 32))
    for layer in range(24):
        for s in range(494):
            ids = workload.topk_ids[layer, workload.starts[s] : workload.starts[s + 1]]
            record[layer] += np.bincount(ids.ravel(), minlength=32) / len(ids)
    p = record / 494
    z = (total / (40 * 494) - p) / np.sqrt(np.maximum(p * (1 - p), 1e-9) / (40 * 494))
    assert np.abs(z).max() < 5.5  # 768 shares; a share's tokens are independent given the sequence: z is below normal
