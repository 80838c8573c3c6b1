"""What a plan saves, and what it costs: padding, the last worker to finish, and the time to make it.

    python bench/jobs_plan.py                padding, makespan and the time of a plan of one and of ten million rows
    python bench/jobs_plan.py --rows 100000  the same with a smaller plan at the end

Padding counts tokens, makespan is simulated (a worker takes the next shard when it is free; a worker at half speed
needs twice as long), so both are the same on every machine; only the last table measures time. Prints Markdown.
"""

import argparse
import heapq
import platform
import time

import numpy as np

from llm_analysis.core import stream
from llm_analysis.jobs.plan import Plan, make_plan

WORKERS, BUDGET = 8, 16_384
HALF = (0.5, *[1.0] * (WORKERS - 1))  # speeds: one worker at half speed


def chats(rows: int) -> np.ndarray:
    "Lengths as chats have them: log-normal, 4 to 4096 tokens"
    draw = stream(0, "chats", "bench").lognormal(5.0, 1.2, rows)
    return np.clip(draw, 4, 4096).astype(np.int64)


def players(rows: int) -> np.ndarray:
    "Words in a news headline and its first sentence: 5 to 60"
    return np.clip(stream(0, "players", "bench").normal(12, 6, rows), 3, 60).astype(np.int64)


def arrival(lengths: np.ndarray, size: int) -> float:
    "Share of padding in batches of `size` rows as they come"
    width = np.repeat(np.maximum.reduceat(lengths, np.arange(0, len(lengths), size)), size)[: len(lengths)]
    return 1 - lengths.sum() / width.sum()


def dispatched(costs: np.ndarray, speeds: tuple[float, ...]) -> float:
    "When the last worker is done, if each takes the next shard as soon as it is free; in units of the ideal"
    free = [(0.0, w) for w in range(len(speeds))]
    for cost in costs:
        at, w = heapq.heappop(free)
        heapq.heappush(free, (at + cost / speeds[w], w))
    return max(free)[0] / (costs.sum() / sum(speeds))


def fixed(costs: np.ndarray, speeds: tuple[float, ...]) -> float:
    "The same if worker w has shard w and no other"
    return max(c / s for c, s in zip(costs, speeds)) / (costs.sum() / sum(speeds))


def padding() -> None:
    print("| rows | arrival order, 32 a batch | planned | planned, windows of 2048 | batches |\n|---|---|---|---|---|")
    for name, lengths in {"chats, 20,000 rows": chats(20_000), "chats, 200,000 rows": chats(200_000)}.items():
        plan, window = (make_plan(lengths, batch_tokens=BUDGET, window=w) for w in (None, 2048))
        print(f"| {name} | {arrival(lengths, 32):.1%} | {plan.waste:.2%} | {window.waste:.1%} | {plan.batches} |")
        assert plan.waste <= 0.02 and arrival(lengths, 32) >= 0.4


def makespan() -> None:
    chat, player = chats(200_000), players(20_000)
    kinds = {
        "length (chats)": (chat, chat.astype(float)),
        "length² (chats)": (chat, chat.astype(float) ** 2),
        "2^min(n, 11) (headlines)": (player, 2.0 ** np.minimum(player, 11)),
    }
    print(
        "\n| cost | speeds | shards of equal cost, handed out | static, batch j to worker j mod 8 |\n|---|---|---|---|"
    )
    for name, (lengths, costs) in kinds.items():
        most = None if name.startswith("length") else 16  # few rows a batch: each is thousands of questions
        told = dict(batch_tokens=BUDGET, max_batch_size=most)
        plans: list[Plan] = [make_plan(lengths, costs, **told, static=s) for s in (None, WORKERS)]
        for said, speeds in {"equal": (1.0,) * WORKERS, "one of eight at half": HALF}.items():
            ours, theirs = dispatched(plans[0].shard_cost, speeds), fixed(plans[1].shard_cost, speeds)
            print(f"| {name} | {said} | {ours:.3f} | {theirs:.3f} |")
            assert ours <= 1.05


def seconds(rows: tuple[int, ...]) -> None:
    print("\n| rows | window | wall s | CPU s | batches | fingerprint, wall s |\n|---|---|---|---|---|---|")
    for n in rows:
        lengths = chats(n)
        for window in (None, 4096):
            wall, cpu = time.perf_counter(), time.process_time()
            plan = make_plan(lengths, batch_tokens=BUDGET, window=window)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            named = time.perf_counter()
            assert len(plan.fingerprint) == 16
            named = time.perf_counter() - named
            print(f"| {n:,} | {window or 'none'} | {wall:.2f} | {cpu:.2f} | {plan.batches:,} | {named:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[1_000_000, 10_000_000], help="sizes of the timed plans"
    )
    told = parser.parse_args()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; {BUDGET} tokens a batch\n"
    )
    padding()
    makespan()
    seconds(tuple(told.rows))


if __name__ == "__main__":
    main()
