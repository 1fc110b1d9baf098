#!/usr/bin/env python3
"""The results page: every figure from the stored JSON of a run, none typed by hand.

A result is one file of docs/results: what a run or a comparison reported, with its command, the
commit, the machine and the seconds it took. `render` writes docs/results.md with its plots and
the parts of README.md between `<!-- results: NAMES -->` and `<!-- end of results -->`.

examples:
  tools/results.py add digits runs/digits --title "digits, distilled" --command ./launch/local.sh
  tools/results.py render
  tools/results.py --check       # 0 only if README.md and docs/results.md say what the JSON says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results_page import render, store

from distpc.errors import DistpcError

REPO = Path(__file__).resolve().parents[1]


def main() -> int:
    """Do what the command line says; the exit status."""
    options = _options()
    try:
        if options.check:
            wrong = render.differences(REPO)
            for line in wrong:
                print(line)
            print("results: " + (f"{len(wrong)} lines differ" if wrong else "all figures hold"))
            return 1 if wrong else 0
        if options.action == "add":
            path = store.add(
                REPO, options.name, options.folder, title=options.title, command=options.command
            )
            print(f"wrote {path}")
        for path in render.write(REPO):
            print(f"wrote {path}")
    except DistpcError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    actions = parser.add_subparsers(dest="action")
    add = actions.add_parser("add", help="store what a run or a comparison reported, and render")
    add.add_argument("name", help="of the file in docs/results, and for README.md")
    add.add_argument("folder", type=Path, help="of the run or comparison; it holds report.json")
    add.add_argument("--title", required=True, help="what was trained, in a few words")
    add.add_argument("--command", required=True, help="that makes it again")
    actions.add_parser("render", help="write docs/results.md, its plots and README.md's tables")
    options = parser.parse_args()
    if not options.check and options.action is None:
        parser.error("say --check, add or render")
    return options


if __name__ == "__main__":
    sys.exit(main())
