"""Claims about time: what the layers would save, and the share of a step that they would need to have."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd

from sim.cost.gain import PERFECT, predict_gain
from sim.errors import counted
from sim.model import load_model
from sim.traffic import SyntheticTraffic
from sim.verdicts.verdict import (
    DOES_NOT_FOLLOW,
    HOLDS,
    HOLDS_ONLY,
    NOT_BY_LOAD,
    Conditions,
    Estimate,
    Finding,
    needed_share,
    percent,
    ranges_text,
    saved_text,
    share_text,
    time_saved,
)

_DECODE = [2**i for i in range(10)]
_PREFILL = [2**i for i in range(10, 15)]
_LITTLE = 0.01
_DUMMIES = [0, 8, 64, 512, 4096]


def _saved_of(row: Any) -> Estimate:
    return float(row.layer_saved), float(row.layer_saved_low), float(row.layer_saved_high)


def _gains(
    conditions: Conditions, model: str, gpu: str, tokens: list[int], workload: SyntheticTraffic, **more: Any
) -> pd.DataFrame:
    """predict_gain with the budget of the conditions: whole layer sets, few where steps are large."""
    budget = int(2**23 * conditions.effort)
    return predict_gain(
        model, workload, gpu, tokens=tokens, seed=conditions.seed, budget_tokens=budget,
        threads=conditions.threads, most_steps=128, **more,
    )  # fmt: skip


def _by_step_size(conditions: Conditions, model: str, dtype: str, exchanges: list[str]) -> pd.DataFrame:
    """round_robin against linear at EP 8 on H20, decode and prefill sizes, under some kinds of exchange."""
    setup: dict[str, Any] = {"ep_sizes": 8, "dtype": dtype, "exchange": exchanges}
    return pd.concat(
        [
            _gains(conditions, model, "h20", _DECODE, conditions.workload, **setup),
            _gains(conditions, model, "h20", _PREFILL, conditions.prefill, **setup),
        ],
        ignore_index=True,
    )


def _verdict(
    conditions: Conditions, shares: np.ndarray, saved: np.ndarray, cases: Callable[[list[bool]], str]
) -> tuple[str, str]:
    """Verdict over the cases that a set-up leaves open, and a remark where an interval leaves it open.

    `shares` are the needed shares, `saved` the saved ones, float64 [cases, 3]; `cases` names those that fit.
    """
    fits = shares[:, 0] <= conditions.plausible_share
    open_cases = (shares[:, 1] <= conditions.plausible_share) & (conditions.plausible_share < shares[:, 2])
    remark = f" The intervals leave it open where {cases(open_cases.tolist())}." if open_cases.any() else ""
    if fits.all():
        return HOLDS, remark
    if fits.any():
        return f"{HOLDS_ONLY} {cases(fits.tolist())}", remark
    return (DOES_NOT_FOLLOW if (saved[:, 2] <= 0).all() else NOT_BY_LOAD), remark


def _of_sizes(conditions: Conditions, gains: pd.DataFrame, run: list[str], claimed: float, note: str) -> Finding:
    """Finding over all step sizes: `run` are the kinds of exchange under which the engine runs the placement, so the verdict is
    over them; the others in `gains` are what it would be.
    """
    tried = gains[gains.exchange.isin(run)].reset_index(drop=True)
    saved = [_saved_of(row) for row in tried.itertuples()]
    shares = np.array([needed_share(claimed, of_row) for of_row in saved])

    def cases(fits: list[bool]) -> str:
        texts = []
        for kind in run:
            mine = (tried.exchange == kind).to_numpy()
            chosen = np.array(fits)[mine].tolist()
            if any(chosen):
                where = f"the exchange is {kind} and " if len(run) > 1 else ""
                texts.append(f"{where}a step has {ranges_text(tried.tokens[mine].tolist(), chosen)}")
        return "; or ".join(texts)

    verdict, remark = _verdict(conditions, shares, np.array(saved), cases)
    best = int(np.argmin(shares[:, 0]))
    row = tried.iloc[best]
    first = tried[tried.exchange == run[0]]
    little = ranges_text(first.tokens.tolist(), (first.layer_saved < _LITTLE).tolist())
    texts = []
    for kind, rows in gains.groupby("exchange", sort=False):
        at = rows.set_index("tokens").layer_saved
        texts.append(f"{kind} " + ", ".join(f"{percent(at[tokens])} at {tokens}" for tokens in (1, 8, 64, 512, 16384)))
    at_64 = needed_share(claimed, _saved_of(first[first.tokens == 64].iloc[0]))[0]
    return Finding(
        f"layer time saved, by exchange and tokens: {'; '.join(texts)}",
        _saved_of(row),
        f"share of the layer's time that is saved, {row.exchange}, {counted(row.tokens, 'token')}",
        verdict,
        f"A step must save {percent(claimed)}, so experts and exchange must take {share_text(shares[best, 0])} of it at "
        f"{counted(row.tokens, 'token')} under {row.exchange}, where most is saved, and {share_text(at_64)} at 64 under "
        f"{run[0]}; up to {percent(conditions.plausible_share, 0)} is taken as plausible. "
        + (f"Under {run[0]} less than {percent(_LITTLE, 0)} is saved at {little}. " if little else "")
        + note
        + remark,
        needed_share(claimed, saved[best]),
    )


def qpm_8(conditions: Conditions, published: dict[str, float]) -> Finding:
    """round_robin at EP 8 on H20 for every step size and kind of exchange.

    vLLM runs round_robin without data parallelism (reduce), or with it on a backend that is `pair`; else it runs linear.
    """
    claimed = time_saved(published["throughput_gain"])
    gains = _by_step_size(conditions, "deepseek-r1", "fp8", ["reduce", "pair", "token", "gather"])
    note = "With data parallelism on a backend that is token or gather vLLM runs linear, and nothing changes."
    return _of_sizes(conditions, gains, ["reduce", "pair"], claimed, note)


def eplb_3(conditions: Conditions, published: dict[str, float]) -> Finding:
    """The same for DeepSeek-V2 in BF16 under tensor parallel attention, before the first rebalance."""
    claimed = time_saved(published["throughput_gain"])
    note = "This is until the first rebalance; after it the start does not matter."
    gains = _by_step_size(conditions, "deepseek-v2", "bf16", ["reduce"])
    return _of_sizes(conditions, gains, ["reduce"], claimed, note)


def tput_14_57(conditions: Conditions, published: dict[str, float]) -> Finding:
    """Decode of 8 tokens at EP 16 on H20, with and without dummy tokens of idle ranks."""
    claimed = published["time_saved"]
    setup: dict[str, Any] = {"ep_sizes": 16, "exchange": "pair"}
    saved = {}
    for dummies in _DUMMIES:
        workload = dataclasses.replace(conditions.workload, dummy_tokens=dummies)
        saved[dummies] = _saved_of(_gains(conditions, "deepseek-r1", "h20", [8], workload, **setup).iloc[0])
    shares = np.array([needed_share(claimed, value) for value in saved.values()])
    verdict, remark = _verdict(
        conditions,
        shares,
        np.array(list(saved.values())),
        lambda fits: f"idle ranks run {ranges_text(_DUMMIES, fits, ' dummy tokens')}",
    )
    listed = ", ".join(f"{saved_text(saved[dummies])} with {dummies}" for dummies in _DUMMIES)
    return Finding(
        f"layer time saved: {listed} dummy tokens",
        saved[0],
        "share of the layer's time that is saved, 8 tokens, no dummies",
        verdict,
        f"A step must save {percent(claimed)}; experts and exchange would need {share_text(shares[0, 0])} of it without "
        f"dummy tokens, and at best {share_text(shares[:, 0].min())} with them.{remark}",
        needed_share(claimed, saved[0]),
    )


def _against_linear(
    conditions: Conditions, name: str, workload: SyntheticTraffic, placements: list[str], **setup: Any
) -> list[Estimate]:
    """Shares of the experts' time that placements save over linear, over one step, or some of its layers."""
    model = load_model(name)
    some = dataclasses.replace(model, n_moe_layers=math.ceil(model.n_moe_layers * min(1.0, conditions.effort)))
    gains = predict_gain(
        some, workload, placement=placements, exchange="none", layer_sets=1, most_steps=1, seed=conditions.seed,
        threads=conditions.threads, tokens_per_rank=True, **setup,
    )  # fmt: skip
    return [_saved_of(row) for row in gains.itertuples()]


