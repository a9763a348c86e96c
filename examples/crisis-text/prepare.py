"""Make an emergency office out of each of CrisisLexT6's six events: messages, and whether they are about the event.

    python examples/crisis-text/prepare.py OUT [--data DIR] [--without OFFICE]

DIR is the folder that has crisislex_t6_ontopic_offtopic.csv.gz, or has it in crisislex/ (default: $ATOLL_DATA). OUT
gets NAME.csv for each office, all of its event's messages with 1 for on-topic, and sites.yaml, from which --without
leaves one office out: what the others learn can then be scored on an event that none of them has seen. The messages are
by users of Twitter: keep OUT to yourself.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
from pathlib import Path

import yaml

FILE = "crisislex_t6_ontopic_offtopic.csv.gz"
OFFICES = {
    "sandy": "2012_Sandy_Hurricane", "alberta": "2013_Alberta_Floods", "boston": "2013_Boston_Bombings",
    "oklahoma": "2013_Oklahoma_Tornado", "queensland": "2013_Queensland_Floods", "texas": "2013_West_Texas_Explosion",
}  # fmt: skip
"""Each office's event."""


def messages(file: Path) -> dict[str, list[tuple[str, int]]]:
    """By office: (message, 1 for on-topic)."""
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {
        office: [(row["tweet"], int(row["label"] == "on-topic")) for row in rows if row["event"] == event]
        for office, event in OFFICES.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("ATOLL_DATA", ".")))
    arguments.add_argument("--without", choices=OFFICES, metavar="OFFICE")
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = [folder / FILE for folder in (given.data, given.data / "crisislex") if (folder / FILE).is_file()]
    if not found:
        arguments.error(f"there is no {FILE} in {given.data}: name its folder with --data")
    for office, rows in messages(found[0]).items():
        with (given.out / f"{office}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("tweet", "on_topic"), *rows])
    sites = {office: {"path": f"{office}.csv"} for office in OFFICES if office != given.without}
    (given.out / "sites.yaml").write_text(yaml.safe_dump(sites, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
