import json

import numpy as np
import pytest
from conftest import VECTORS
from hypothesis import given
from hypothesis import strategies as st
from naive import route as ref_route

from sim import InputError, ModelSpec, load_model, route


def spec(n_experts, top_k, n_group=1, topk_group=1, scoring="sigmoid", group_score="top2_sum"):
    return ModelSpec("test", n_experts, top_k, n_group, topk_group, scoring, group_score, group_score == "top2_sum")


def _vector_model(name, config, has_bias):
    score = "top2_sum" if has_bias else "max"
    return ModelSpec(
        name, config["E"], config["top_k"], config["n_group"], config["topk_group"], config["scoring"], score, has_bias
    )


def _check_vectors(folder):
    data, configs = np.load(folder / "router.npz"), json.loads((folder / "router.json").read_text())
    for name, config in configs.items():
        bias = data.get(f"{name}/bias")
        ids = route(data[f"{name}/logits"], _vector_model(name, config, bias is not None), bias)
        clear = ~data[f"{name}/tied"] if f"{name}/tied" in data else np.ones(len(ids), bool)
        assert clear.sum() >= 24
        np.testing.assert_array_equal(np.sort(ids, axis=1)[clear], data[f"{name}/ids"][clear], err_msg=name)


def test_equals_upstream_on_the_copied_vectors():
    _check_vectors(VECTORS)


def test_equals_upstream_on_all_vectors(shared):
    _check_vectors(shared / "vectors")


@st.composite
def shapes(draw):
    n_group = draw(st.integers(1, 6))
    size = draw(st.integers(2, 8))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, topk_group * size))
    return n_group * size, top_k, n_group, topk_group


@given(
    shapes(), st.sampled_from(["sigmoid", "softmax"]), st.sampled_from(["max", "top2_sum"]), st.integers(0, 2**32 - 1)
)
def test_equals_reference_ties_included(shape, scoring, group_score, seed):
    """Logits on a coarse grid tie often. Softmax sums may differ by an ulp between the two, so its ties are compared
    where no bias can break them apart."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (12, shape[0])).astype(np.float32)
    bias = rng.integers(-1, 2, shape[0]).astype(np.float32) if scoring == "sigmoid" else None
    model = spec(*shape, scoring, group_score)
    if scoring == "softmax" and group_score == "top2_sum":
        return
    comp = route(logits, model, bias)
    np.testing.assert_array_equal(comp, ref_route(logits, shape[2], shape[3], shape[1], scoring, group_score, bias))


@given(st.integers(0, 2**32 - 1))
def test_one_group_is_plain_top_k(seed):
    logits = np.random.default_rng(seed).normal(size=(8, 24)).astype(np.float32)
    np.testing.assert_array_equal(route(logits, spec(24, 5)), np.argsort(-logits, axis=1, kind="stable")[:, :5])


@given(st.integers(0, 2**32 - 1))
def test_permuting_groups_and_experts_within_groups_permutes_the_choice(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(8, 32)).astype(np.float32)
    order = np.concatenate([g * 8 + rng.permutation(8) for g in rng.permutation(4)])
    model = spec(32, 6, 4, 2)
    np.testing.assert_array_equal(order[route(logits[:, order], model)], route(logits, model))


def test_ids_are_best_first_and_ties_go_low():
    ids = route(np.zeros((1, 256), np.float32), load_model("deepseek-v3"))
    assert ids.dtype == np.int16
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_masking_is_minus_infinity_not_zero():
    """With all choices negative a mask of 0 would pick experts outside the kept groups."""
    logits = np.array([[5, 4, -9, -9, 1, 0, -1, -2]], np.float32)
    ids = route(logits, spec(8, 3, 2, 1), np.full(8, -2, np.float32))
    assert (ids // 4 == ids[0, 0] // 4).all()


def test_routers_that_upstream_gets_wrong_cannot_be_described():
    for arguments, message in (
        ({"n_experts": 10, "top_k": 2, "n_group": 4, "topk_group": 2}, "not divisible"),
        ({"n_experts": 16, "top_k": 9, "n_group": 4, "topk_group": 2}, "above the 8 experts"),
        ({"n_experts": 8, "top_k": 2, "n_group": 8, "topk_group": 4}, "no top 2"),
        ({"n_experts": 16, "top_k": 2, "n_group": 4, "topk_group": 5}, "topk_group 5 is above"),
        ({"n_experts": 16, "top_k": 17}, "above the 16 experts"),
        ({"n_experts": 16, "top_k": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            spec(**arguments)


def test_bad_logits_are_refused():
    model = spec(16, 2)
    for logits in (np.full((2, 16), np.nan), np.full((2, 16), np.inf)):
        with pytest.raises(InputError, match="NaN"):
            route(logits, model)
    with pytest.raises(InputError, match="shape"):
        route(np.zeros((2, 15)), model)
    with pytest.raises(InputError, match="shape"):
        route(np.zeros((2, 16)), model, np.zeros(15))
    with pytest.raises(InputError, match="NaN"):
        route(np.zeros((2, 16)), model, np.full(16, np.nan))
    with pytest.raises(InputError, match="sparsemixer"):
        route(np.zeros((2, 16)), load_model("phi-3.5-moe"))


def test_no_tokens_is_no_work():
    assert route(np.zeros((0, 16), np.float32), spec(16, 2)).shape == (0, 2)
