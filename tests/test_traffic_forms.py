"""Forms that engines and trace sets give traffic in: each is recognised, and gives its right counts, layers and tokens."""

import base64
import gzip
import io
import json
import pickle
import sys
import types

import numpy as np
import pandas as pd
import pytest
from conftest import fails, write
from safetensors.numpy import save_file

import sim
from sim import InputError, ModelSpec, load_workload, read_traffic
from sim.cost.step_log import read_log
from sim.traffic import LoadCounts, RecordedTraffic

RNG = np.random.default_rng(1)
SMALL = ModelSpec("small", 8, 2, n_moe_layers=3)
# Two requests of 10 and 12 tokens, 3 layers, 8 experts, top-2; and counts of 3 layers.
REQUESTS = [RNG.random((n, 3, 8)).argsort(axis=2)[:, :, :2] for n in (10, 12)]
COUNTS = RNG.integers(1, 900, (3, 8))


def counts_of(requests, n_experts=8):
    """int [layers, n_experts], by a plain loop."""
    total = np.zeros((requests[0].shape[1], n_experts), int)
    for token in np.concatenate(requests):
        for layer, experts in enumerate(token):
            total[layer, experts] += 1
    return total


def raw(ids, dtype="<i4"):
    return base64.b64encode(ids.astype(dtype).tobytes()).decode()


def npy(ids, dtype):
    file = io.BytesIO()
    np.save(file, ids.astype(dtype))
    return base64.b64encode(file.getvalue()).decode()


def npy_header(header):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return np.frombuffer(file.getvalue(), np.uint8)


def same(traffic, requests=REQUESTS, notes=()):
    assert isinstance(traffic, RecordedTraffic)
    np.testing.assert_array_equal(traffic.expert_counts, counts_of(requests))
    assert traffic.expert_counts.dtype == np.int64
    assert (traffic.n_tokens, traffic.n_sequences) == (sum(map(len, requests)), len(requests))
    np.testing.assert_array_equal(traffic.topk_ids, np.concatenate(requests).transpose(1, 0, 2))
    assert traffic.n_steps is None
    assert traffic.notes[1:] == notes
    return traffic


# The cases that people met: inputs and right values beside the checkout.


LOADS, TOKENS = [900, 40, 60, 30, 20, 10, 500, 40], [3, 1, 9, 5, 5, 5, 5, 11]
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"  # Nemotron 3 Nano's layers, of which E are MoE


