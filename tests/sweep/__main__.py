"""Try every architecture: ``python -m tests.sweep [--results FILE] [--page FILE] [NAME ...]``.

A name is a registered model type or the path of a config.json; without names it is every registered type. Records are appended
to the results as they are made, and a later record of a name counts more than an earlier one.
"""

import argparse
import datetime
import json
from pathlib import Path

import torch
import transformers

from tests.sweep.models import TYPES
from tests.sweep.run import LIMIT_S, records
from tests.sweep.verdict import page, summary, verdict


def main() -> None:
    """Run the trials and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--results", type=Path, help="JSON lines, appended to")
    parser.add_argument("--page", type=Path, help="write the page of everything in the results here")
    parser.add_argument("--only-page", action="store_true", help="run nothing")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds per architecture")
    options = parser.parse_args()
    found = {}
    if options.results and options.results.exists():
        lines = options.results.read_text(encoding="utf-8").splitlines()
        found = {one["name"]: one for one in map(json.loads, lines)}
    names = [] if options.only_page else options.names or [name for name in TYPES if name not in found]
    for record in records(names, options.limit):
        found[record["name"]] = record
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        passed, why = verdict(record)
        word = {True: "passes", False: "FAILS", None: "not built"}[passed]
        print(f"{record['name']} ({record['seconds']} s): {word} {why[:300]}", flush=True)
    print(summary(found.values()))
    if options.page:
        today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        made = f"Made {today} with torch {torch.__version__} and transformers {transformers.__version__}."
        options.page.write_text(page(found.values(), made), encoding="utf-8")


if __name__ == "__main__":
    main()
