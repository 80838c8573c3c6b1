"""How often the highest-ranked word is one that the tiny world planted: Shapley values, leaving one out, a random pick.

usage: python bench/planted.py [ROWS] [MODEL]        200 validation reviews and the tiny model by default
Claim: at least 85 % for Shapley values, among the reviews that the model gets right."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from llm_analysis.explain.run import run


def main(rows: int = 200, model: str = "tiny") -> bool:
    "Explain the first `rows` validation reviews and print a Markdown table; whether the claim holds"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        found = run("tiny/reviews", output_dir=Path(room) / "planted", model=model, max_samples=rows, device="cpu")
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
    return hits.shapley >= 0.85


if __name__ == "__main__":
    names = sys.argv[1:]
    held = main(*([int(names[0])] if names else []), *names[1:2])
    print(f"\nclaim (at least 85 %): {'held' if held else 'NOT held'}")
    sys.exit(not held)
