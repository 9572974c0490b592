"""Fitted workloads: tables of layers as traffic."""

import numpy as np
import pytest

from sim import InputError, ModelSpec, load_model, load_workload, sweep, synthetic_traffic
from sim.router import check_pair, draw_trials
from sim.streams import stream_key
from sim.traffic import FittedLayers, SyntheticTraffic

KEY = stream_key(0, "fitted")
TOML = """
popularity = "fitted"
fitted_to = "olmoe-1b-7b"
mu = [{mu}]
[prefill]
request_sigma = 0.5
tokens_per_request = 64
mu = [{mu}]
request_sd = [{sd}]
request_loadings = [{loadings}]
"""


def rows(table):
    return ", ".join(str(np.round(row, 4).tolist()) for row in table)


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    text = TOML.format(
        mu=rows(rng.normal(size=(3, 64))), sd=rows(np.ones((3, 64))), loadings=rows(rng.normal(size=(3, 2, 64)))
    )
    (tmp_path / "my.toml").write_text(text)
    return tmp_path / "my.toml"


def test_draws_take_the_layers_in_turn_however_they_are_grouped(path):
    workload = load_workload(path)
    mu = workload.draw_popularity(KEY, 1 + np.arange(5), 64)
    np.testing.assert_array_equal(mu, workload.layers.mu[[1, 2, 0, 1, 2]])
    assert (workload.n_layers, workload.request_sigma) == (3, 0)
    with pytest.raises(InputError, match="fitted to 64 experts, model deepseek-v3 has 256"):
        check_pair(load_model("deepseek-v3"), workload)
    workload = load_workload(path, phase="prefill")
    mu = workload.draw_popularity(KEY, np.arange(3), 64)
    whole = workload.draw_logits(KEY, mu, 6 + np.arange(3), np.arange(3), 100)
    np.testing.assert_array_equal(workload.draw_logits(KEY, mu[1:], np.array([7, 8]), np.array([1, 2]), 100), whole[1:])


def test_phases_of_a_fitted_file(path):
    assert load_workload(path).law == load_workload(path, phase="decode").law
    prefill = load_workload(path, phase="prefill")
    assert (prefill.request_sigma, prefill.tokens_per_request) == (0.5, 64)
    assert prefill.layers.request_loadings.shape == (3, 2, 64)
    with pytest.raises(InputError, match="`phase` must be"):
        load_workload(path, phase="train")


def test_a_request_adds_its_subject_and_its_own_effect(path):
    """Covariance of the drawn logits over 20,000 draws. False-alarm rate below 1e-3: 5 standard errors of 64 x 64 / 2."""
    workload = load_workload(path, phase="prefill")
    n, layer = 20_000, workload.layers
    mu = np.repeat(layer.mu[:1], n, axis=0)
    one_layer = SyntheticTraffic(
        "x", popularity="fitted", request_sigma=0.5, layers=FittedLayers(mu[:1], layer.request_sd[:1], layer.request_loadings[:1])
    )  # fmt: skip
    logits = one_layer.draw_logits(KEY, mu, np.arange(len(mu)), np.arange(len(mu)), 10)
    assert logits.shape == (n, 1, 64)
    loadings = layer.request_loadings[0]
    wanted = 0.25 * (np.eye(64) + loadings.T @ loadings)
    found = np.cov((logits[:, 0] - mu).T)
    error = np.sqrt((wanted**2 + np.outer(np.diag(wanted), np.diag(wanted))) / n)
    assert np.abs((found - wanted) / error).max() < 5


def test_a_table_equals_the_popularity_that_it_was_drawn_from():
    """Counts of a fitted layer and of a preset with the same mu are the same integers under the same key."""
    model, uniform = load_model("deepseek-v3"), load_workload("uniform")
    table = SyntheticTraffic("t", popularity="fitted", layers=FittedLayers.of(np.zeros((2, 256))))
    mine, _ = draw_trials(model, table, 0, range(2), 2, np.array([4000]))
    theirs, _ = draw_trials(model, uniform, 0, range(2), 2, np.array([4000]))
    z = (mine.mean((0, 1)) - theirs.mean((0, 1))) / np.sqrt(2 * 4000 * 8 / 256 / 2)
    assert 0.7 < z.std() < 1.3  # other key, same traffic: 256 differences; 5 standard errors


def test_a_sweep_takes_each_layer_as_a_draw(path):
    result = sweep("olmoe-1b-7b", path, ep_sizes=8, tokens=[8, 64], placements=["linear", "random"], trials=30)
    assert set(result.summary.draws) == {3}
    bounds = result.tail[result.tail.method == "bound"]
    linear = bounds[(bounds.placement == "linear") & (bounds.metric == "imbalance")]
    assert set(linear.given) == {""}  # the layers are all there are
    assert set(bounds[bounds.placement == "random"].given) == {"3 drawn layers"}
    with pytest.raises(InputError, match="has 3 layers, and each is a draw"):
        sweep("olmoe-1b-7b", path, ep_sizes=8, tokens=8, placements="linear", trials=30, draws=5)


