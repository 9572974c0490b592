"""Coverage of the 95 % intervals where it is not plain: `python tests/interval_coverage.py [CASE ...] [--seeds N]`. Not a test.
In few minutes: `hold-out-40 --seeds 40`.

Each case runs many seeds of a tiny model and counts how often the interval holds the truth, which is the mean over a run far
longer than any of them. Prints one row per case, look and quantity: runs, share that holds the truth, and the standard error
of that share. Seeds are fixed, so the table is the same every time.
"""

import argparse
import sys
from collections import defaultdict

import numpy as np
from scipy.stats import binom

from sim.cost import predict_steps
from sim.fit import hold_out
from sim.fit.made import make_traffic
from sim.model import ModelSpec
from sim.sweeps import executors, make_plan, run_plan
from sim.traffic import RecordedTraffic, SyntheticTraffic

TINY = ModelSpec(
    "tiny", 16, 2, n_moe_layers=4, hidden_size=512, moe_intermediate_size=256, unverified=(), routed_dtype="bf16"
)
CHAT = SyntheticTraffic("chat", popularity="lognormal", sigma=0.65)
DECAYING = SyntheticTraffic(
    "decaying", popularity="lognormal", sigma=0.65, request_sigma=1.0, local_share=0.6, context_tokens=(2.0, 8.0),
    context_shares=(0.5, 0.5), passage_share=0.4, passage_tokens=64.0,
)  # fmt: skip
THRESHOLDS = [1.5, 2.0, 2.5, 3.0, 3.5]
CELL = {"ep_sizes": 4, "tokens": 8, "placements": "linear", "thresholds": THRESHOLDS, "bound_layers": 0}
ONE_THREAD = executors.threads(1)
TRUTH_SEED = 10**6
_BY_CHANCE = 0.001  # of a right interval to be flagged: a run prints some 50 shares, and of 40 seeds 88 % are no sign

STOPPING = {
    "mean": {"precision": 0.012}, "mean-late": {"precision": 0.0045}, "mean-draws-64": {"precision": 0.02, "draws": 64},
    "tail-2-look-2": {"precision_tail": 0.09, "thresholds": [2.0]},
    "tail-2-look-4": {"precision_tail": 0.045, "thresholds": [2.0]},
    "tail-2.5-look-2": {"precision_tail": 0.29, "thresholds": [2.5]},
    "tail-2.5-look-3": {"precision_tail": 0.205, "thresholds": [2.5]},
    "tail-2.5-look-4": {"precision_tail": 0.145, "thresholds": [2.5]},
    "tail-draws-2000": {"precision_tail": 0.145, "thresholds": [2.5], "draws": 2000},
}  # fmt: skip
RECORDED_LAYERS = (2, 3, 4, 8, 24)
LAYER_SETS = (2, 4, 8, 32)
HELD_SEQUENCES = (40, 200)


def sweep(workload, seed, **options):
    return run_plan(make_plan(TINY, workload, **CELL | options, seed=seed), ONE_THREAD)


def quantities(result):
    """Estimate, low and high of everything that has an interval in a result of one cell."""
    row, found = result.summary.iloc[0], {}
    for name in ("imbalance_mean", "idle_ranks_mean", "imbalance_p50", "imbalance_p95", "imbalance_p99"):
        found[name] = tuple(row[f"{name}{end}"] for end in ("", "_low", "_high"))
    for event in result.tail[result.tail.method == "sampled"].itertuples():
        found[f"P({event.metric} >= {event.threshold:g})"] = (event.probability, event.low, event.high)
    return found


def truth():
    """What the intervals shall hold: fresh layers, many steps."""
    return {name: estimate for name, (estimate, _, _) in quantities(sweep(CHAT, TRUTH_SEED, trials=4_000_000)).items()}


def record(seed, n_layers, n_tokens=2000):
    """Recorded decode traffic of fresh layers, a token a sequence."""
    rng = np.random.default_rng([seed, n_layers])
    mu = 0.65 * rng.standard_normal((n_layers, 1, TINY.n_experts))
    ids = np.argsort(-(mu + rng.gumbel(size=(n_layers, n_tokens, TINY.n_experts))), axis=-1)[..., : TINY.top_k]
    return RecordedTraffic(
        name="record", topk_ids=np.ascontiguousarray(ids, np.int16), starts=np.arange(n_tokens + 1), phase="decode",
        digest=f"{seed}", source="coverage",
    )  # fmt: skip


