"""Tables of load counts: every layout of CSV and JSON, files of ranks, TensorRT-LLM's statistics; and what is refused."""

import gzip
import json
from functools import reduce

import numpy as np
import pytest
from conftest import fails, write

from sim import InputError, ModelSpec, read_traffic
from sim.traffic import LoadCounts

RNG = np.random.default_rng(1)
SMALL = ModelSpec("small", 8, 2, n_moe_layers=3)
COUNTS = RNG.integers(1, 900, (3, 8))


def csv_forms():
    """The same counts of layers 3, 5, 9 in every layout."""
    ids = [3, 5, 9]
    for layer in ("layer", "layer_id", "layer_idx", "Layer ID", "moe_layer"):
        head = ",".join([layer, *(f"expert_{e}" for e in range(8))])
        yield f"{head}\n" + "".join(f"{i},{','.join(map(str, row))}\n" for i, row in zip(ids, COUNTS, strict=True))
    for name in ("{}", "e{}", "expert {}", "expert-{}", "Expert_{}"):
        head = "layer," + ",".join(name.format(e) for e in range(8))
        yield f"{head}\n" + "".join(f"{i},{','.join(map(str, row))}\n" for i, row in zip(ids, COUNTS, strict=True))
    head = "," + ",".join(map(str, range(8)))  # a data frame with its index
    yield f"{head}\n" + "".join(f"{i},{','.join(map(str, row))}\n" for i, row in zip(ids, COUNTS, strict=True))
    for head in (
        "layer_id,expert_id,count",
        "layer,expert,load",
        "layer_idx,expert_idx,token_count",
        "layer,logical_expert,tokens",
    ):
        rows = [f"{i},{e},{COUNTS[k, e]}" for k, i in enumerate(ids) for e in RNG.permutation(8)]
        yield head + "\n" + "\n".join(rows)
        yield "\n".join(rows)
        yield (head + "\n" + "\n".join(rows)).replace(",", ";")
        yield (head + "\n" + "\n".join(rows)).replace(",", "\t")
    half = COUNTS // 2
    two = [
        (part, i, row) for part, table in enumerate((half, COUNTS - half)) for i, row in zip(ids, table, strict=True)
    ]
    wide = [f"{part},{i},{','.join(map(str, row))}" for part, i, row in two]
    for step in ("step", "iteration", "iter", "forward_pass_id"):
        yield f"{step},layer," + ",".join(f"e{e}" for e in range(8)) + "\n" + "\n".join(wide)
    for rank in ("rank", "ep_rank"):
        rows = [f"{part},{i},{e},{n}" for part, i, row in two for e, n in enumerate(row)]
        yield f"{rank},layer,expert,count\n" + "\n".join(rows)
        yield f"{rank},layer," + ",".join(map(str, range(8))) + "\n" + "\n".join(wide)


def test_every_layout_of_a_table_gives_the_same_counts_and_layers(tmp_path):
    n = 0
    for text in csv_forms():
        for name, data in (("x.csv", text.encode()), ("x.csv.gz", gzip.compress(text.encode()))):
            (tmp_path / name).write_bytes(data)
            found = read_traffic(tmp_path / name, SMALL)
            np.testing.assert_array_equal(found.expert_counts, COUNTS)
            assert found.layer_ids.tolist() == [3, 5, 9]
            assert found.n_steps == (2 if text.startswith(("step", "iter", "forward")) else None)
        n += 1
    assert n == 35


@pytest.mark.parametrize("head", ["1,2,3\n", ",1,2,3\n"])
def test_exchanged_axes_are_refused_where_a_dense_layer_is_a_column_of_zeros(tmp_path, head):
    loads = RNG.multinomial(1600, np.arange(1, 9) / 36, size=3).T  # of layers 1 to 3
    index = [[e] if head.startswith(",") else [] for e in range(8)]
    rows = [",".join(map(str, [*left, *row])) for left, row in zip(index, loads.tolist(), strict=True)]
    (tmp_path / "x.csv").write_text(head + "\n".join(rows))
    with pytest.raises(InputError, match="its columns all add up to 1600, its rows do not: are the axes exchanged"):
        read_traffic(tmp_path / "x.csv")