@pytest.mark.slow
def test_bounds_of_a_fitted_workload_hold_what_is_sampled(path):
    """Sampled probabilities of 6000 steps lie between the bounds, to four standard errors."""
    result = sweep("olmoe-1b-7b", path, ep_sizes=8, tokens=64, placements="linear", trials=6000)
    tail = result.tail[result.tail.metric == "imbalance"]
    sampled = tail[tail.method == "sampled"].set_index("threshold").probability
    bounds = tail[tail.method == "bound"].set_index("threshold")
    for x in set(sampled.index) & set(bounds.index):
        error = 4 * np.sqrt(max(sampled[x], 1 / 6000) / 6000)
        assert bounds.low[x] - error < sampled[x] < bounds.high[x] + error


def test_bad_tables_are_refused(tmp_path):
    path = tmp_path / "bad.toml"
    for text, message in (
        ("mu = [[1.0, nan]]", "-50 to 50"),
        ("mu = [[1.0, 51.0]]", "-50 to 50"),
        ("mu = [[1.0, 2.0], [1.0]]", "equally long"),
        ("mu = []", "equally long"),
        ('mu = [["a"]]', "equally long"),
        ("mu = 3", "equally long"),
        ("mu = [[true, false]]", "equally long"),
        ("sigma = 0.5", "go together"),
        ("request_sd = [[1.0]]", "no mu"),
        ("mu = [[1.0, 2.0]]\nrequest_sd = [[1.0]]", "layers and experts of mu"),
        ("mu = [[1.0, 2.0]]\nrequest_sd = [[1.0, -1.0]]", "not be negative"),
        ("mu = [[1.0, 2.0]]\nprefill = 3", "prefill must be a table"),
        ("mu = [[1.0, 2.0]]\nlayers = 3", "not known"),
    ):
        path.write_text('popularity = "fitted"\n' + text)
        with pytest.raises(InputError, match=message):
            load_workload(path)


def test_popularity_from_arrays_is_a_workload(tmp_path):
    """Counts of an ungrouped top-1 router follow the popularity. False-alarm rate below 1e-5: 5 standard errors of 8 counts."""
    shares = np.array([8.0, 4, 2, 1, 1, 0.5, 0.25, 0])
    traffic = synthetic_traffic(shares, name="mine")
    assert (traffic.name, traffic.n_layers, traffic.popularity) == ("mine", 1, "fitted")
    n, model = 40_000, ModelSpec("m", 8, 1)
    counts, _ = draw_trials(model, traffic, 0, range(1), 1, np.array([n]))
    p = shares / shares.sum()
    assert (np.abs(counts[0, 0] - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9).all()
    layers = synthetic_traffic(np.ones((3, 64)), group_sigma=0.4, request_sigma=0.5, tokens_per_request=64)
    assert not layers.layers.mu.any()
    assert (layers.n_layers, layers.group_sigma, layers.request_sigma, layers.tokens_per_request) == (3, 0.4, 0.5, 64)
    assert synthetic_traffic().law == load_workload("uniform").law
    # Only proportions count: loads and shares are the same traffic.
    assert synthetic_traffic(1000 * shares).law == traffic.law
    two = synthetic_traffic(np.stack([shares, shares[::-1]]), name="two layers")
    result = sweep(model, two, ep_sizes=4, tokens=8, placements="linear", trials=40)
    assert set(result.summary.draws) == {2}


def test_bad_popularity_is_refused():
    for popularity, message in (
        ("chat", "not chat; load_workload takes names"),
        ([1.0, -1.0], "not negative"),
        ([1.0, np.nan], "finite"),
        ([[1, 2], [0, 0]], "0 for all experts of a layer"),
        ([[1, 2], [1]], "rows differ in length"),
        ([True, False], "must be numbers"),
        ([], "must be numbers"),
        (np.ones((2, 2, 2)), "must be numbers"),
        (3.0, "must be numbers"),
    ):
        with pytest.raises(InputError, match=message):
            synthetic_traffic(popularity)


def test_arrays_in_other_places_point_to_synthetic_traffic():
    shares = np.ones(64)
    for call in (
        lambda: load_workload(shares),
        lambda: load_workload(shares.tolist()),
        lambda: load_workload("chat", popularity=shares),
        lambda: SyntheticTraffic("x", popularity=shares),
        lambda: sweep("olmoe-1b-7b", shares, ep_sizes=8, tokens=8, placements="linear", trials=2),
    ):
        with pytest.raises(InputError, match=r"sim\.synthetic_traffic\(popularity=\.\.\.\)"):
            call()


def test_a_workload_passes_through(path):
    fitted = load_workload(path)
    assert load_workload(fitted) is not None
    assert load_workload(fitted).law == fitted.law
    assert load_workload(fitted, group_sigma=0.3).group_sigma == 0.3
    assert load_workload(load_workload("chat"), sigma=0.9).law == load_workload("chat", sigma=0.9).law
    with pytest.raises(InputError, match="did you mean sigma"):
        load_workload(load_workload("chat"), sgma=0.9)


def test_a_file_that_says_nothing_is_no_workload(tmp_path):
    for text in ("", "# nothing\n", 'about = "mine"\n', "[prefill]\nrequest_sigma = 0.5\n"):
        (tmp_path / "empty.toml").write_text(text)
        with pytest.raises(InputError, match=r"empty\.toml says nothing of the traffic"):
            load_workload(tmp_path / "empty.toml")