@pytest.mark.parametrize(
    ("name", "model", "layers", "first", "tokens"),
    [
        ("d01-long.csv", "small", [0, 1, 2], LOADS, None),
        ("d02-number-header.csv", "small", [0, 1], LOADS, None),
        ("d03-layer-id-column.csv", "small", [0, 1, 2], LOADS, None),
        ("d04-base64-npy.jsonl", "small", [0, 1, 2], TOKENS, 22),
        ("d05-base64-uint16.jsonl", "small", [0, 1, 2], TOKENS, 22),
        ("d06-data-shape.jsonl", "small", [0, 1, 2], TOKENS, 22),
        ("d07-zero-prefix.jsonl", "small", [0, 1, 2], [2, 0, 7, 3, 4, 2, 3, 7], 14),
        ("d08-many-dense.jsonl", None, [i for i, kind in enumerate(PATTERN) if kind == "E"], None, 2),
        ("d09-counts.json", "small", [0, 1, 2], LOADS, None),
        ("d10-trtllm-statistics", "small", [0, 1, 2], [1802, 82, 122, 62, 42, 22, 1002, 82], None),  # 2 steps of 901, 41, ...
        ("d14-hot-expert.csv", "small", [0, 1, 2], [1000, 1, 1, 1, 1, 1, 1, 1], None),
        ("e01-counts.csv", "e01-one-dense-layer", [1, 2, 3], [90, *LOADS[1:6], 50, 40], None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_model", [True, False])
def test_field_cases_give_their_right_counts(shared, name, model, layers, first, tokens, with_model):
    path, config = shared / "cases" / name, {"small": "small-model.json", None: None}.get(model, f"{model}.json")
    if name[:3] in ("d05", "d08") and not with_model:
        with pytest.raises(InputError, match="need --model"):
            read_traffic(path)
        return
    named = "nemotron-3-nano-30b-a3b" if config is None else str(shared / "cases" / config)
    traffic = read_traffic(path, named if with_model else None)
    assert traffic.layer_ids.tolist() == layers
    assert traffic.expert_counts.shape == (len(layers), 8 if config else 128)
    assert first is None or traffic.expert_counts[0].tolist() == first
    assert traffic.n_tokens == tokens
    assert traffic.n_sequences == (None if tokens is None else 2 if config else traffic.n_sequences)
    assert traffic.n_steps == (2 if name.startswith("d10") else None)


# Answers of engines


def answers(folder):
    """The same two requests in every form of an answer, and whether the model must tell their shape."""

    def file(name, values):
        return write(folder / f"{name}.jsonl", lines=values)

    def choices(i, x, **more):
        return {"id": f"cmpl-{i}", **more, "choices": [{"index": 0, "routed_experts": x}]}

    def meta(x, kind, **more):
        return {"meta_info": {"routed_experts": raw(x, kind), **more}}

    numbered = list(enumerate(REQUESTS))
    yield file("list", [{"routed_experts": x.tolist()} for x in REQUESTS]), False
    yield file("choices", [choices(i, npy(x, "u1")) for i, x in numbered]), False
    yield file("wide", [choices(i, npy(x, "<u2")) for i, x in numbered]), False
    prompts = [choices(i, npy(x[4:], "u1"), prompt_routed_experts=npy(x[:4], "u1")) for i, x in numbered]
    yield file("parts", prompts), False
    both = [{"prompt_routed_experts": x[:3].tolist(), "completion_routed_experts": x[3:].tolist()} for x in REQUESTS]
    yield file("both", both), False
    yield file("flat", [meta(x, "<i4", id=str(i)) for i, x in numbered]), True
    yield file("typed", [meta(x, "<u2", routed_experts_dtype="uint16") for x in REQUESTS]), True
    shaped = [meta(x, "<i8", routed_experts_dtype="torch.int64", routed_experts_shape=list(x.shape)) for x in REQUESTS]
    yield file("shaped", shaped), False
    objects = [{"data": raw(x, "u1"), "shape": list(x.shape), "dtype": "uint8"} for x in REQUESTS]
    yield file("object", [{"routed_experts": x} for x in objects]), False
    whole = folder / "whole.json"
    whole.write_text(json.dumps([{"routed_experts": x.tolist()} for x in REQUESTS], indent=1))
    yield whole, False
    events = folder / "events.jsonl"
    events.write_text(
        "".join(f"data: {json.dumps({'routed_experts': x.tolist()})}\n\n" for x in REQUESTS) + "data: [DONE]\n"
    )
    yield events, False
    yield file("bare", [x.tolist() for x in REQUESTS]), False
    yield file("outputs", [{"id": 1, "outputs": [{"index": 0, "routed_experts": x.tolist()}]} for x in REQUESTS]), False
    yield file("extension", [{"text": "x", "sgl_ext": {"routed_experts": raw(x)}} for x in REQUESTS]), True
    ids, lengths = np.concatenate(REQUESTS), np.array([len(x) for x in REQUESTS])
    yield write(folder / "one.npz", topk_ids=ids, sequence_lengths=lengths), False
    yield write(folder / "each.npz", **{f"request_{i}": x.astype(np.int32) for i, x in numbered}), False
    save_file({"topk_ids": ids, "sequence_lengths": lengths}, folder / "one.safetensors")
    yield folder / "one.safetensors", False


def test_every_form_of_an_answer_gives_the_same_tokens(tmp_path):
    n, digests = 0, set()
    for path, needs_model in answers(tmp_path):
        digests.add(same(read_traffic(path, SMALL)).digest)
        if needs_model:
            with pytest.raises(InputError, match="need --model"):
                read_traffic(path)
        else:
            same(read_traffic(path))
            assert load_workload(f"file:{path}", phase="prefill").n_layers == 3
        n += 1
        if path.suffix in (".npz", ".safetensors"):
            continue
        packed = tmp_path / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        same(read_traffic(packed, SMALL))
    assert (n, len(digests)) == (17, 1)


def test_streamed_answers_are_counted_once(tmp_path):
    chunks = [
        {"id": f"cmpl-{r}", "choices": [{"index": 0, "routed_experts": ids[:n].tolist() if n else None}]}
        for n in (0, 4, 7, 12)
        for r, ids in enumerate(REQUESTS)
    ]
    traffic = read_traffic(write(tmp_path / "x.jsonl", lines=chunks))
    same(traffic, notes=("4 parts of streamed answers, or of ranks, that others hold too are counted once",))
    flat = [{"meta_info": {"id": "a", "routed_experts": raw(REQUESTS[0][:n])}} for n in (3, 10)]
    assert read_traffic(write(tmp_path / "y.jsonl", lines=flat), SMALL).n_tokens == 10


def test_a_phase_takes_its_own_tokens_of_an_answer_that_counts_them(tmp_path):
    """vLLM counts in `usage`, SGLang beside the ids; the last token made is not routed. Fewer ids lack the first of the prompt
    (vLLM's routed_experts_prompt_start), other counts are of other ids: both are said."""
    ids, chunks = REQUESTS[0], (3, 6, 10)  # a streamed answer with a prompt of 3 tokens
    usage = [{"prompt_tokens": 3, "completion_tokens": n - 2} for n in chunks]
    parts = [ids[:n].tolist() for n in chunks]
    vllm = [{"id": "a", "usage": u, "choices": [{"routed_experts": x}]} for u, x in zip(usage, parts, strict=True)]
    sglang = [{"meta_info": {"id": "a", "routed_experts": x} | u} for u, x in zip(usage, parts, strict=True)]
    for lines in (vllm, sglang, vllm[-1:]):
        path = write(tmp_path / "x.jsonl", lines=lines)
        decode, prefill = read_traffic(path), read_traffic(path, phase="prefill")
        same(decode, [ids[3:10]], decode.notes[1:])
        same(prefill, [ids[:3]], prefill.notes[1:])
        assert "decode steps; 3 tokens of prefill are left out (--phase prefill reads them)" in decode.notes[0]
        assert "prefill steps; 7 tokens of decode are left out" in prefill.notes[0]
    for prompt, made, kept, told in (
        (9, 11, ids, "lack"),
        (30, 8, ids[3:], "lack"),
        (3, 3, ids, "prompts are read with them"),
    ):
        write(
            path,
            lines=[{"usage": {"prompt_tokens": prompt, "completion_tokens": made}, "routed_experts": ids.tolist()}],
        )
        found = read_traffic(path)
        same(found, [kept], found.notes[1:])
        assert told in "".join(found.notes)
    other = np.concatenate([ids[:3], REQUESTS[1]])  # two choices of one request, with the prompt in each or by itself
    usage = {"prompt_tokens": 3, "completion_tokens": 7 + 12 + 2}
    for prompt, choices in ((None, (ids, other)), (ids[:3].tolist(), (ids[3:], other[3:]))):
        parts = [{"index": i, "routed_experts": x.tolist()} for i, x in enumerate(choices)]
        write(path, lines=[{"id": "a", "usage": usage, "prompt_routed_experts": prompt, "choices": parts}])
        decode, prefill = read_traffic(path), read_traffic(path, phase="prefill")
        same(decode, [ids[3:], REQUESTS[1]], decode.notes[1:])
        same(prefill, [ids[:3]], prefill.notes[1:])


def test_several_choices_share_one_prompt_or_a_note_says_that_each_counts_it(tmp_path):
    a, b = REQUESTS
    choices = [{"index": i, "routed_experts": ids.tolist()} for i, ids in enumerate((a[4:], b))]
    answer = {"id": "x", "prompt_routed_experts": a[:4].tolist(), "choices": choices}
    same(read_traffic(write(tmp_path / "x.jsonl", lines=[answer])))
    other = np.concatenate([a[:4], b])
    choices = [{"index": i, "routed_experts": ids.tolist()} for i, ids in enumerate((a, other))]
    found = read_traffic(write(tmp_path / "x.jsonl", lines=[{"id": "x", "choices": choices}]))
    same(found, [a, other], found.notes[1:])
    assert found.notes[1].startswith("1 requests have several choices and no token counts")


def test_a_phase_counts_from_sglangs_start_of_an_answer(tmp_path):
    """`routed_experts_start_len` (srt/managers/io_struct.py): routing of [start, tokens - 1)."""
    meta = {"id": "a", "prompt_tokens": 7, "completion_tokens": 8, "routed_experts": REQUESTS[0].tolist()}
    path = write(tmp_path / "x.jsonl", lines=[{"meta_info": meta | {"routed_experts_start_len": 4}}])
    same(read_traffic(path), [REQUESTS[0][3:]])
    same(read_traffic(path, phase="prefill"), [REQUESTS[0][:3]])
    same(read_traffic(write(path, lines=[{"meta_info": meta | {"routed_experts_start_len": 9}}])), REQUESTS[:1])


def test_requests_and_tokens_without_routing_are_left_out_and_counted(tmp_path):
    values = [
        {"routed_experts": np.concatenate([np.zeros((5, 3, 2), int), REQUESTS[0]]).tolist()},
        {"choices": [{"index": 0, "routed_experts": None}]},
        {"error": "aborted"},
        {"routed_experts": [*REQUESTS[1].tolist(), [[0, 0]] * 3, None]},
    ]
    found = read_traffic(write(tmp_path / "x.jsonl", lines=values))
    left = (
        "2 requests without routing (null, or aborted)",
        "1 tokens without routing (null)",
        "6 tokens without routing (all 0)",
    )
    same(found, notes=tuple(f"{told} are left out" for told in left))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [2, 0]])
def test_the_layers_of_ids_are_those_that_an_array_beside_them_numbers(tmp_path, order):
    model = ModelSpec("m", 8, 2, n_layers=6, moe_layer_ids=(1, 3, 5))
    ids, layers = np.concatenate(REQUESTS)[:, order], np.array([1, 3, 5])[order]
    for names in ({"topk_ids": ids, "sequence_lengths": [10, 12]}, {"routed_experts": ids}):
        found = read_traffic(write(tmp_path / "x.npz", **names, layer_ids=layers), model)
        assert found.layer_ids.tolist() == sorted(layers)
        np.testing.assert_array_equal(found.topk_ids, ids[:, np.argsort(order)].transpose(1, 0, 2))
    with pytest.raises(InputError, match="layer_ids must number each layer"):
        read_traffic(write(tmp_path / "x.npz", routed_experts=ids, layer_ids=np.full(len(order), 3)))


@pytest.mark.parametrize("n_layers", [3, 4])  # of 4 the first is dense, but for padding
def test_padding_by_the_first_experts_in_every_layer_is_left_out(tmp_path, n_layers):
    """SkyRL's `replay_padding_row`: routing that is replayed in training is padded with arange(top_k)."""
    ids = np.concatenate([np.zeros((10, n_layers - 3, 2), int), REQUESTS[0]], axis=1)
    np.save(tmp_path / "x.npy", np.concatenate([np.tile([0, 1], (25, n_layers, 1)), ids]))
    found = read_traffic(tmp_path / "x.npy", SMALL)
    same(found, REQUESTS[:1], found.notes[1:])
    assert found.notes[1] == "25 tokens that take experts 0 to 1 in every layer, as padding does, are left out"
    top_1 = np.concatenate([np.zeros((25, 3, 1), int), REQUESTS[0][..., :1] % 7 + 1])
    assert read_traffic(write(tmp_path / "z.npz", routed_experts=top_1)).n_tokens == 10
    stride = (np.arange(32)[:, None] * 2 + [0, 1]) % 8  # simulated routing: all layers alike, and no padding
    path = write(tmp_path / "y.npz", routed_experts=np.repeat(stride[:, None], 3, axis=1))
    assert read_traffic(path).n_tokens == 32


@pytest.mark.parametrize(
    "dense",
    [[], [0], [0, 1, 2, 3, 4, 5], [layer for layer in range(33) if layer not in (1, 7, 31)], list(range(3, 40))],
)
@pytest.mark.parametrize("filler", [0, -1])
def test_any_number_of_dense_layers_is_found_by_what_fills_them(tmp_path, dense, filler):
    n_layers = 3 + len(dense)
    moe = [layer for layer in range(n_layers) if layer not in dense]
    wide = []
    for ids in REQUESTS:
        whole = np.full((len(ids), n_layers, 2), filler)
        whole[:, moe] = ids
        wide.append(whole)
    flat = write(tmp_path / "flat.jsonl", lines=[{"sgl_ext": {"routed_experts": raw(ids)}} for ids in wide])
    listed = write(tmp_path / "list.jsonl", lines=[{"routed_experts": ids.tolist()} for ids in wide])
    nulls = [
        [[None if layer in dense else row for layer, row in enumerate(token)] for token in ids.tolist()] for ids in wide
    ]
    nulled = write(tmp_path / "null.jsonl", lines=[{"routed_experts": ids} for ids in nulls])
    for path in (flat, listed, nulled):
        traffic = read_traffic(path, SMALL)
        np.testing.assert_array_equal(traffic.expert_counts, counts_of(REQUESTS))
        assert traffic.layer_ids.tolist() == moe


def test_with_one_expert_per_token_the_model_tells_which_layers_are_dense(tmp_path):
    """Expert 0 of a top-1 router is written as a dense layer is."""
    model = ModelSpec("top-1", 8, 1, n_layers=4, moe_layer_ids=(1, 3))
    ids = np.zeros((12, 4, 1), int)
    ids[:, [1, 3], 0] = RNG.integers(0, 8, (12, 2))
    for value in (raw(ids), ids.tolist()):
        traffic = read_traffic(write(tmp_path / "x.jsonl", lines=[{"routed_experts": value}]), model)
        np.testing.assert_array_equal(traffic.expert_counts, counts_of([ids[:, [1, 3]]]))
        assert traffic.layer_ids.tolist() == [1, 3]
        assert traffic.notes[1] == "2 layers that are dense in top-1 are left out"


def test_another_model_is_said_with_both_numbers_only_where_it_is_one(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", lines=[{"routed_experts": x.tolist()} for x in REQUESTS])
    for model, message in (
        (ModelSpec("m", 4, 2, n_moe_layers=3), "has expert id 7, model m has ids 0 to 3: another model?"),
        (ModelSpec("m", 8, 2, n_moe_layers=2), "has 3 MoE layers, model m has 2: another model?"),
        (ModelSpec("m", 8, 4, n_moe_layers=3), "has 2 experts per token, model m has top_k 4"),
    ):
        with pytest.raises(InputError) as error:
            read_traffic(path, model)
        assert message in str(error.value)
        assert str(error.value).count("another model") == message.count("another model")
    flat = write(tmp_path / "y.jsonl", lines=[{"routed_experts": raw(REQUESTS[0])}])
    with pytest.raises(InputError, match=r"60 ids are no whole tokens of 7 MoE layers with 2 experts") as error:
        read_traffic(flat, ModelSpec("m", 8, 2, n_moe_layers=7))
    assert "another model" not in str(error.value)


def test_bad_answers_are_refused_by_name_and_nothing_is_unpickled(tmp_path):
    for value, message in (
        ({"routed_experts": [[[True, 2]]]}, "whole numbers"),
        ({"routed_experts": [[[1, 2], 3]]}, "whole numbers"),
        ({"routed_experts": {"shape": [1, 1, 2], "dtype": "int32"}}, "without 'data'"),
        ({"routed_experts": {"data": raw(REQUESTS[0]), "shape": [10, 3, 2], "dtype": "object"}}, "of dtype object"),
        ({"routed_experts": {"data": raw(REQUESTS[0]), "shape": [10, 3, 3], "dtype": "int32"}}, "do not fill the shape"),
        ({"routed_experts": {"data": raw(REQUESTS[0]), "shape": [True, 3, 2], "dtype": "int32"}}, "shape must be"),
        ({"routed_experts": npy(REQUESTS[0] * 1.5, "<f8")}, "must be of whole numbers, not float64"),
        ({"routed_experts": npy(REQUESTS[0], "u1")[:120]}, "(EOF|cut off|base64|sound)"),
        ({"routed_experts": npy(REQUESTS[0][0], "u1")}, r"shape \[tokens, layers, top_k\]"),
        ({"routed_experts": 3}, "whole numbers"),
        ({"physical_to_logical_map": [[0, 1]]}, "map of physical experts, and no traffic"),
        ({"num_hidden_layers": 3}, "config.json, and no traffic"),
        ({"iter": 1, "block": "decoder", "layer": 3, "tpe": [[1, 2], [3, 4]]}, "experts that one rank has, and no traffic"),
        ({"hello": "world"}, "no key 'routed_experts'"),
        ({"routed_experts": npy(np.array([{"a": 1}]), object)}, "whole numbers, not object"),
        ({"routed_experts": raw(npy_header({"descr": "|u1", "fortran_order": False, "shape": (2**40, 3, 2)}), "u1")}, "cut off"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            read_traffic(write(tmp_path / "x.jsonl", lines=[value]), SMALL)
        assert "\n" not in str(error.value)


# Rows of tokens


def rows(requests=REQUESTS):
    """(request, token, layer, experts) of each row."""
    return [(i, *at, ids[at].tolist()) for i, ids in enumerate(requests) for at in np.ndindex(len(ids), 3)]


def jsonl(values):
    return "\n".join(map(json.dumps, values))


def forms_of_rows(requests):
    """Text of a log of tokens, by the ending of its file; of those without a request only the order tells the tokens."""
    listed, one, joined = rows(requests), rows(requests[:1]), [np.concatenate(requests)]
    lines = [{"type": "route", "req_id": f"r{i}", "token_idx": t, "layer": at, "topk_ids": x} for i, t, at, x in listed]
    yield "jsonl", jsonl([{"type": "meta", "layers_logged": [0, 1, 2], "top_k": 2}, *lines]), requests
    yield "json", json.dumps(lines[::-1]), requests[::-1]
    yield "log", jsonl({"layer": at, "token_idx": t, "topk_ids": x} for _, t, at, x in one), requests[:1]
    yield "jsonl", jsonl({"layer": at, "token_id": t % 3, "experts": x} for _, t, at, x in listed), joined
    batches = [(i, at, requests[i][:, at].tolist()) for i, at in np.ndindex(2, 3)]
    yield "ndjson", jsonl({"step": i, "layer": at, "topk_ids": x} for i, at, x in batches), joined
    for mark in ('"[{}, {}]"', "{},{}", "{} {}", '"{},{}"'):
        yield "csv", "layer_id,expert_ids\n" + "".join(f"{at},{mark.format(*x)}\n" for _, _, at, x in one), requests[:1]
    pairs = [(i, t, f"layer_{at}", f"{expert} ", 0.5) for i, t, at, x in listed for expert in x]
    for mark, ending in ((",", "txt"), ("\t", "tsv"), (";", "csv")):
        head = ["request_id", "token", "layer", "expert ", "weight"]
        yield ending, "\n".join(mark.join(map(str, row)) for row in (head, *pairs)), requests


def test_every_log_with_a_row_for_a_token_or_pair_gives_the_same_tokens(tmp_path):
    for ending, text, wanted in forms_of_rows(REQUESTS):
        for coding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / f"x.{ending}").write_text(text, encoding=coding)
            found = read_traffic(tmp_path / f"x.{ending}", SMALL)
            same(found, wanted, found.notes[1:])
            assert len(found.notes) == 1
            assert ("one sequence" in found.notes[0]) == (len(wanted) == 1)
    frame = pd.DataFrame(rows(), columns=["request", "token", "layer", "experts"])
    for table in (frame, frame.explode("experts").astype({"experts": int})):
        table.to_parquet(tmp_path / "x.parquet")
        same(read_traffic(tmp_path / "x.parquet"))
    frame = pd.DataFrame(COUNTS, [3, 5, 9], list("01234567"))
    for table in (frame, frame.rename_axis("layer"), frame.rename_axis("layer").reset_index()):
        table.to_parquet(tmp_path / "x.parquet")
        found = read_traffic(tmp_path / "x.parquet")
        np.testing.assert_array_equal(found.expert_counts, COUNTS)
        assert found.layer_ids.tolist() == [3, 5, 9]


def test_what_a_killed_server_left_is_read_with_a_note(tmp_path):
    """Of lines without an end, and of a token without all layers."""
    lines = [{"layer": at, "token": t, "topk_ids": x} for _, t, at, x in rows(REQUESTS[:1])]
    answers = [json.dumps({"routed_experts": ids.tolist()}) for ids in REQUESTS]
    for text, n_tokens, n_notes in ((jsonl(lines[:-1]), 9, 2), ("\n".join(answers), 10, 1)):
        (tmp_path / "x.jsonl").write_text(text[:-5])
        found = read_traffic(tmp_path / "x.jsonl")
        same(found, [REQUESTS[0][:n_tokens]], found.notes[1:])
        assert "the last one, is torn off and left out" in found.notes[1]
        assert len(found.notes) == 1 + n_notes
    (tmp_path / "x.jsonl").write_text("\n".join([answers[0], answers[1][:-5], answers[1]]))
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_traffic(tmp_path / "x.jsonl")


def test_rows_that_do_not_tell_tokens_apart_are_refused(tmp_path):
    for lines, message in (
        (["layer,token,expert", "0,0,1", "0,0,2", "0,1,3", "0,2,1", "0,2,2"], "token 1 has 1 experts, where others have 2"),
        (["layer,token,expert", "0,0,1", "0,1,2", "0,0,3", "0,1,0"], "do not stand together"),
        (["layer,token,topk_ids", "0,0,1 2", "1,1,1 2", "0,0,1 3", "1,0,1 2"], "a token stands twice in one layer"),
        (["rank,layer,token,topk_ids", "0,0,0,1 2", "1,0,0,1 2"], "rows of 2 ranks"),
        (["layer,token,topk_ids", "0,Hello,1 2"], "token must be whole numbers from 0 on, found Hello"),
        (["layer,token,topk_ids", "0,0,1 x"], "topk_ids of row 1 must be whole numbers, or a list of them, not 1 x"),
        (["layer,token,topk_ids", "0,0,1 40000"], "from 0 to 32767"),
        (["layer,token,topk_ids", f"0,0,{list(range(33))}"], "more than 32 experts"),
        (["layer,token,topk_ids", "0,0"], "line 2: 2 columns where the first line has 3"),
        (["layer,token,expert"], "holds no tokens"),
        (['{"layer": 0, "topk_ids": [1, 2]}', '{"layer": 0}'], "line 2: its keys are not those of the first row"),
        (['{"layer": 0, "topk_ids": [1, true]}'], "must be whole numbers"),
        (['{"layer": [0], "topk_ids": [1, 2]}'], "layer must be whole numbers"),
    ):  # fmt: skip
        (tmp_path / "x.txt").write_text("\n".join(lines))
        with pytest.raises(InputError, match=message):
            read_traffic(tmp_path / "x.txt")


# Trace sets: a file for each request


def trace(ids, n_prefill, dense=(0, 2)):
    """A request's steps {layer: [[expert ids] of each token]}, null for dense layers, and its decoder layers."""
    moe = [layer for layer in range(ids.shape[1] + len(dense)) if layer not in dense]
    parts = [ids[:n_prefill], *ids[n_prefill:, None]]
    none = {str(layer): None for layer in dense}
    return [none | {str(layer): part[:, i].tolist() for i, layer in enumerate(moe)} for part in parts]


@pytest.fixture
def traces(tmp_path):
    folder = tmp_path / "r1"
    folder.mkdir()
    for i, ids in enumerate(REQUESTS):
        (folder / f"request_{i}.json").write_text(json.dumps(trace(ids, 6)))
    (folder / "README.md").write_text("about")
    return folder


def test_a_trace_set_keeps_prefill_and_decode_apart(traces):
    for phase, requests in (("prefill", [ids[:6] for ids in REQUESTS]), ("decode", [ids[6:] for ids in REQUESTS])):
        traffic = read_traffic(traces, SMALL, phase)
        np.testing.assert_array_equal(traffic.topk_ids, np.concatenate(requests).transpose(1, 0, 2))
        assert traffic.layer_ids.tolist() == [1, 3, 4]
        assert (traffic.n_sequences, traffic.phase) == (2, phase)
        np.testing.assert_array_equal(traffic.expert_counts, counts_of(requests))
    assert "12 tokens of prefill are left out" in read_traffic(traces).notes[0]
    assert "1 other files of the folder are not read" in traffic.notes
    one = read_traffic(traces / "request_0.json")
    np.testing.assert_array_equal(one.expert_counts, counts_of([REQUESTS[0][6:]]))


def test_mixed_models_in_one_folder_are_refused(traces):
    for name, held, message in (
        ("request_2.json", trace(REQUESTS[0], 6, dense=(0,)), "mixed models in one folder"),
        ("request_2.json", {"0": [1, 2, 3]}, "holds both"),
        ("x.csv", 3, r"several kinds: \.csv, \.json"),
    ):
        (traces / name).write_text(json.dumps(held))
        with pytest.raises(InputError, match=message):
            read_traffic(traces)


def test_bad_steps_of_a_trace_are_refused(traces):
    for steps, message in (
        ([{"0": None, "1": [[1, 2]]}, {"0": [[1, 2]], "1": None}], "step 1 has routing"),
        ([{"1": [[1, 2]]}, {"1": [[True, 2]]}], "whole numbers"),
        ([{"1": [[1, 2]]}, {"1": [[1, 2], [3]]}], "(regular|whole numbers)"),
        ([{"1": [[1, 2]]}, ["x"]], "(step 1 is no object|whole numbers|no key)"),
        (trace(REQUESTS[0], 10), "has no steps of decode, only prefill"),
    ):
        (traces / "request_0.json").write_text(json.dumps(steps))
        with pytest.raises(InputError, match=message):
            read_traffic(traces / "request_0.json")
    assert read_traffic(traces / "request_0.json", phase="prefill").n_tokens == 10


# SGLang's recorder: a .pt file through a stand-in for torch


class Tensor:
    def __init__(self, array):
        self.array = np.asarray(array)

    def numpy(self):
        return self.array


@pytest.fixture
def torch_files(tmp_path, monkeypatch):
    """Files that a stand-in for torch.load gives as they were put."""
    held = {}

    def load(path, map_location, weights_only):
        assert (weights_only, map_location) == (True, "cpu")
        if isinstance(held[str(path)], Exception):
            raise held[str(path)]
        return held[str(path)]

    def put(name, value):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PK")
        held[str(path)] = value
        return path

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, load=load))
    return put


MAP = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 3], [7, 6, 5, 4, 3, 2, 1, 0, 7, 7], [1, 0, 3, 2, 5, 4, 7, 6, 1, 1]])