def test_experts_without_a_row_have_no_load(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("layer_id,expert_id,count\n3,0,7\n3,2,1\n4,1,5\n")
    assert read_traffic(path).expert_counts.tolist() == [[7, 0, 1], [0, 5, 0]]
    found = read_traffic(path, SMALL)
    assert found.expert_counts.tolist() == [[7, 0, 1, 0, 0, 0, 0, 0], [0, 5, 0, 0, 0, 0, 0, 0]]
    for model, message in (
        (ModelSpec("m", 2, 1), "counts of 3 experts, model m has 2: another model"),
        (ModelSpec("m", 8, 2, n_moe_layers=1), "2 MoE layers, model m has 1: another model"),
    ):
        with pytest.raises(InputError, match=message):
            read_traffic(path, model)


def test_a_header_of_numbers_is_a_header_and_a_row_of_counts_is_none(tmp_path):
    path = tmp_path / "x.csv"
    rows = "\n".join(",".join(map(str, row)) for row in COUNTS)
    path.write_text("0,1,2,3,4,5,6,7\n" + rows)
    found = read_traffic(path)
    np.testing.assert_array_equal(found.expert_counts, COUNTS)
    assert "its first line, 0 to 7, numbers the experts" in found.notes
    path.write_text("1,2,3,4,5,6,7,9\n" + rows)
    assert read_traffic(path).n_layers == 4
    for text in ("1.900;40\n1.200;740\n", "1.001;2.002\n1.003;2.004\n"):  # 1000 times 1.001 is a little below 1001
        path.write_text(text)
        assert any("taken for the decimal point" in note for note in read_traffic(path).notes)


def test_tables_with_slips_are_refused_by_line_and_name(tmp_path, capsys):
    path = tmp_path / "x.csv"
    for text, message in (
        ("layer,expert_0,rest\n0,1,2\n", "'rest' is not known"),
        ("expert_0,expert_1,total\n1,2,3\n", "'total' is not known"),
        ("layer_id,expert_id,count_all_topk,count_top1\n0,1,2,3\n", "'count_all_topk' is not known"),
        ("layer,slot,count\n0,1,2\n", "'slot' is not known"),
        ("layer,expert\n0,1\n", "a column 'expert' needs a column 'count'"),
        ("expert,count\n0,1\n", "a column 'expert' needs a column 'layer'"),
        ("layer,count\n0,1\n", "a column 'count' needs a column 'expert'"),
        ("layer,layer_id,e0,e1\n0,1,2,3\n", "2 columns name a layer"),
        ("layer,e0,e0\n0,1,2\n", "an expert has two columns"),
        ("layer,expert,count\n0,0.5,2\n", "experts must be whole numbers"),
        ("layer,expert,count\n0,-1,2\n", "experts must be whole numbers"),
        ("layer,expert,count\n0,40000,2\n", "above 32767"),
        ("layer,expert,count\n0,1,-2\n0,1,5\n", "must not be negative, found -2"),
        ("layer,expert,count\n0,1,nan\n0,0,5\n", "found NaN"),
        ("layer,e0,e1\n0,1,2\n\n# note\n1,,3\n", "line 5: '' is not a number"),
        ("layer,e0,e1\n0,1,2\n1,2,3,4\n", "line 3: 4 columns where the first line has 3"),
        ("layer_id,expert_id,count\n0,1,2\nlayer_id,expert_id,count\n", "line 3: 'layer_id' is not a number"),
        ("layer,e0,e1\n0,true,2\n", "'true' is not a number"),
        ("0,0,0,9\n0,0,1,7\n0,0,2,5\n0,1,0,9\n", "4 columns without names, of which 3 number its rows"),
        ("layer,e0,e1\n0,1_900,2\n", "line 2: '1_900' is not a number"),
        ("layer,e0,e1\n0,99999999999999999999,2\n", "line 2: counts above 2**53"),
    ):
        path.write_text(text)
        fails(capsys, ["traffic", "show", path], message)


def test_json_tables(tmp_path):
    rows = COUNTS.tolist()
    values = [
        {str(3 + i): row for i, row in enumerate(rows)},
        {f"layer_{3 + i}": row for i, row in enumerate(rows)},
        {f"model.layers.{3 + i}.mlp": row for i, row in enumerate(rows)},
        {"0": None, "1": [], **{str(3 + i): row for i, row in reversed(list(enumerate(rows)))}},
        {str(3 + i): {str(e): n for e, n in enumerate(row)} for i, row in enumerate(rows)},
        {"expert_counts": {str(3 + i): row for i, row in enumerate(rows)}},
        {"counts": rows, "layer_ids": [3, 4, 5]},
        {"counts": rows[::-1], "layer_ids": [5, 4, 3]},  # in order, by which maps are exported
        {"layers": {str(3 + i): row for i, row in enumerate(rows)}},
        [{"layer_id": 3 + i, "counts": row} for i, row in enumerate(rows)],
        [{"layer": 3 + i, "expert": e, "count": n} for i, row in enumerate(rows) for e, n in enumerate(row)],
    ]
    for value in values:
        for indent in (None, 2):
            (tmp_path / "x.json").write_text(json.dumps(value, indent=indent))
            found = read_traffic(tmp_path / "x.json", SMALL)
            np.testing.assert_array_equal(found.expert_counts, COUNTS)
            assert found.layer_ids.tolist() == [3, 4, 5]
    for value in values[-2:]:
        np.testing.assert_array_equal(read_traffic(write(tmp_path / "x.jsonl", lines=value)).expert_counts, COUNTS)
    steps = [{str(3 + i): row for i, row in enumerate(table)} for table in (rows, rows)]
    (tmp_path / "x.json").write_text(json.dumps(steps))
    for path in (tmp_path / "x.json", write(tmp_path / "x.jsonl", lines=steps)):
        found = read_traffic(path)
        np.testing.assert_array_equal(found.expert_counts, 2 * COUNTS)
        assert (found.n_steps, found.layer_ids.tolist()) == (2, [3, 4, 5])
    history = {
        "load_history": [{"step": i, "logical_expert_load": rows} for i in range(2)]
    }  # of openevolve's EPLB task
    for value, steps in (
        (rows, None),
        ({"logical_count": [rows, rows]}, 2),
        (history, 2),
        ({"counts": rows, "layers": 3}, None),
    ):
        (tmp_path / "x.json").write_text(json.dumps(value))
        found = read_traffic(tmp_path / "x.json")
        np.testing.assert_array_equal(found.expert_counts, COUNTS * (steps or 1))
        assert (found.n_steps, found.layer_ids.tolist()) == (steps, [0, 1, 2])
    ids = [{"3": row, "4": row[::-1]} for row in RNG.random((20, 8)).argsort(axis=1)[:, :2].tolist()]  # of 20 tokens
    (tmp_path / "x.json").write_text(json.dumps([step | {"5": [6, 7]} for step in ids]))
    with pytest.raises(InputError, match="may be loads or the experts of a token"):
        read_traffic(tmp_path / "x.json")
    even = [[[4, 4, 0], [5, 1, 2]], [[3, 5, 0], [2, 2, 4]]]  # counts of two steps: a layer's add up to the same
    (tmp_path / "x.json").write_text(json.dumps(even))
    assert read_traffic(tmp_path / "x.json").expert_counts.tolist() == [[7, 9, 0], [7, 3, 6]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"0": [1, 2], "1": [1]}, "not equally long"),
        ({"0": [1, True]}, "counts must be numbers, found True"),
        ({"0": [1, "a"]}, "counts must be numbers"),
        ({"0": [1, -2]}, "must not be negative"),
        ({"0": {"0": 1, "40000": 2}}, "above 32767"),
        ({"layer_0": [1, 2], "0": [1, 2]}, "a layer stands there twice"),
        ([[1, 2], 3], "(regular|whole numbers)"),
        ({"0": [0, 0]}, "every count is 0"),
        ({"0": [1, float("nan")]}, "found NaN"),
        ({"counts": [[1, 2], [3, 4]], "layer_ids": [3, 3]}, "each by a number of its own"),
        (reduce(lambda inner, _: [{"layers": inner}], range(300), {"0": [1, 2]}), "not a sound JSON file"),
        ([{"0": [1, 2]}, {"1": [1, 2]}], "differ in their layers"),
        ([{"0": [1, 2]}, {"0": None}], "have no counts"),
        ({"0": None, "3": [[1, 2], [3, 4]]}, "one step"),
        ({"layer": 0, "counts": [1, 2], "slot": 3}, "not known beside a layer: slot"),
    ],
)
def test_bad_json_tables_are_refused(tmp_path, value, message):
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        read_traffic(tmp_path / "x.json")


