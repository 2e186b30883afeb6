"""Measure ``ddp_sgd`` side by side with loops written by hand and with other frameworks.

Usage: ``python -m benchmarks.peers [--rounds N] [--workloads mlp convnet resnet] [--ranks 1 2]
[--contestants ...] [--write benchmarks/results]``. ``--short`` takes a minute and only shows that
all do the same work. Every run is added to a file of JSON lines at once, whose name is printed
first; ``--tables_of FILE`` makes the tables of such files, without measuring.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.peers.equivalence import differences
from benchmarks.peers.lineup import CONTESTANTS, FLAT, OURS, TUTORIAL
from benchmarks.peers.measuring import Record, measure, prepared
from benchmarks.peers.report import report
from benchmarks.peers.workloads import WORKLOADS

SHORT_EPOCHS = 2
SHORT_CONTESTANTS = {1: list(CONTESTANTS), 2: [OURS, FLAT, TUTORIAL, "fabric"]}
"""Who takes part in the short form, by ranks: starting two ranks takes ten seconds of CPU."""


def main() -> int:
    """Measure, print, and keep the result if asked to; 1 if somebody did other work."""
    options = read_options()
    before = os.getloadavg()[0]
    if options.tables_of:
        lines = [line for file in options.tables_of for line in file.read_text().splitlines()]
        records = [Record(**json.loads(line)) for line in lines]
    else:
        records = measure_all(options)
    text = report(records, (before, os.getloadavg()[0]))
    print(text)
    if options.write:
        name = f"peers_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        (options.write / name).write_text(text)
    return 1 if differences(records) else 0


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--rounds", type=int, help="for all workloads; each has its own number")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--records", type=Path, help="file for the JSON lines")
    parser.add_argument("--tables_of", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--write", type=Path, help="folder for the result")
    options = parser.parse_args()
    if options.short:
        options.workloads, options.rounds = ["mlp"], 1
    if options.records is None:
        folder = tempfile.mkdtemp(prefix="peers-records-")
        options.records = Path(folder) / "records.jsonl"
    return options


def measure_all(options: argparse.Namespace) -> list[Record]:
    """Run everybody, round by round."""
    records: list[Record] = []
    print(f"records: {options.records}", file=sys.stderr, flush=True)
    with ExitStack() as stack, options.records.open("a") as stream:
        tasks = {}
        for name in options.workloads:
            workload = WORKLOADS[name]
            if options.short:
                workload = replace(workload, epochs=SHORT_EPOCHS)
            for ranks in options.ranks:
                tasks[name, ranks] = stack.enter_context(prepared(workload, ranks))
        for workload, ranks, number, contestant in schedule(options):
            record = measure(tasks[workload, ranks], workload, contestant, number)
            records.append(record)
            stream.write(record.as_line())
            stream.flush()
            print(
                f"{workload}, {ranks} ranks, round {number}, {contestant}: "
                f"{record.steps_per_s:.1f} steps/s in {record.whole_s:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return records


def schedule(options: argparse.Namespace) -> list[tuple[str, int, int, str]]:
    """List who runs what when: workload, ranks, round, contestant."""
    runs = []
    rounds = {name: options.rounds or WORKLOADS[name].rounds for name in options.workloads}
    for number in range(max(rounds.values())):
        for workload in [name for name in options.workloads if number < rounds[name]]:
            for ranks in options.ranks:
                names = [
                    name
                    for name in (SHORT_CONTESTANTS[ranks] if options.short else CONTESTANTS)
                    if name in options.contestants and CONTESTANTS[name].takes_part(workload, ranks)
                ]
                first = number % max(1, len(names))
                order = [*names[first:], *names[:first]]
                runs += [(workload, ranks, number, name) for name in order]
    return runs


if __name__ == "__main__":
    sys.exit(main())
