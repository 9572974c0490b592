"""Claims about load: groups that a token cannot use, what one rank can hold, waiting, the remainder, strided routing."""

from dataclasses import replace
from typing import Any

import numpy as np

from sim.model import ModelSpec, load_model
from sim.placement import place
from sim.results import SweepResult
from sim.router import draw_trials
from sim.sweeps import sweep
from sim.theory import UniformLayer, UniformRouter
from sim.traffic.synthetic import X0
from sim.verdicts.verdict import DOES_NOT_FOLLOW, HOLDS, HOLDS_ONLY, Conditions, Estimate, Finding, ranges_text

_TOKENS = 100_000
_SMALL_SIZES = [2, 4, 8, 16, 32]
_SIZES = [2, 4, 8, 16, 32, 64, 128, 256]
_STEPS = [1, 8, 64, 512, 4096]


def _swept(conditions: Conditions, placements: list[str], ep_sizes: Any, tokens: Any, trials: int) -> SweepResult:
    """DeepSeek-V3 under the chosen traffic, sampled alone."""
    return sweep(
        "deepseek-v3", conditions.workload, ep_sizes=ep_sizes, tokens=tokens, placements=placements,
        trials=conditions.scaled(trials), seed=conditions.seed, bound_layers=0, threads=conditions.threads,
    )  # fmt: skip


def _exactly(value: float) -> Estimate:
    return float(value), float(value), float(value)


def groups_unused(conditions: Conditions) -> Finding:
    """Groups without a chosen expert, of routed tokens."""
    model = load_model("deepseek-v3")
    draws, per_draw = 1_000, _TOKENS // 1_000
    workload = replace(conditions.workload, dummy_tokens=0)
    steps = np.array([per_draw], np.int64)
    _, ids = draw_trials(model, workload, conditions.seed, range(draws), draws, steps, n_ids=per_draw)
    group = ids.reshape(-1, model.top_k) // model.group_size
    used = np.array([len(set(token)) for token in group.tolist()])
    unused = model.n_group - used
    least = model.n_group - model.topk_group
    more = float(np.mean(unused > least))
    return Finding(
        f"at least {unused.min()} of {model.n_group} groups unused in {_TOKENS:,} routed tokens; more in {100 * more:.1f} %",
        _exactly(unused.min()),
        "groups without a chosen expert",
        HOLDS if unused.min() >= 4 else DOES_NOT_FOLLOW,
        f"The router keeps {model.topk_group} of {model.n_group} groups for each token, so {least} are out by its rule, "
        "whatever the traffic; other tokens of the same step use other groups.",
    )


