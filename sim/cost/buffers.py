"""Loads -> buffers: the smallest capacity that is exceeded with at most a given probability, and what it costs in memory."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.cost.deployments import QUANTITIES, Deployments, of_step, sample_deployments
from sim.cost.inputs import expert_width
from sim.errors import InputError
from sim.kernels import usable_processors
from sim.model import ModelSpec, load_model
from sim.options import CapacityOptions
from sim.options.declare import takes
from sim.placement import BUDGET, check_slots, is_load_aware, split_name, strategy_name
from sim.stats import Histogram, mean_interval, moments_of_draws, quantile_interval, student_quantile
from sim.sweeps import make_plan, sweep
from sim.sweeps.plan import Plan
from sim.traffic import RecordedTraffic, SyntheticTraffic, Workload, load_workload

DEEPEP_LIMIT_BYTES = 32 * 2**30
"""Of DeepEP's low-latency buffer on a rank (csrc/config.hpp; vllm #57894)."""
SAMPLED_TOKENS = 2**27
"""Of each cell at most, where tokens are not independent."""
_CURVE_POINTS, _DEEPEST, _DEEPEST_CURVE = 32, 1e-12, 1e-9
_QUANTILES = {"median": 0.5, "worst_5_percent": 0.95}
_EXCHANGES = {"received": ("token",), "pairs": ("pair", "workspace"), "expert_rows": ("deepep_low_latency",)}


class Capacities(NamedTuple):
    """Outcome of `size_buffers`."""

    table: pd.DataFrame
    curves: pd.DataFrame  # largest step: placement, ep_size, tokens, quantity, scope, deployments, factor, probability
    notes: list[str]  # cells that were left out, and why


@takes(CapacityOptions)
def capacity(model: str | Path | ModelSpec, workload: str | Path | Workload, **options: Any) -> pd.DataFrame:
    """How much room received tokens, rows of a rank and rows of an expert need, so that it is exceeded rarely enough.

    A deployment has its layers, drawn once, or known from fitted or recorded traffic; given them, tokens, layers and steps are
    taken as independent (`sim.cost.deployments`). Where tokens are not (prefill, dummy tokens), there are rows of one layer of
    one step alone, from sampled steps, and none of 'expert_rows'.

    Parameters
    ----------
    model, workload : str, Path, ModelSpec, Workload
        As in `sim.sweep`.
    **options

    Returns
    -------
    DataFrame
        One row per cell, quantity, exchange, scope and deployments. `quantity`: 'received' (distinct tokens on a rank), 'pairs'
        (rows of a rank), 'expert_rows' (rows of a physical expert). `scope`: any rank of one 'layer' of one step, of any layer
        of a 'step', of any layer of any step of the 'horizon'. `deployments`: 'all' (layers drawn afresh), 'median' and
        'worst_5_percent' (as much as 95 % of deployments need). `capacity_tokens` is the smallest that is exceeded with a
        probability of at most `risk`, between `capacity_low` and `capacity_high` with 95 % confidence; `factor` is it over
        `balanced_tokens`, the mean over ranks (experts). `bytes` on a rank. `dropped_share`: of all that is sent, what lies
        beyond the capacity. With `capacity_factor` there are further rows, whose `risk` is what that factor has.

    Raises
    ------
    InputError
        Values out of range, sizes or the number of MoE layers of the model that are not known, or a horizon for traffic whose
        tokens are not independent given the layer.

    Examples
    --------
    >>> import sim
    >>> table = sim.capacity("deepseek-v3", "uniform", ep_sizes=8, tokens=1024, placements="linear", deployments=2)
    >>> step = table[(table.quantity == "received") & (table.scope == "step") & (table.deployments == "median")]
    >>> int(step.worst_case_tokens.iloc[0]), bool(step.factor.between(1.05, 1.25).all())
    (1024, True)
    """
    return size_buffers(model, workload, **options).table


