"""Draw accuracy against tokens, a point a run, and the curves of RL runs; a colour a row.

    python tests/tools/compare.py few_?/vae few_?/rl --json runs.json
    python tests/tools/plot.py runs.json picture.png          needs matplotlib
"""

import json
import sys
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure


def draw(records):
    figure = Figure(figsize=(16, 4), layout="constrained")
    first, *others = figure.subplots(1, 4)
    rows = list(dict.fromkeys(record["row"] for record in records))
    for record in records:
        colour, sets = f"C{rows.index(record['row']) % 10}", record["benchmarks"].values()
        tokens, accuracy = (mean(figures[name] for figures in sets) for name in ("tokens", "accuracy"))
        first.plot(tokens, accuracy, "o", color=colour, label=record["row"])
        metrics = Path(record["checkpoint"]).parent / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if '"reward"' in line]
        for axis, name in zip(others, ("reward", "accuracy", "coherence")):
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], color=colour)
            axis.set(title=name, xlabel="RL step")
    first.set(title="accuracy", xlabel="tokens")
    labels = dict(zip(*reversed(first.get_legend_handles_labels())))  # one a row
    first.legend(labels.values(), labels)
    return figure


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())).savefig(sys.argv[2])