def most_on_a_rank(model: ModelSpec, ranks: np.ndarray) -> int:
    """Most experts that one token can have on one rank: what the fullest rank holds of any topk_group groups."""
    held = np.zeros((ranks.max() + 1, model.n_group), np.int64)
    np.add.at(held, (ranks, np.arange(model.n_experts) // model.group_size), 1)
    best = np.sort(held, axis=1)[:, -model.topk_group :].sum(axis=1)
    return int(min(best.max(), model.top_k))


def _on_one_rank(model: ModelSpec, strategy: str, ep_size: int, n_tokens: int = 1) -> float:
    """P(all experts of a step's tokens on one rank) under uniform traffic, exact."""
    ranks = place(strategy, model, ep_size).rank_of_expert
    router = UniformRouter.of(model, X0)
    assert router is not None
    low, high = UniformLayer(router, ranks).one_rank(n_tokens)
    return (low + high) / 2


def one_rank(conditions: Conditions) -> Finding:
    """Whether one rank can have all experts of a token, under linear and round_robin, and how often at EP 8."""
    model = load_model("deepseek-v3")
    sizes = range(2, model.n_experts + 1)
    can = {
        name: np.array(
            [most_on_a_rank(model, place(name, model, size).rank_of_expert) == model.top_k for size in sizes]
        )
        for name in ("linear", "round_robin")
    }
    first = int(sizes[int(np.flatnonzero(can["round_robin"])[-1]) + 1])
    last_linear = int(sizes[int(np.flatnonzero(can["linear"])[-1])])
    p = {name: _on_one_rank(model, name, 8) for name in can}
    step = [_on_one_rank(model, name, 8, 8) for name in can]
    removed = not can["round_robin"].any()
    return Finding(
        f"EP 8: {p['linear']:.2g} of tokens under linear, {p['round_robin']:.2g} under round_robin (exact, uniform traffic)",
        _exactly(p["round_robin"]),
        "P(all experts of one token on one rank), EP 8",
        HOLDS if removed else f"{HOLDS_ONLY} EP is {first} or more",
        f"Linear can put a whole token on one rank up to EP {last_linear}; round_robin still can below EP {first}, "
        f"{p['linear'] / p['round_robin']:.1f} times less often at EP 8. A step of 8 tokens on one rank of 8: "
        f"{step[0]:.0e} under linear, {step[1]:.0e} under round_robin.",
    )


def fewer_gpus_unlucky(conditions: Conditions) -> Finding:
    """P(one token on one rank) by EP size, exact under uniform traffic and sampled under the chosen one."""
    model = load_model("deepseek-v3")
    p = {name: [_on_one_rank(model, name, size) for size in _SMALL_SIZES] for name in ("linear", "round_robin")}
    possible = [value > 0 for value in p["round_robin"]]
    falls = all(a > b or a == 0 for a, b in zip(p["round_robin"], p["round_robin"][1:], strict=False))
    below = [new < old for old, new in zip(p["linear"], p["round_robin"], strict=True)]
    seen = _swept(conditions, ["linear", "round_robin"], [2, 4], 1, 40_000).tail
    seen = seen[(seen.metric == "one_rank") & (seen.method == "sampled")].set_index(["placement", "ep_size"])
    two = {name: seen.loc[(name, 2)] for name in p}
    less_seen = two["round_robin"].high < two["linear"].low
    listed = ", ".join(
        f"EP {size} {old:.1g} > {new:.1g}"
        for size, old, new in zip(_SMALL_SIZES, p["linear"], p["round_robin"], strict=True)
    )
    stays = ranges_text(_SMALL_SIZES, possible, " ranks")
    if falls and all(below) and less_seen:
        verdict = HOLDS if all(possible) else f"{HOLDS_ONLY} there are {stays}: with more it is impossible"
    else:
        verdict = DOES_NOT_FOLLOW
    return Finding(
        f"linear > round_robin: {listed} (exact, uniform traffic)",
        _exactly(p["round_robin"][2]),
        "P(all experts of one token on one rank), EP 8",
        verdict,
        f"Possible under round_robin on {stays}, likelier on fewer, and less likely than under linear on all of them. "
        f"{conditions.workload.name} traffic, EP 2, sampled: {two['linear'].probability:.4f} "
        f"({two['linear'].low:.4f} to {two['linear'].high:.4f}) under linear, {two['round_robin'].probability:.4f} "
        f"({two['round_robin'].low:.4f} to {two['round_robin'].high:.4f}) under round_robin.",
    )


def less_waiting(conditions: Conditions) -> Finding:
    """Change of the mean imbalance, paired, in every cell; a cell counts where its 95 % interval lies below 0."""
    summary = _swept(conditions, ["linear", "round_robin"], _SIZES, _STEPS, 4000).summary
    rows, base = (
        summary[summary.placement == name].set_index(["ep_size", "tokens"]) for name in ("round_robin", "linear")
    )
    less, more = rows.imbalance_change_mean_high < 0, rows.imbalance_change_mean_low > 0
    at, was = rows.loc[(8, 64)], base.loc[(8, 64)]
    half = at.imbalance_change_mean_high - at.imbalance_change_mean
    everywhere = [bool(less.loc[size].all()) for size in _SIZES]
    if any(everywhere):
        verdict = HOLDS if all(everywhere) else f"{HOLDS_ONLY} EP is {ranges_text(_SIZES, everywhere, '')}"
    elif less.any():
        cells = ", ".join(f"EP {size} at {tokens}" for size, tokens in less[less].index)
        verdict = f"{HOLDS_ONLY} {less.sum()} of {less.size} cells of the grid are meant ({cells:.60})"
    else:
        verdict = DOES_NOT_FOLLOW
    return Finding(
        f"EP 8, 64 tokens: mean imbalance {was.imbalance_mean:.3f}, {at.imbalance_change_mean:+.3f} ± {half:.3f} "
        "under round_robin",
        (at.imbalance_change_mean, at.imbalance_change_mean_low, at.imbalance_change_mean_high),
        "change of the mean imbalance, EP 8, 64 tokens",
        verdict,
        f"At EP 8 a group is a rank under linear, so a token's 8 experts lie on at most 4 ranks, {was.ranks_per_token_mean:.2f} "
        f"on average; round_robin spreads them over {at.ranks_per_token_mean:.2f}, and the load with them. "
        f"The mean imbalance falls in {less.sum()} and rises in {more.sum()} of {less.size} cells (EP {_SIZES[0]} to "
        f"{_SIZES[-1]}, {_STEPS[0]} to {_STEPS[-1]} tokens), the others do not differ by their 95 % intervals; at EP 8 and 64 "
        f"tokens the other ranks wait {100 * (1 - was.balancedness_mean):.0f} % of the time under linear, "
        f"{100 * (1 - at.balancedness_mean):.0f} % under round_robin.",
    )


def last_rank(conditions: Conditions) -> Finding:
    """Experts of the last rank under the old placement, and the mean imbalance at EP 24."""
    model = load_model("deepseek-v3")
    sizes = [size for size in range(2, 65) if model.n_experts % size]
    over = {}
    for size in sizes:
        old, new = (np.bincount(place(name, model, size).rank_of_expert) for name in ("linear_legacy", "linear"))
        over[size] = (old[-1], new.max())
    worse = [old > new for old, new in over.values()]
    equal = [size for size, is_worse in zip(sizes, worse, strict=True) if not is_worse]
    rows = _swept(conditions, ["linear", "linear_legacy"], 24, 64, 4000).summary.set_index("placement")
    new, old = rows.loc["linear"], rows.loc["linear_legacy"]
    mended = old.imbalance_change_mean_low > 0
    if mended and any(worse):
        verdict = (
            HOLDS if all(worse) else f"{HOLDS_ONLY} the remainder is above 1 (not at EP {', '.join(map(str, equal))})"
        )
    else:
        verdict = DOES_NOT_FOLLOW
    return Finding(
        f"EP 24: last rank {over[24][0]} of 256 experts, {over[24][0] * 24 / 256:.2f} times the mean, against at most "
        f"{over[24][1]}; imbalance {old.imbalance_mean:.2f} against {new.imbalance_mean:.2f} at 64 tokens "
        f"({old.imbalance_change_mean:+.2f} ± {old.imbalance_change_mean_high - old.imbalance_change_mean:.2f})",
        (old.imbalance_change_mean, old.imbalance_change_mean_low, old.imbalance_change_mean_high),
        "mean imbalance that linear_legacy adds to linear, EP 24, 64 tokens",
        verdict,
        f"Of the EP sizes up to 64 that do not divide 256, the last rank holds more than linear's fullest in {sum(worse)} of "
        f"{len(worse)}: where the remainder is 1, both have one rank with one expert more.",
    )


def strided_loads(n_tokens: int, ep_size: int, layer: int = 0, n_experts: int = 256, top_k: int = 8) -> np.ndarray:
    """Loads of ranks under SGLang's simulated round-robin routing and linear placement, int64 [ranks].

    Expert (token + layer + j * (n_experts // top_k)) % n_experts: SGLang PR #29718.
    """
    token, j = np.arange(n_tokens)[:, None], np.arange(top_k)
    experts = (token + layer + j * (n_experts // top_k)) % n_experts
    return np.bincount((experts * ep_size // n_experts).reshape(-1), minlength=ep_size)


def assigned_loads(n_tokens: int, ep_size: int, top_k: int = 8) -> np.ndarray:
    """The same with pairs assigned to ranks in turn (SGLang PR #37741), int64 [ranks]."""
    return np.bincount(np.arange(n_tokens * top_k) % ep_size, minlength=ep_size)


def idle_half(conditions: Conditions) -> Finding:
    """The loads of the PR's example, and the batches for which odd ranks are idle."""
    before, after, shifted = strided_loads(8, 16), assigned_loads(8, 16), strided_loads(8, 16, layer=16)
    batches = list(range(1, 33))
    odd_idle = [not strided_loads(n, 16)[1::2].any() for n in batches]
    as_printed = before.tolist() == [8, 0] * 8 and after.tolist() == [4] * 16
    below_32 = all(odd_idle[:31])
    last = batches[odd_idle.index(False) - 1] if not all(odd_idle) else 32
    idle_at = {n: int((strided_loads(n, 16) == 0).sum()) for n in (last, last + 1)}
    verdict = (
        DOES_NOT_FOLLOW if not as_printed else HOLDS if below_32 else f"{HOLDS_ONLY} a batch has at most {last} tokens"
    )
    return Finding(
        f"8 tokens: {' '.join(map(str, before[:4]))} ... before, {' '.join(map(str, after[:4]))} ... after",
        _exactly((before == 0).sum()),
        "idle ranks of 16, 8 tokens",
        verdict,
        f"The example {'comes' if as_printed else 'does not come'} out to the digit. From {last + 1} tokens on the routing "
        f"reaches the odd ranks: {idle_at[last]} ranks are idle with {last} tokens, {idle_at[last + 1]} with {last + 1}. The "
        f"layer's number shifts the experts: in layer 16, {int((shifted[::2] == 0).sum())} even and "
        f"{int((shifted[1::2] == 0).sum())} odd ranks are idle.",
    )
