"""Compare runs over seeds: a row for each folder name, differences to --baseline paired by seed.

    python tests/tools/compare.py out_0 out_1 out_2 --baseline out_0/vae

Folders first, then eval.py's flags (but for --ckpt). Of each run in a folder the newest checkpoint is taken.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import cli  # noqa: E402
from eval import measure, over_sets, parser, read_sets, table  # noqa: E402
from model import write_json  # noqa: E402
from vae import checkpoints, find_checkpoint, read_state  # noqa: E402


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


def compare(rows, base):
    """Rows of `table` from {row: {seed: record}}, with differences to row `base`, paired by seed."""
    for row in rows.keys() - {base}:
        for seed in rows[row].keys() & rows[base].keys():
            for name, start in rows[base][seed]["benchmarks"].items():
                figures = rows[row][seed]["benchmarks"][name]
                figures[f"to {base}"] = figures["accuracy"] - start["accuracy"]
    return [(row, *(record["benchmarks"] for record in seeds.values())) for row, seeds in rows.items()]


def main(argv=None):
    p = parser()
    p.add_argument("folders", nargs="+", metavar="DIR", help="all runs in these folders")
    p.add_argument("--baseline", help="run whose row others are compared with (the first)")
    args = p.parse_args(argv)
    data, rows = read_sets(args), gather(args.folders)
    base = next(iter(rows))
    if args.baseline:
        start = find_checkpoint(args.baseline).resolve()
        base = next((row for row, seeds in rows.items() if start in seeds.values()), None)
    if base is None:
        raise ValueError(f"--baseline {args.baseline}: not one of the runs to compare")
    for row, seeds in rows.items():
        for seed, ckpt in seeds.items():
            seeds[seed] = {"row": row, **measure(ckpt, data, args)}
    records = [record for seeds in rows.values() for record in seeds.values()]
    names = [name for name in over_sets(records[0]["benchmarks"]) if name != "accuracy"]
    print(table(compare(rows, base), [f"to {base}", *names[1:]]))
    if args.json:
        write_json(args.json, records)


if __name__ == "__main__":
    cli(main)