def _of_setup(
    conditions: Conditions, published: dict[str, float], model: str, placement: str, by: str, **setup: Any
) -> Finding:
    """Finding of a claim of one set-up, prefill: what the step must save, and what a placement saves of the experts' time."""
    (saved,) = _against_linear(conditions, model, conditions.prefill, [placement], **setup)
    claimed = time_saved(published["throughput_gain"])
    share = needed_share(claimed, saved)
    verdict, remark = _verdict(conditions, np.array([share]), np.array([saved]), lambda fits: "this set-up")
    return Finding(
        f"experts' time saved by {by}: {saved_text(saved)}",
        saved,
        "share of the experts' time that is saved",
        verdict,
        f"A step must save {percent(claimed)}, for which routed experts must take {share_text(share[0])} of it.{remark}",
        share,
    )


def balanced_18(conditions: Conditions, published: dict[str, float]) -> Finding:
    """Perfect balance against linear in prefill at EP 32."""
    return _of_setup(conditions, published, "deepseek-v3", PERFECT, PERFECT, gpus="h100", ep_sizes=32, tokens=16384)


def eplb_gains(conditions: Conditions, published: dict[str, float]) -> Finding:
    """EPLB with 32 redundant slots against linear, prefill at EP 32 and decode at EP 72."""
    names, saved, best, share = [], [], [], []
    for phase, workload, ep_size, of_rank in (
        ("prefill", conditions.prefill, 32, 16384),
        ("decode", conditions.workload, 72, 256),
    ):
        of_eplb, of_perfect = _against_linear(
            conditions, "deepseek-v3", workload, ["eplb+32", PERFECT], gpus="h100", ep_sizes=ep_size, tokens=of_rank
        )
        names.append(f"{phase} at EP {ep_size}")
        saved.append(of_eplb)
        best.append(of_perfect)
        share.append(needed_share(time_saved(published[f"{phase}_throughput_gain"]), of_eplb))

    def listed(texts: Iterable[str]) -> str:
        return ", ".join(f"{text} in {name}" for text, name in zip(texts, names, strict=True))

    verdict, remark = _verdict(
        conditions, np.array(share), np.array(saved), lambda fits: f"it is {' or '.join(compress(names, fits))}"
    )
    least = int(np.argmax([row[0] for row in share]))
    needed = listed(f"{share_text(of[0])} of the step" for of in share)
    return Finding(
        f"experts' time saved by EPLB with 32 redundant slots: {listed(map(saved_text, saved))}",
        saved[least],
        f"share of the experts' time that is saved, {names[least]}",
        verdict,
        f"Routed experts would need {needed}; perfect balance would save {listed(map(saved_text, best))}.{remark}",
        share[least],
    )


def rearrange_16_7(conditions: Conditions, published: dict[str, float]) -> Finding:
    """EPLB without redundant slots against linear, prefill at EP 8, DeepSeek-V4-Pro."""
    setup = {"gpus": "b200", "dtype": "fp4", "ep_sizes": 8, "tokens": 8192}
    return _of_setup(conditions, published, "deepseek-v4-pro", "eplb", "EPLB", **setup)