class Counts:
    """How often intervals hold what they shall."""

    def __init__(self, case):
        self.case, self.held = case, defaultdict(list)

    def add(self, group, found, expected):
        for name, (_, low, high) in found.items():
            if expected.get(name) is not None and not np.isnan(low + high):
                self.held[group, name].append(low <= expected[name] <= high)
                self.held["all", name].append(low <= expected[name] <= high)

    def print(self):
        for (group, name), held in sorted(self.held.items(), key=str):
            share = np.mean(held)
            error = np.sqrt(share * (1 - share) / len(held))
            flag = "  <-- below 95 %" if binom.cdf(sum(held), len(held), 0.95) < _BY_CHANCE else ""
            print(f"{self.case:<18}{group!s:<12}{name:<24}{len(held):>6}{share:>9.1%} ± {error:.1%}{flag}")
        sys.stdout.flush()


def stopping(case, seeds, expected):
    counts = Counts(case)
    for seed in range(seeds):
        result = sweep(CHAT, seed, **STOPPING[case], max_trials=2**17)
        look = int(np.log2(result.summary.trials.iloc[0] / 1024)) + 1
        counts.add(f"look {look}", quantities(result), expected)
    counts.print()


def recorded(n_layers, seeds, expected):
    counts = Counts(f"recorded-{n_layers}")
    for seed in range(seeds):
        counts.add("fixed", quantities(sweep(record(seed, n_layers), seed, trials=40 * n_layers)), expected)
    counts.print()


def steps(layer_sets, seeds):
    counts, tables = Counts(f"step-{layer_sets}"), []
    for seed in range(seeds):
        tables.append(
            predict_steps(
                TINY, CHAT, "h200", placements="linear", dtype="bf16", ep_sizes=4, tokens=8, layer_sets=layer_sets,
                most_steps=4 * layer_sets, seed=seed, threads=1,
            ).set_index("metric")
        )  # fmt: skip
    # The truth is the mean over all seeds, whose own error is small beside one seed's (1 / sqrt(seeds)).
    expected = {name: float(np.mean([table["mean"][name] for table in tables])) for name in tables[0].index}
    for table in tables:
        counts.add("fixed", {row.Index: (row.mean, row.low, row.high) for row in table.itertuples()}, expected)
    counts.print()


def held_out(n_sequences, seeds):
    """Errors of traffic that is as the fit supposes: the interval shall hold 0. 2000 blocks of sequences of 256 tokens, so that
    a seed takes about 5 s.
    """
    counts = Counts(f"hold-out-{n_sequences}")
    sys.modules["sim.fit.hold_out"]._ALL_BLOCKS = 2000
    for seed in range(seeds):
        found = hold_out(TINY, make_traffic(DECAYING, TINY, 256 * n_sequences, n_sequences, seed), seed=seed, threads=1)
        for row in found[1]:
            if row.figure == "imbalance":
                name = f"{row.phase}, EP {row.ep_size}, {row.statistic}"
                counts.add(f"{row.tokens} tokens", {name: row.error}, {name: 0.0})
    counts.print()


def main():
    cases = [*STOPPING, *(f"recorded-{n}" for n in RECORDED_LAYERS), *(f"step-{n}" for n in LAYER_SETS)]
    cases += [f"hold-out-{n}" for n in HELD_SEQUENCES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=cases, metavar="CASE", help=", ".join(cases))
    parser.add_argument("--seeds", type=int, default=500)
    given = parser.parse_args()
    if all(case.startswith("hold-out-") for case in given.cases):
        expected = {}
    else:
        expected = truth()
        print({name: float(f"{value:.5g}") for name, value in expected.items()})
    for case in given.cases:
        if case.startswith("hold-out-"):
            held_out(int(case.rpartition("-")[2]), given.seeds)
        elif case in STOPPING:
            stopping(case, given.seeds, expected)
        elif case.startswith("recorded-"):
            recorded(int(case.partition("-")[2]), given.seeds, expected)
        else:
            steps(int(case.partition("-")[2]), given.seeds)


if __name__ == "__main__":
    main()
