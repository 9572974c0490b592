"""Speed, measured against a plain numpy pipeline in the same run (`make bench`). Not a test: machines are noisy.

The plain pipeline does the same work on the same law in float32: draws every logit, routes by grouped top-k, counts
experts and scores rank loads, on one core. What is compared is timed in turn, and medians of ratios are reported: by the
clock, and by processor time, which other work on the machine disturbs less (threads then count as running side by side).
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np

from sim import ModelSpec, load_model, load_workload, sweep
from sim.placement import place_balanced
from sim.router import draw_trials
from sim.theory import TailsOfSums, tails
from sim.traffic.synthetic import X0

V3, CHAT = load_model("deepseek-v3"), load_workload("chat")
STEP = 4096
ALL = ["linear", "linear_legacy", "round_robin", "random", "node_aware"]


def plain_pipeline(rng: np.random.Generator, mu: np.ndarray, batch: int) -> float:
    """Imbalance of one step of STEP tokens at EP 32 under linear placement: vectorised numpy, float32, in batches."""
    counts = np.zeros(V3.n_experts, np.int64)
    for _ in range(STEP // batch):
        effect = np.repeat(
            rng.standard_normal((batch, V3.n_group), np.float32) * np.float32(0.4), V3.group_size, axis=1
        )
        noise = -np.log(np.maximum(rng.standard_exponential((batch, V3.n_experts), np.float32), np.float32(1e-30)))
        choice = 1 / (1 + np.exp(-(mu + effect + noise + np.float32(X0))))
        by_group = choice.reshape(batch, V3.n_group, V3.group_size)
        score = np.partition(by_group, V3.group_size - 2, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argpartition(-score, V3.topk_group - 1, axis=1)[:, : V3.topk_group]
        mask = np.zeros((batch, V3.n_group), bool)
        np.put_along_axis(mask, kept, True, axis=1)
        masked = np.where(mask[:, :, None], by_group, np.float32(-np.inf)).reshape(batch, V3.n_experts)
        ids = np.argpartition(-masked, V3.top_k - 1, axis=1)[:, : V3.top_k]
        counts += np.bincount(ids.ravel(), minlength=V3.n_experts)
    loads = counts.reshape(32, -1).sum(axis=1)
    return float(loads.max() / loads.mean())


def our_pipeline(trials: range) -> float:
    """The same figure by the sampler."""
    counts, _ = draw_trials(V3, CHAT, 0, trials, 10**6, np.array([STEP]))
    loads = counts[:, 0].reshape(len(trials), 32, -1).sum(axis=2)
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def both_times(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time of one call, and processor time of all its threads."""
    start = time.process_time()
    wall = seconds(work)
    return wall, time.process_time() - start


def best(work: Callable[[], object], n: int = 3) -> float:
    """Least wall time of n calls."""
    return min(seconds(work) for _ in range(n))


def run(
    n_tokens: int,
    ep_sizes: list[int],
    steps: list[int],
    placements: list[str],
    model: ModelSpec = V3,
    received: str = "off",
    threads: int = 1,
) -> Callable[[], object]:
    """A sweep that samples `n_tokens` tokens, without bounds."""
    return lambda: sweep(
        model, CHAT, ep_sizes=ep_sizes, tokens=steps, placements=placements, trials=n_tokens // steps[-1],
        threads=threads, bound_layers=0, received=received,
    )  # fmt: skip


def compare_with_numpy(rng: np.random.Generator) -> None:
    """One core, and the headline sweep on two threads, against the plain pipeline."""
    mu = (0.65 * rng.standard_normal(V3.n_experts)).astype(np.float32)
    our_pipeline(range(2))
    batch = min((64, 128, 256, 512, 1024, 4096), key=lambda n: best(lambda: plain_pipeline(rng, mu, n)))

    def compare(what: str, work: Callable[[int], object], tokens: int, threads: int, n: int) -> None:
        work(0)
        rows = []
        for i in range(1, n + 1):
            plain_wall, plain_cpu = (
                t / (8 * STEP) for t in both_times(lambda: [plain_pipeline(rng, mu, batch) for _ in range(8)])
            )
            wall, cpu = (t / tokens for t in both_times(lambda i=i: work(i)))
            rows.append((1e-6 / plain_wall, 1e-6 / wall, plain_wall / wall, threads * plain_cpu / cpu))
        plain, ours, by_wall, by_cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"  {what:<44} {ours:6.2f} M tokens/s, numpy {plain:.3f}: {by_wall:4.0f} times by the clock, "
            f"{by_cpu:4.0f} by processor time"
        )

    def issue(i: int, threads: int, bound_layers: int | None, received: str = "off") -> None:
        sweep(
            V3, CHAT, ep_sizes=[8, 16, 32, 64], tokens=STEP, placements=["linear", "round_robin"],
            trials=2000 if i else 100, seed=i, threads=threads, bound_layers=bound_layers,
            received=received,
        )  # fmt: skip

    print(f"\nDeepSeek-V3, chat, against plain numpy on one core in its best batch of {batch} (medians):")
    compare(
        "sampled, routed, counted, scored, one core",
        lambda i: our_pipeline(range(64 * i, 64 * i + 64)),
        64 * STEP,
        1,
        7,
    )
    n_tokens = 2000 * STEP
    compare("sweep, one thread, without bounds", lambda i: issue(i, 1, 0), n_tokens, 1, 3)
    compare("sweep, two threads, without bounds", lambda i: issue(i, 2, 0), n_tokens, 2, 5)
    compare("sweep, two threads, with bounds", lambda i: issue(i, 2, None), n_tokens, 2, 5)
    compare("sweep, two threads, with received tokens", lambda i: issue(i, 2, 0, "on"), n_tokens, 2, 5)
    ratio = statistics.median(
        seconds(lambda i=i: issue(i, 1, 0)) / seconds(lambda i=i: issue(i, 2, 0)) for i in range(1, 6)
    )
    print(f"  the sweep without bounds: two threads {ratio:.2f} times one")
    print("  (the sweep: EP 8, 16, 32, 64, linear and round_robin, 4096 tokens, 2000 trials)")