def test_csv_files_of_ranks_are_added_up(tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    half = COUNTS // 2
    for rank, table in enumerate((half, COUNTS - half)):
        rows = [f"{i},{e},{table[i, e]}" for i in range(3) for e in range(8) if table[i, e]]
        name = f"expert_distribution_rank{rank}_timestamp17.csv"
        (folder / name).write_text("layer_id,expert_id,count\n" + "\n".join(rows))
    found = read_traffic(folder, SMALL)
    np.testing.assert_array_equal(found.expert_counts, COUNTS)
    assert "2 files are added up" in found.notes
    own = tmp_path / "own"  # each rank names its own experts
    own.mkdir()
    for rank in range(2):
        experts = range(4 * rank, 4 * rank + 4)
        rows = [f"{i},{','.join(str(COUNTS[i, e]) for e in experts)}" for i in range(3)]
        (own / f"{rank}.csv").write_text(f"layer,{','.join(f'e{e}' for e in experts)}\n" + "\n".join(rows))
    np.testing.assert_array_equal(read_traffic(own, SMALL).expert_counts, COUNTS)
    (folder / "other.csv").write_text("layer,e0,e1,e2\n0,1,2,3\n")
    with pytest.raises(InputError, match="mixed models in one folder"):
        read_traffic(folder)


# TensorRT-LLM's EXPERT_STATISTIC_PATH


@pytest.fixture
def statistics(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is an optional extra")
    folder = tmp_path / "expert_statistic"
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": 8, "num_experts_per_token": 2}))
    loads = RNG.integers(0, 99, (2, 3, 2, 8))  # ranks, iterations, layers, experts
    for rank in range(2):
        arrays = {f"{50 + i}_{layer}": loads[rank, i, k] for i in range(3) for k, layer in enumerate((3, 60))}
        safetensors.save_file(arrays, folder / f"rank{rank}.safetensors")
        safetensors.save_file({"x": loads[rank, 0]}, folder / f"rank{rank}_raw.safetensors")
    return folder, loads


def test_expert_statistics_are_added_up_over_ranks(statistics):
    folder, loads = statistics
    found = read_traffic(folder)
    assert isinstance(found, LoadCounts)
    np.testing.assert_array_equal(found.counts, loads.sum(axis=0))
    assert found.layer_ids.tolist() == [3, 60]
    assert found.n_steps == 3
    with pytest.raises(InputError, match="has 2 experts per token, model m has top_k 4"):
        read_traffic(folder, ModelSpec("m", 8, 4))
    with pytest.raises(InputError, match="counts of 8 experts, model m has 16: another model"):
        read_traffic(folder, ModelSpec("m", 16, 2))
    with pytest.raises(InputError, match="give the folder"):
        read_traffic(folder / "rank0.safetensors")
    (folder / "rank1.safetensors").rename(folder / "rank2.safetensors")
    assert any("up to rank2.safetensors there are 2" in note for note in read_traffic(folder).notes)


def test_bad_statistics_are_refused(statistics):
    from safetensors.numpy import save_file

    folder, loads = statistics
    for arrays, message in (
        ({"x": loads[0, 0, 0]}, "no iteration_layer"),
        ({"1_2": loads[0, 0]}, "meta_info.json says 8 experts"),
        ({"1_2": loads[0, 0, 0][:5]}, "meta_info.json says 8 experts"),
        ({"1_2": -loads[0, 0, 0] - 1}, "must not be negative"),
    ):
        save_file(arrays, folder / "rank1.safetensors")
        with pytest.raises(InputError, match=message):
            read_traffic(folder)
    (folder / "rank1.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"no.* sound \.safetensors"):
        read_traffic(folder)
    (folder / "meta_info.json").unlink()
    with pytest.raises(InputError, match=r"meta_info\.json"):
        read_traffic(folder)