def size_buffers(
    model: str | Path | ModelSpec, workload: str | Path | Workload, *, curves: bool = False, **options: Any
) -> Capacities:
    """As `capacity`, with the curves P(exceed) against factor where they are asked for."""
    chosen = CapacityOptions(**options)
    model = load_model(model)
    workload = workload if isinstance(workload, Workload) else load_workload(workload, model)
    groups, notes = _that_fit(model, chosen)
    plans = [_plan(model, workload, chosen, sizes, placements) for sizes, placements in groups]
    n_layers = plans[0].workload.n_layers or model.n_moe_layers
    if not n_layers:
        raise InputError(f"model {model.name}: a deployment needs the number of MoE layers, which is not known")
    chosen.check_layers(n_layers)
    buffer_bytes(model, "workspace", 1, 1, 1)  # whether its sizes are known, before the work
    if reason := _dependent(plans[0].workload):
        if chosen.horizon_steps or chosen.layer_correlation:
            what = "a horizon" if chosen.horizon_steps else "`layer_correlation`"
            raise InputError(f"{what}: {reason}, and only capacities of one layer of one step can be sampled")
        notes.append(f"{reason}: sampled, of one layer of one step; steps and horizons lie beyond sampling")
        sampled = pd.concat([_sample(plan, chosen, notes) for plan in plans], ignore_index=True)
        return Capacities(sampled, pd.DataFrame(), list(dict.fromkeys(notes)))
    parts = [_size(plan, chosen, n_layers, curves) for plan in plans]
    table, points = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
    return Capacities(table, points, notes)


def _that_fit(model: ModelSpec, chosen: CapacityOptions) -> tuple[list[tuple[list[int], list[Any]]], list[str]]:
    """EP sizes with the placements whose slots they divide, and which do not fit.

    Raises InputError where no placement fits an EP size.
    """
    several = isinstance(chosen.placements, list | tuple)
    names = list(chosen.placements) if several else [chosen.placements]
    groups: dict[tuple[int, ...], list[int]] = {}
    notes: list[str] = []
    own = [strategy_name(name, "placements") if isinstance(name, str) else None for name in names]
    for size in chosen.ep_sizes:
        fitting, problems = [], []
        for i, name in enumerate(own):
            try:
                if name is not None:
                    check_slots(name, model, size)
                fitting.append(i)
            except InputError as error:
                problems.append(error)
        if not fitting:
            raise problems[0]
        notes += [f"left out: {str(error).replace('`', '')}" for error in problems]
        groups.setdefault(tuple(fitting), []).append(size)
    if not several:
        return [(chosen.ep_sizes, chosen.placements)], notes
    return [(sizes, [names[i] for i in fitting]) for fitting, sizes in groups.items()], notes


def _plan(
    model: ModelSpec, workload: Workload, chosen: CapacityOptions, ep_sizes: list[int], placements: list[Any]
) -> Plan:
    names = ("tokens", "tokens_per_rank", "ranks_per_node", "seed", "fit_tokens", "fit_on")
    of_plan = {name: getattr(chosen, name) for name in names}
    plan = make_plan(
        model, workload, ep_sizes=ep_sizes, placements=placements, trials=1, bound_layers=0, received="off", **of_plan
    )
    for name in plan.grid.placements:
        if split_name(name)[0] == BUDGET:
            raise InputError(
                f"`placements` {name}: its layers differ in slots; buffers are sized for one number of them"
            )
    return plan


def _dependent(workload: Workload) -> str:
    """Why tokens are not independent given the layer; empty where they are."""
    if isinstance(workload, RecordedTraffic) and workload.phase == "prefill":
        return "recorded prefill takes runs of tokens of one sequence, which are not independent"
    if workload.whole_requests or (isinstance(workload, SyntheticTraffic) and workload.request_sigma > 0):
        return "the tokens of a request are not independent"
    return "dummy tokens are identical, not independent" if workload.dummy_tokens else ""


def _slots(plan: Plan, pair: int) -> int:
    """Slots of a layer under a placement at an EP size."""
    placement = plan.placements[pair]
    return plan.model.n_experts + split_name(plan.grid.pairs[pair][0])[1] if placement is None else placement.n_slots