def sample(n_trials: int) -> float:
    """Wall time of sampling, which runs without Python."""
    return seconds(lambda: our_pipeline(range(n_trials)))


def machine_ceiling() -> float:
    """How much more two processes that share nothing sample than one, in the same time: what two threads cannot beat."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(sample, [8] * 8))  # both are started, and have their kernels
        alone = min(next(pool.map(sample, [256])) for _ in range(5))
        return max(2 * alone / max(pool.map(sample, [256] * 2)) for _ in range(5))


def compare_tails(rng: np.random.Generator) -> None:
    """All thresholds of a law at once against one by one."""
    laws = rng.dirichlet(0.5 ** np.arange(9), 64)
    print("\ntails of 64 laws at 40 thresholds, by multiplying polynomials against one by one:")
    for tokens in (8, 64, 256):
        thresholds = np.linspace(tokens * 2, tokens * 6, 40).astype(int)
        once = best(lambda tokens=tokens, at=thresholds: [*map(partial(TailsOfSums(laws).at, tokens), at)])
        single = best(lambda tokens=tokens, at=thresholds: [tails(laws, tokens, int(x)) for x in at])
        print(f"  {tokens:4d} tokens  {single / once:6.1f} times as fast")


def main() -> None:
    """Print the figures that README quotes."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    rng = np.random.default_rng(0)
    compare_with_numpy(rng)
    compare_tails(rng)

    eps, steps = [8, 16, 32, 64, 72, 128, 144, 256], [2**i for i in range(1, 13)]
    sampling = best(
        lambda: [draw_trials(V3, CHAT, 0, range(i, i + 64), 10**6, np.array(steps)) for i in range(0, 512, 64)]
    )
    print("\na sweep of 8 EP sizes x 4 placements x 12 step sizes, without bounds, to the time of its sampling:")
    for received in ("off", "on"):
        one, two = (
            best(run(512 * STEP, eps, steps, ALL[1:], received=received, threads=threads)) for threads in (1, 2)
        )
        print(
            f"  received tokens {received:<3} {one / sampling:5.2f} times on one thread; two threads "
            f"{512 * STEP / two / 1e6:.1f} M tokens/s in all, {one / two:.2f} times one"
        )
    print(f"  the machine itself: two processes that only sample, and share nothing, {machine_ceiling():.2f} times one")

    loads = np.random.default_rng(0).lognormal(0, 0.65, (64, V3.n_experts))
    print("\nload balancing, one layer of 256 experts, nodes of 8:")
    for name in ("eplb", "eplb+32", "eplb_refined", "eplb_refined+32"):
        for ep_size in (16, 32):
            us = best(lambda name=name, ep_size=ep_size: place_balanced(name, V3, ep_size, 8, loads)) / len(loads) * 1e6
            print(f"  {name:<16} EP {ep_size}  {us:8.0f} us")

    print("\ntime grows with tokens (one cell, EP 32):")
    for tokens in (2**20, 2**21, 2**22):
        print(f"  {tokens / 1e6:5.2f} M tokens  {best(run(tokens, [32], [STEP], ['linear'])):6.2f} s")
    print("with cells (2 M tokens):")
    for n in (1, 4, 8):
        cells = n * 12 * len(ALL)
        print(f"  {cells:5d} cells     {best(run(2**21, eps[:n], steps, ALL)):6.2f} s")
    print("with experts (2 M tokens, 8 groups, 4 kept, top-8):")
    for n_experts in (64, 256, 1024):
        model = ModelSpec("bench", n_experts, 8, 8, 4, "sigmoid", "top2_sum", True)
        print(f"  {n_experts:5d} experts   {best(run(2**21, [32], [STEP], ['linear'], model)):6.2f} s")
    print(f"\npeak memory of this whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
