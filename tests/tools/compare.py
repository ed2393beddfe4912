"""Compare runs over seeds: a row for each folder name, differences to --baseline paired by seed.

    python tests/tools/compare.py out_0 out_1 out_2 --baseline out_0/vae

Folders first, then the flags of eval.py. Of each run the newest checkpoint is taken; the table is followed by
the checkpoints of each row.
"""

import os
import re
import sys
from os.path import expanduser
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import cli  # noqa: E402
from eval import (checkpoints, find_checkpoint, markdown, measure, parser, read_sets,  # noqa: E402
                  read_state, summary)
from model import write_json  # noqa: E402


def gather(folders):
    """{row: {seed: checkpoint}} of all runs in the folders. A row is named by its folder with a * for the
    seed: few_0/vae and few_1/vae are few_*/vae."""
    found = [ckpt.resolve() for folder in folders for ckpt in checkpoints(folder)]
    rows, runs = {}, {ckpt.parent: ckpt for ckpt in found}
    root = os.path.commonpath([run.parent for run in runs])
    for run, ckpt in runs.items():
        seed, name = read_state(ckpt)["config"]["seed"], os.path.relpath(run, root)
        row = re.sub(rf"(?<!\d){seed}(?![^\W_])", "*", name, count=1)
        rows.setdefault(row, {})[seed] = ckpt
    return rows


def gain(runs, base):
    """Mean difference in accuracy to base's runs ({seed: figures}) of the same seed, over sets and seeds, ±
    its standard error. "" where no seed is the same."""
    accuracy = lambda run: 100 * mean(figures["accuracy"] for figures in run.values())
    gains = [accuracy(runs[seed]) - accuracy(base[seed]) for seed in runs.keys() & base.keys()]
    error = f" ± {stdev(gains) / len(gains)**0.5:.1f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.1f}{error}" if gains else ""


def compare(rows, base, names):
    """The table of {row: {seed: record}}: accuracy on each set, the gain to row `base`, then the means."""
    figures_of = lambda seeds: {seed: record["benchmarks"] for seed, record in seeds.items()}
    table = {}
    for row, runs in zip(rows, map(figures_of, rows.values())):
        difference = "" if row == base else gain(runs, figures_of(rows[base]))
        accuracy, whole = summary([*runs.values()], []), summary([*runs.values()], names)
        table[row] = accuracy | {f"to {base}": difference} | whole  # | keeps the columns' first places
    return markdown(table)


def main(argv=None):
    p = parser()
    p.add_argument("folders", nargs="+", metavar="DIR", help="all runs in these folders")
    p.add_argument("--baseline", type=expanduser, help="run whose row others are compared with (the first)")
    flags = vars(p.parse_args(argv))
    folders, baseline, file = map(flags.pop, ("folders", "baseline", "json"))
    data, rows = read_sets(flags), gather(folders)
    base = next(iter(rows))
    if baseline:
        start = find_checkpoint(baseline).resolve()
        base = next((row for row, seeds in rows.items() if start in seeds.values()), None)
    if base is None:
        raise ValueError(f"--baseline {baseline}: not one of the runs to compare")
    if file:
        open(file, "a").close()  # what cannot be written fails now, not after the work
    for row, seeds in rows.items():
        for seed, ckpt in seeds.items():
            seeds[seed] = {"row": row, **measure(ckpt, data, **flags)}
    records = [record for seeds in rows.values() for record in seeds.values()]
    [figures, *_] = records[0]["benchmarks"].values()
    print(compare(rows, base, [name for name in figures if name not in ("n", "accuracy")]))
    for row, seeds in rows.items():
        print(f"\n{row}:", *(os.path.relpath(record["checkpoint"]) for record in seeds.values()))
    if file:
        write_json(file, records)


if __name__ == "__main__":
    cli(main)
