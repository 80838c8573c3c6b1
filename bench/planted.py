"""Whether explanations find what the tiny world planted: the words of a verdict in reviews, the subject in questions.

usage: python bench/planted.py [ROWS] [MODEL]        200 validation reviews and questions, and the tiny model by default
Claims, at tol 0.1, among the rows that the model gets right: the highest-ranked word of a review is a planted one in at
least 90 %; a question's subject, taken as one part, counts more for the right answer than its other words on average, in at
least 90 %."""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from llm_analysis.data import open_rows
from llm_analysis.explain.attribution import Game, attribute, explain_text
from llm_analysis.explain.evaluator import Packed
from llm_analysis.explain.players import find_players
from llm_analysis.explain.prepare import Effort
from llm_analysis.explain.run import run
from llm_analysis.explain.values import TargetLogprob
from llm_analysis.lm.model import load


def parts(question: str, subject: str) -> tuple[list[tuple[int, int]], np.ndarray]:
    "Characters of the subject, as one part, and of each other word; which one is the subject"
    at, end = question.index(subject), question.index(subject) + len(subject)
    words = [m.span() for m in re.finditer(r"\S+", question)]
    spans = [(a, b) for a, b in words if b <= at or a >= end]
    spans = sorted([*spans, (at, max([end, *(b for a, b in words if at <= a < end)]))])
    return spans, np.array([a == at for a, _ in spans])


def facts(rows: int = 200, model: str = "tiny") -> bool:
    "Explain the first `rows` questions that the model answers right; whether the claim holds"
    lm, source, ahead, evaluations, asked = load(model, device="cpu"), open_rows("tiny/facts", model=model), [], 0, 0
    for row in source.dataset:
        if not row["exposures"]:
            continue
        asked += 1
        a = explain_text(lm, row["question"], prompt=source.prompt, tol=0.1, row_id=row["index"])
        if not a.answer.startswith(row["answer"].strip()):
            continue
        spans, own = parts(row["question"], row["entity"])
        players = find_players(lm.tokenizer, row["question"], prompt=source.prompt, unit="spans", spans=spans)
        a = attribute(Game(lm, players, TargetLogprob(row["answer"]), Packed(lm)), tol=0.1, row_id=row["index"])
        ahead.append(a.values[own] > a.values[~own].mean())
        evaluations += a.evaluations
        if len(ahead) == rows:
            break
    share, error = np.mean(ahead), np.std(ahead) / np.sqrt(len(ahead))
    print(
        f"\n{len(ahead)} of {asked} questions answered right, {evaluations / len(ahead):.0f} evaluations each (mean):"
    )
    print(f"subject ahead of the mean other word in **{share:.1%}** ± {error:.1%} (claim: 90 %)")
    return share >= 0.9


def reviews(rows: int = 200, model: str = "tiny") -> bool:
    "Explain the first `rows` validation reviews and print a Markdown table; whether the claim holds"
    own = dict(model=model, max_samples=rows, device="cpu", effort=Effort(tol=0.1, advisor=False))
    with tempfile.TemporaryDirectory() as room:
        found = run("tiny/reviews", output_dir=Path(room) / "planted", **own)
        page = found.report.stat().st_size
    hits, done = found.hits, [s.attribution for s in found.samples]
    error = np.sqrt(hits.shapley * (1 - hits.shapley) / hits.rows)
    exact = sum(a.exact for a in done)
    table = {
        "reviews, of which answered right": f"{len(done)}, {hits.rows}",
        "words, planted words (mean of those answered right)": f"{hits.players:.1f}, {hits.planted:.2f}",
        "highest-ranked word is planted: **Shapley**": f"**{hits.shapley:.1%}** ± {error:.1%}",
        "highest-ranked word is planted: leave-one-out": f"{hits.leave_one_out:.1%}",
        "highest-ranked word is planted: random pick (expected)": f"{hits.random:.1%}",
        "rows exact, sampled": f"{exact}, {len(done) - exact}",
        "largest, mean efficiency gap (nats)": f"{found.gap:.1e}, {np.mean([a.efficiency_gap for a in done]):.1e}",
        "evaluations, different prompts": f"{sum(a.evaluations for a in done):,}, {sum(a.prompts for a in done):,}",
        "tokens computed": f"{sum(a.computed for a in done):,}",
        "wall time, one thread": f"{found.seconds:.1f} s ({1000 * found.seconds / len(done):.0f} ms a review)",
        "size of report.html": f"{page / 1e3:.0f} kB",
    }
    print(f"model {found.model}\n\n| figure | value |\n| --- | --- |")
    print("\n".join(f"| {name} | {value} |" for name, value in table.items()))
    return hits.shapley >= 0.9


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:]
    what = (*([int(names[0])] if names else []), *names[1:2])
    held = [reviews(*what), facts(*what)]
    print(f"\nclaims: {'held' if all(held) else 'NOT held'}")
    sys.exit(not all(held))
