"""Loss and kNN curves of finished runs: `python -m benchmarks.curves OUT.png NAME=WORKDIR ...`."""

import argparse
import pathlib

from common.run import pictures
from common.run.jsonl import FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    options = parser.parse_args()
    runs = {}
    for run in options.runs:
        name, _, workdir = run.partition("=")
        if not (pathlib.Path(workdir) / FILE).exists():
            parser.error(f"{run}: expected NAME=WORKDIR with a {FILE} in WORKDIR")
        runs[name] = pathlib.Path(workdir) / FILE
    pictures.curves(runs, options.out)


if __name__ == "__main__":
    main()