def recorded(*records, slots=MAP):
    return {"records": list(records), "last_physical_to_logical_map": Tensor(slots)}


def test_per_pass_counts_are_mapped_and_ranks_added_up(torch_files):
    physical = RNG.integers(0, 50, (2, 4, 3, 10))  # ranks, passes, layers, physical experts
    for rank in range(2):
        records = [
            {"forward_pass_id": 5 + i, "rank": rank, "global_physical_count": Tensor(physical[rank, i])}
            for i in range(4)
        ]
        path = torch_files(f"dumps/x_{rank}.pt", recorded(*records))
    wanted = np.zeros((2, 3, 8), int)
    for rank, layer, slot in np.ndindex(2, 3, 10):
        wanted[rank, layer, MAP[layer, slot]] += physical[rank, :, layer, slot].sum()
    found = read_traffic(path.parent, SMALL)
    np.testing.assert_array_equal(found.expert_counts, wanted.sum(axis=0))
    assert (found.n_steps, found.notes[1]) == (4, "2 ranks are added up")
    np.testing.assert_array_equal(read_traffic(path).expert_counts, wanted[1])
    np.testing.assert_array_equal(read_traffic([path, path.parent / "x_0.pt"]).expert_counts, wanted.sum(axis=0))


def test_per_token_ids_are_mapped_and_unused_columns_cut(torch_files):
    """SGLang's records of this mode hold physical counts, too (`_DetailSinglePassGatherer.collect`)."""
    logical = np.array([[1, 0, 3, 2, 5, 4, 7, 6]] * 4)  # decoder layer 0 is dense
    slot_of = np.argsort(logical, axis=1)
    records = []
    for number, ids in enumerate(REQUESTS):
        wide = np.full((4, len(ids), 8), -1)
        for layer in range(3):
            wide[layer + 1, :, :2] = slot_of[layer + 1][ids[:, layer]]
        record = {"forward_pass_id": number, "rank": 0, "extend_seq_lens": [len(ids)], "forward_mode": 1}
        counts = Tensor(np.zeros((4, 8), int))
        records.append({**record, "topk_ids_of_layer": Tensor(wide), "global_physical_count": counts})
    path = torch_files("t/a.pt", recorded(*records, slots=logical))
    traffic = read_traffic(path)
    np.testing.assert_array_equal(traffic.expert_counts, counts_of(REQUESTS))
    assert (traffic.n_tokens, traffic.n_sequences, traffic.n_steps) == (22, 2, 2)
    assert traffic.layer_ids.tolist() == [1, 2, 3]
    # A second rank with the same tokens (tensor-parallel attention) adds none; in decode each token is of another request.
    twice = [dict(record, rank=1) for record in records]
    torch_files("t/b.pt", recorded(*twice, slots=logical))
    assert read_traffic(path.parent).n_tokens == 22
    decode = [
        {key: value for key, value in dict(r, forward_mode=2).items() if key != "extend_seq_lens"} for r in records
    ]
    path = torch_files("d/a.pt", recorded(*decode, slots=logical))
    assert read_traffic(path).n_sequences == 22