def _size(plan: Plan, chosen: CapacityOptions, n_layers: int, curves: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table and curves of a plan."""
    n_deployments = 1 if plan.workload.n_layers else chosen.deployments
    n_threads = chosen.threads or usable_processors()
    found = sample_deployments(plan, n_layers, n_deployments, n_threads)
    jobs = [(cell, quantity) for cell in range(len(plan.grid.cells)) for quantity in QUANTITIES]
    sizes, steps = plan.grid.ep_size_of_cell, plan.grid.tokens_of_cell
    drawn = [(cell, of) for cell, of in jobs if curves and steps[cell] == steps[sizes == sizes[cell]].max()]
    with ThreadPoolExecutor(n_threads) as pool:
        rows = list(pool.map(lambda job: _rows(plan, chosen, found, *job), jobs))
        points = list(pool.map(lambda job: _curves(plan, chosen, found, *job), drawn))
    return pd.DataFrame([row for of_job in rows for row in of_job]), pd.DataFrame(
        [row for of_job in points for row in of_job]
    )


def _sample(plan: Plan, chosen: CapacityOptions, notes: list[str]) -> pd.DataFrame:
    """Table of traffic whose tokens are not independent: the largest of a rank in sampled layers and steps.

    Rows of one layer of one step alone, with order-statistic intervals and without `dropped_share`. Received tokens are left
    out where a sweep cannot count them, rows of an expert always.
    """
    least = math.ceil(math.log(0.025) / math.log1p(-chosen.risk))  # an upper end of the interval needs as many
    rows: list[dict[str, object]] = []
    short = ""
    for cell in range(len(plan.grid.cells)):
        pair, tokens = plan.grid.cells[cell][0], int(plan.grid.tokens_of_cell[cell])
        placement, ep_size = plan.grid.pairs[pair]
        fitted = plan.fit_tokens if plan.placements[pair] is None and is_load_aware(placement) else 0
        n_steps = min(4 * least, SAMPLED_TOKENS // (tokens + fitted))
        if least > n_steps:
            text = f"`risk` {chosen.risk:g} takes {least} steps of {tokens} tokens under {placement}, and {n_steps} are sampled"
            short = short or text
            notes.append(f"left out: {text}".replace("`", ""))
            continue
        swept = sweep(
            plan.model, plan.workload, ep_sizes=[ep_size], tokens=[tokens], bound_layers=0, seed=plan.seed,
            placements=placement if plan.placements[pair] is None else plan.placements[pair], threads=chosen.threads,
            trials=n_steps, ranks_per_node=plan.ranks_per_node, fit_tokens=fitted or None,
        )  # fmt: skip
        summary = swept.summary.iloc[0]
        for quantity, metric, mean in (
            ("received", "received_tokens_max", summary.get("received_tokens_mean", np.nan)),
            ("pairs", "max_load", summary.mean_load),
        ):
            counts = swept.counts[swept.counts.metric == metric].sort_values("value")
            if not len(counts):
                notes.append("received tokens are left out: they are not counted for this traffic")
                continue
            found = Histogram(counts["value"].to_numpy(), counts["count"].to_numpy())
            n = int(found.counts.sum())
            solved = [("layer", chosen.risk, "all", *quantile_interval(found, 1 - chosen.risk, n))]
            if chosen.capacity_factor is not None:
                given = int(chosen.capacity_factor * mean)
                above = float(found.counts[found.values > given].sum() / n)
                solved.append(("layer", above, "all", given, given, given))
            rows += _as_rows(plan, cell, quantity, mean, solved, lambda _: np.nan)
    notes.append("rows of an expert are left out: their capacity is known for independent tokens")
    if not rows:
        raise InputError(short)
    return pd.DataFrame(rows)


def buffer_bytes(model: ModelSpec, exchange: str, rows: float, ep_size: int, n_slots: int) -> float:
    """Bytes on a rank of a buffer that holds `rows`.

    'token', 'pair', 'gather': received hidden states in BF16. 'workspace': vLLM's two of a (token, expert) row,
    2 bytes x (max(I, H) + max(2 I, H)) (vllm #57270). 'deepep_low_latency': DeepEP's static buffer whose
    num_max_dispatch_tokens_per_rank holds as many rows of an expert (csrc/config.hpp).
    """
    hidden, inner = expert_width(model), model.moe_intermediate_size
    if exchange == "workspace":
        if not inner:
            raise InputError(f"model {model.name}: bytes need sizes that are not known: moe_intermediate_size")
        return rows * 2.0 * (max(inner, hidden) + max(2 * inner, hidden))
    if exchange == "deepep_low_latency":
        return deepep_low_latency_bytes(hidden, math.ceil(rows / ep_size), n_slots)
    return rows * 2.0 * hidden


def deepep_low_latency_bytes(hidden: int, tokens_per_rank: int, n_slots: int) -> float:
    """DeepEP's low-latency buffer on each rank, in bytes: `tokens_per_rank` is num_max_dispatch_tokens_per_rank."""
    dispatch = 16 + max(2 * hidden, hidden + 4 * hidden / 128)
    combine = 4 * hidden / 128 + 2 * hidden
    rows = n_slots * tokens_per_rank
    return 2 * (max(tokens_per_rank * dispatch, rows * combine) + max(rows * dispatch, rows * combine) + 4 * n_slots)


def _rows(
    plan: Plan, chosen: CapacityOptions, found: list[dict[str, Deployments]], cell: int, quantity: str
) -> list[dict[str, object]]:
    """Rows of a cell and a quantity."""
    of, tokens = found[plan.grid.cells[cell][0]][quantity], int(plan.grid.tokens_of_cell[cell])
    balanced, worst = tokens * of.mean, worst_case(plan, cell, quantity)
    solved = [("layer", chosen.risk, "all", *_layer_capacity(of, tokens, chosen.risk))]
    horizons = [("step", 1), ("horizon", chosen.horizon_steps)]
    for scope, steps in horizons:
        if steps:
            log_fine = math.log1p(-chosen.risk) / steps
            capacities = np.minimum(of.capacities(tokens, log_fine, chosen.layer_correlation), worst)
            for name, q in _QUANTILES.items():
                solved.append((scope, chosen.risk, name, *_deployment_quantile(of, tokens, capacities, q)))
    if chosen.capacity_factor is not None:
        given = min(int(chosen.capacity_factor * balanced), worst)
        fine = of.log_fine(tokens, given)
        solved.append(("layer", float(np.mean(-np.expm1(fine))), "all", given, given, given))
        for scope, steps in horizons:
            if steps:
                exceeded = -np.expm1(steps * of_step(fine, chosen.layer_correlation))
                for name, q in _QUANTILES.items():
                    solved.append((scope, _share(exceeded, q), name, given, given, given))
    return _as_rows(plan, cell, quantity, balanced, solved, lambda held: of.dropped_share(tokens, held))


def _as_rows(
    plan: Plan, cell: int, quantity: str, balanced: float, solved: list[Any], dropped_beyond: Callable[[int], float]
) -> list[dict[str, object]]:
    """Rows of what is `solved`: scope, risk, deployments, capacity and the ends of its interval."""
    pair, tokens = plan.grid.cells[cell][0], int(plan.grid.tokens_of_cell[cell])
    worst = worst_case(plan, cell, quantity)
    ep_size, n_slots = plan.grid.pairs[pair][1], _slots(plan, pair)
    keys = dict(zip(("model", "workload", "placement"), plan.grid.keys(cell), strict=False))
    dropped: dict[int, float] = {}
    rows: list[dict[str, object]] = []
    for exchange in _EXCHANGES[quantity]:
        for scope, risk, deployments, tokens_held, low, high in solved:
            held = min(int(tokens_held), worst)
            if held not in dropped:
                dropped[held] = dropped_beyond(held) if held < worst else 0.0
            row: dict[str, object] = {**keys, "exchange": exchange, "ep_size": ep_size, "tokens": tokens}
            row |= {"quantity": quantity, "scope": scope, "risk": risk, "deployments": deployments}
            row |= {"balanced_tokens": balanced, "capacity_tokens": held}
            row |= {"capacity_low": min(low, worst), "capacity_high": min(high, worst), "factor": held / balanced}
            row |= {"bytes": buffer_bytes(plan.model, exchange, held, ep_size, n_slots), "worst_case_tokens": worst}
            rows.append(row | {"dropped_share": dropped[held]})
    return rows


def worst_case(plan: Plan, cell: int, quantity: str) -> int:
    """What a rank (an expert) could receive at the very most: every token, and of pairs as many as it has experts."""
    tokens = int(plan.grid.tokens_of_cell[cell]) + plan.grid.dummy_tokens
    if quantity != "pairs":
        return tokens
    return tokens * min(plan.grid.top_k, plan.grid.largest_rank[plan.grid.cells[cell][0]])


def _layer_capacity(of: Deployments, tokens: int, risk: float) -> tuple[int, float, float]:
    """Capacity of one layer of one step, layers drawn afresh, and its 95 % interval over deployments."""
    n_deployments = len(of.base)
    seen: dict[int, tuple[float, float, float]] = {}

    def exceeded(capacity_tokens: int) -> tuple[float, float, float]:
        if capacity_tokens not in seen:
            p = -np.expm1(of.log_fine(tokens, capacity_tokens)).mean(axis=1)
            mean, low, high = mean_interval(*moments_of_draws(p, np.arange(n_deployments)))
            seen[capacity_tokens] = float(mean), float(low), float(high)
        return seen[capacity_tokens]

    def least(side: int, guess: int) -> int:
        low, high, width = -1, tokens * (of.family.laws.shape[1] - 1), max(guess // 64, 1)
        middle = min(guess, high)
        while high - low > 1:
            if exceeded(middle)[side] <= risk:
                high, middle = middle, max(middle - width, (low + middle) // 2)
            else:
                low, middle = middle, min(middle + width, (high + middle) // 2)
            width = 2 * width if low < 0 or high == tokens * (of.family.laws.shape[1] - 1) else high
            middle = min(max(middle, low + 1), high - 1) if width < high else (low + high) // 2
        return high

    value = least(0, int(2 * of.mean * tokens) + 1)
    if n_deployments == 1:
        return value, *_around(of, tokens, value)
    return value, least(1, value), least(2, value)


def _deployment_quantile(of: Deployments, tokens: int, capacities: np.ndarray, q: float) -> tuple[int, float, float]:
    """Capacity that a share q of deployments keeps within, with its 95 % interval."""
    if len(capacities) == 1:
        return int(capacities[0]), *_around(of, tokens, int(capacities[0]))
    value, low, high = quantile_interval(Histogram(*np.unique(capacities, return_counts=True)), q, len(capacities))
    return int(value), low, high


def _share(exceeded: np.ndarray, q: float) -> float:
    """What a share q of deployments has at most."""
    return float(np.quantile(exceeded, q, method="inverted_cdf")) + 0.0  # not -0


def _around(of: Deployments, tokens: int, capacity_tokens: int) -> tuple[float, float]:
    """Of known layers: what is left is the noise of counting the tokens that the rates come from, to first order."""
    half = student_quantile(1e6) * tokens * of.rate_error
    return max(capacity_tokens - half, 0.0), capacity_tokens + half


def _curves(
    plan: Plan, chosen: CapacityOptions, found: list[dict[str, Deployments]], cell: int, quantity: str
) -> list[dict[str, object]]:
    """P(exceed) against the factor, in each scope."""
    pair = plan.grid.cells[cell][0]
    of, tokens = found[pair][quantity], int(plan.grid.tokens_of_cell[cell])
    balanced, worst = tokens * of.mean, worst_case(plan, cell, quantity)
    placement, ep_size = plan.grid.pairs[pair]
    keys = {"placement": placement, "ep_size": ep_size, "tokens": tokens, "quantity": quantity}
    scopes = {"step": 1, "horizon": chosen.horizon_steps or 0}
    ends = [
        np.minimum(of.capacities(tokens, log_fine / max(scopes.values()), chosen.layer_correlation), worst)
        for log_fine in (math.log(0.5), math.log1p(-_DEEPEST_CURVE))
    ]
    edges = [np.quantile(of_end, list(_QUANTILES.values()), method="inverted_cdf") for of_end in ends]
    steep = [np.linspace(start - 1, stop, _CURVE_POINTS // 4) for start, stop in zip(*edges, strict=True)]
    even = np.linspace(balanced, max(min(1.02 * edges[1][1], worst), balanced + 1), _CURVE_POINTS)
    rows: list[dict[str, object]] = []
    for held in np.unique(np.concatenate([even, *steep]).astype(int)):
        fine = of.log_fine(tokens, int(held))
        values = [("layer", "all", float(np.mean(-np.expm1(fine))))]
        for scope, steps in scopes.items():
            if steps:
                exceeded = -np.expm1(steps * of_step(fine, chosen.layer_correlation))
                values += [(scope, name, _share(exceeded, q)) for name, q in _QUANTILES.items()]
        rows += [
            {**keys, "scope": scope, "deployments": name, "factor": held / balanced, "probability": max(p, _DEEPEST)}
            for scope, name, p in values
        ]
    return rows