def test_unfilled_steps_of_the_ring_buffer_are_dropped(torch_files):
    counts = np.zeros((10, 4, 8), np.int32)
    counts[:3, 1:] = RNG.integers(1, 50, (3, 3, 8))
    path = torch_files(
        "s/a.pt", {"rank": 0, "logical_count": Tensor(counts), "average_utilization_rate_over_window": None}
    )
    found = read_traffic(path, SMALL)
    assert found.n_steps == 3
    assert "7 of 10 steps have no load (unfilled, or idle) and are left out" in found.notes
    np.testing.assert_array_equal(found.expert_counts, counts[:3, 1:].sum(axis=0))
    assert found.layer_ids.tolist() == [1, 2, 3]
    torch_files("s/b.pt", {"rank": 1, "logical_count": Tensor(counts)})
    np.testing.assert_array_equal(read_traffic(path.parent).expert_counts, found.expert_counts)


def test_other_torch_files_are_refused_by_name(torch_files):
    for held, message in (
        ({"last_physical_to_logical_map": Tensor(MAP)}, "holds no tensor that is known"),
        ({"a": 1, "b": Tensor(COUNTS)}, "holds no tensor that is known"),
        ({"records": [{"global_physical_count": Tensor(COUNTS)}]}, "needs last_physical_to_logical_map"),
        (recorded(), "holds no record"),
        (recorded(3), "no dict"),
        (recorded({"x": 1}), "neither global_physical_count"),
        (recorded({"global_physical_count": Tensor(COUNTS)}), r"shape \[3, 10\]"),
        (recorded({"global_physical_count": Tensor(-MAP)}), "negative"),
        (recorded({"global_physical_count": Tensor(MAP)}, slots=MAP - 1), "needs last"),
        (recorded({"topk_ids_of_layer": Tensor(np.full((3, 2, 8), 10))}), "has physical experts 0 to 9"),
        (recorded({"topk_ids_of_layer": Tensor(np.full((3, 2, 8), -1))}), "no tokens"),
        ([1, 2], "holds no tensor, but a list"),
        (pickle.UnpicklingError("code"), "not unpickled"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_traffic(torch_files("x.pt", held))


def test_tensors_of_a_torch_file_are_read_as_arrays_are(torch_files):
    table = RNG.multinomial(1600, np.full(8, 1 / 8), size=3)
    for held, wanted in (
        (Tensor(REQUESTS[0]), counts_of(REQUESTS[:1])),
        ([Tensor(ids) for ids in REQUESTS], counts_of(REQUESTS)),
        ({"topk_ids": Tensor(REQUESTS[0]), "topk_weights": Tensor(REQUESTS[0] / 7)}, counts_of(REQUESTS[:1])),
        ({f"model.layers.{i}.mlp.gate": Tensor(REQUESTS[0][:, i]) for i in range(3)}, counts_of(REQUESTS[:1])),
        ({i: Tensor(row) for i, row in enumerate(table)}, table),
        ({"counts": Tensor(table), "balancedness": Tensor([0.5] * 3), "step": 3}, table),  # lmdeploy
    ):
        np.testing.assert_array_equal(read_traffic(torch_files("x.pt", held), SMALL).expert_counts, wanted)
    window = np.zeros((2, 3, 10), int)  # vLLM's EPLB state: the last slots are copies
    window[1, :, 2:] = table
    slots = np.tile([7, 6, 0, 1, 2, 3, 4, 5, 6, 7], (3, 1))
    state = {"expert_load_pass": Tensor(window[1]), "expert_load_window": Tensor(window)}
    path = torch_files("y.pt", {**state, "physical_to_logical_map": Tensor(slots)})
    np.testing.assert_array_equal(read_traffic(path, SMALL).expert_counts, table)
    with pytest.raises(InputError, match="expert_load_window counts physical experts, and no map"):
        read_traffic(torch_files("z.pt", state), SMALL)


# Layers


def test_draft_layers_behind_the_decoder_are_left_out_and_other_models_are_not(tmp_path):
    model = ModelSpec("m", 8, 2, n_layers=4, moe_layer_ids=(1, 2, 3))
    table = RNG.integers(1, 900, (9, 8))
    for n_drafts in (1, 4, 5):
        rows = np.concatenate([np.zeros((1, 8), int), table[: 3 + n_drafts]])
        np.save(tmp_path / "x.npy", rows)
        if n_drafts == 5:
            with pytest.raises(InputError, match="has 8 MoE layers, model m has 3: another model"):
                read_traffic(tmp_path / "x.npy", model)
            return
        found = read_traffic(tmp_path / "x.npy", model)
        np.testing.assert_array_equal(found.expert_counts, table[:3])
        assert found.layer_ids.tolist() == [1, 2, 3]
        assert any(str([*range(4, 4 + n_drafts)]) in note for note in found.notes)


def test_layers_are_those_of_the_file_or_of_the_model(tmp_path):
    model = ModelSpec("small", 8, 2, n_layers=6, moe_layer_ids=(1, 3, 5))
    rows = "\n".join(",".join(map(str, row)) for row in COUNTS)
    path = tmp_path / "x.csv"
    path.write_text(rows)
    assert read_traffic(path).layer_ids.tolist() == [0, 1, 2]
    assert read_traffic(path, model).layer_ids.tolist() == [1, 3, 5]
    wide = np.zeros((6, 8), int)
    wide[[1, 3, 5]] = COUNTS
    np.save(tmp_path / "x.npy", wide)
    assert read_traffic(tmp_path / "x.npy").layer_ids.tolist() == [1, 3, 5]
    assert "3 layers without any load are left out" in read_traffic(tmp_path / "x.npy").notes
    assert read_traffic(tmp_path / "x.npy", model).layer_ids.tolist() == [1, 3, 5]
    header = "layer," + ",".join(f"e{e}" for e in range(8)) + "\n"
    for ids, wanted in (
        *((ids, [1, 3, 5]) for ids in ([1, 3, 5], [0, 1, 2], [2, 4, 6], [1, 2, 3])),
        ([3], [3]),
        ([0, 2], [1, 5]),
    ):
        lines = [f"{i},{','.join(map(str, row))}\n" for i, row in zip(ids, COUNTS, strict=False)]
        path.write_text(header + "".join(lines))
        assert read_traffic(path, model).layer_ids.tolist() == wanted
    path.write_text(header + f"4,{','.join(map(str, COUNTS[0]))}\n")
    with pytest.raises(InputError, match="has routing in layer 4, the 3 MoE layers of model small are 1 to 5"):
        read_traffic(path, model)
    path = write(tmp_path / "x.jsonl", lines=[{"routed_experts": x.tolist()} for x in REQUESTS])
    assert read_traffic(path, model).layer_ids.tolist() == [1, 3, 5]


# Bad input


def test_packed_bombs_and_torn_files_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sim.files.MOST_UNASKED", 1 << 20)
    for name, data, message in (
        ("x.csv.gz", gzip.compress(b"1,2\n" + b"0,0\n" * (1 << 20)), "unpacks to more than 200 times its size"),
        ("x.jsonl.gz", gzip.compress(bytes(4 << 20)), "unpacks to more than 200 times its size"),
        ("y.csv.gz", gzip.compress(b"1,2\n" * 1000)[:-20], "is cut off"),
        ("y.csv.gz", b"1,2\n3,4\n", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(data)
        fails(capsys, ["traffic", "show", tmp_path / name], message)


def test_large_folders_and_pickles_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sim.traffic.read._MOST_FILES", 20)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(21):
        (folder / f"{i}.json").write_text("[]")
    fails(capsys, ["traffic", "show", folder], "has more than 20 files")
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04.")
    fails(capsys, ["traffic", "show", tmp_path / "x.pkl"], "a pickle may run any code and is not read")
    (tmp_path / "empty").mkdir()
    fails(capsys, ["traffic", "show", tmp_path / "empty"], "has no file that is known")
    fails(capsys, ["traffic", "show", "/dev/zero"], "the ending must be one of")


# Logs


VLLM = (
    "INFO 08-11 [eplb_state.py:549] EPLB step: {i} for model m: avg_tokens=512.00, max_tokens=700, balancedness={x:.4f}, steps "
    "until the next rearrangement: {i}"
)
SGLANG = (
    "[2026-08-11 10:00:00 TP0] [Expert Balancedness] forward_pass_id={i} current_pass_balancedness={x:.03f} "
    "last_10_average_balancedness=0.123 last_1000_average_balancedness=0.456  gpu_physical_count_sum=100"
)


@pytest.mark.parametrize(("engine", "line"), [("vLLM", VLLM), ("SGLang", SGLANG)])
def test_logs_of_engines_give_the_balancedness_of_each_step(tmp_path, engine, line):
    values, metric = [0.8, 0.25, 1.0], f"balancedness_{engine.lower()}"
    lines = ["INFO starting up 3", *(line.format(i=i, x=x) for i, x in enumerate(values)), "balancedness is logged: 1"]
    data = "\n".join(lines).encode()
    for name, held in (("x.log", data), ("x.log.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(held)
        log = read_log(tmp_path / name, metric)
        assert log.values.tolist() == values
        assert log.notes[0].endswith(f"3 lines of {engine} with balancedness, 2 other lines skipped")
    with pytest.raises(InputError, match="is no balancedness"):
        read_log(tmp_path / "x.log", "moe_ms")


def test_field_case_of_vllms_log_has_three_values(shared):
    assert read_log(shared / "cases" / "d12-vllm-eplb.log", "balancedness_vllm").values.tolist() == [
        0.8,
        0.7004,
        0.9014,
    ]


@pytest.mark.parametrize(
    ("text", "values", "note"),
    [
        ("step,balancedness,ms\n1,0.8,0.1\n2,0.7,0.2\n", [0.8, 0.7], ""),
        ("1 0.8\n2 0.7\n", [0.8, 0.7], "of 2 columns the last"),
        ("EngineCore_DP0 balancedness=0.8000, x\nEngineCore_DP1 balancedness=0.7000, x\n", [0.8, 0.7], "2 engines"),
        ("balancedness=0.8000, x\nbalancedness=0.", [0.8], "cut off"),
        ("EPLBConfig(log_balancedness=True, log_balancedness_interval=1)\nbalancedness=0.8, x\n", [0.8], "1 other"),
        ("balancedness\x1b[0m=\x1b[1m0.8\x1b[0m, next: 1\n", [0.8], "1 lines of vLLM"),
        ("\r10%|x\rbalancedness=0.8, x\rbalancedness=0.7, x\n", [0.8, 0.7], "2 lines of vLLM"),
        ("balancedness=0.8, x balancedness=0.7, x\n", [0.8], "1 lines have several values"),
        (json.dumps({"log": json.dumps({"balancedness": 0.8})}) + "\n", [0.8], "1 lines of vLLM"),
        ("balancedness=0.8%\n", None, "'0.8%' is no balancedness"),
        ("max_tokens=0, balancedness=0.0000, x\nmax_tokens=5, balancedness=0.8, x\n", [0.8], "1 idle steps"),
        ("balancedness=0,8000\n", None, "'0,8000' is no balancedness"),
        ("balancedness=0.5\nbalancedness=1.7\n", None, "1.7 is no value"),
        ("starting\n[Expert Statistics] avg_balancedness=0.8 | x\n", None, "no line has balancedness"),  # lmdeploy
        ("balancedness=0.8\ncurrent_pass_balancedness=0.8\n", None, "of SGLang and of vLLM"),
    ],
)
def test_a_logs_other_columns_engines_and_torn_lines_are_not_taken_for_steps(tmp_path, text, values, note):
    (tmp_path / "x.log").write_text(text)
    if values is None:
        with pytest.raises(InputError, match=note):
            read_log(tmp_path / "x.log", "balancedness_vllm")
        return
    log = read_log(tmp_path / "x.log", "balancedness_vllm")
    assert log.values.tolist() == values
    assert any(note in said for said in ("", *log.notes))


def test_read_traffic_is_public_and_takes_a_models_name(tmp_path):
    np.save(tmp_path / "x.npy", RNG.integers(1, 9, (16, 64)))
    assert sim.read_traffic(str(tmp_path / "x.npy"), "olmoe-1b-7b").expert_counts.shape == (16, 64)
    assert sim.LoadCounts is LoadCounts
