"""The same training by ddp_sgd, by hand, and by other frameworks.

Usage: ``python -m benchmarks.peers [--rounds N] [--workloads mlp convnet resnet] [--ranks 1 2]
[--contestants ...] [--write benchmarks/results]``. ``--short`` takes a minute and only shows that
all do the same work. Every run is added to a file of JSON lines at once, whose name is printed
first; ``--tables_of FILE`` makes the tables of such files, without measuring. The exit code is 1
if somebody did other work.

Every round runs each contestant once, in an order that moves on by one each time. Ratios are taken
within a round. `ddp_sgd` runs by its command, with its journal, its checkpoints and W&B offline;
its helpers are the processes that it starts, such as that of W&B. On one rank the loops with DDP
have a group of one, the frameworks choose for themselves, which is without DDP. Two ranks are
started by torchrun, and gloo joins them. All begin with the same weights, read the same file, and
keep the rate constant. Speed and CPU time leave the first 10 % of the steps out. The first step
counts from the command on; of `ddp_sgd` it is the first row of its journal, which is that of step
10 of the MLP and the ConvNet, and of step 1 of ResNet-18, whose rows are written at every step. The
loss is that of the final weights on training data, measured alike for all.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import harness
from benchmarks.peers.lineup import CONTESTANTS, FLAT, OURS, TUTORIAL
from benchmarks.peers.measuring import Record, measure
from benchmarks.peers.report import OTHER_WORK, report
from benchmarks.peers.task import WORKLOADS

SHORT_EPOCHS = 2
SHORT_CONTESTANTS = {1: list(CONTESTANTS), 2: [OURS, FLAT, TUTORIAL, "fabric"]}
"""Who takes part in the short form, by ranks: starting two ranks takes ten seconds of CPU."""
PACKAGES = ("torch", "torchvision", "accelerate", "lightning", "pytorch-ignite", "wandb")


def option_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = harness.option_parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--short", action="store_true", help="the MLP for two epochs, one round")
    parser.add_argument("--records", type=Path, help="file for the JSON lines")
    parser.add_argument("--tables_of", type=Path, nargs="+", help="files of JSON lines")
    return parser


def measure_all(options: Namespace) -> Iterator[str]:
    """Run everybody, round by round."""
    if options.tables_of:
        lines = [line for file in options.tables_of for line in file.read_text().splitlines()]
        yield from report([Record(**json.loads(line)) for line in lines])
        return
    path = options.records or Path(tempfile.mkdtemp(prefix="peers-records-")) / "records.jsonl"
    harness.print_progress(f"records: {path}")
    records = []
    with path.open("a") as stream:
        for record in measured(options):
            records.append(record)
            harness.print_progress(record.as_line().strip())
            stream.write(record.as_line())
            stream.flush()
    yield from report(records)


def measured(options: Namespace) -> Iterator[Record]:
    """Yield the records of all runs: of one workload and number of ranks after the other."""
    for name in ["mlp"] if options.short else options.workloads:
        workload = WORKLOADS[name]
        if options.short:
            workload = replace(workload, epochs=SHORT_EPOCHS, rounds=1)
        for ranks in options.ranks:
            with workload.prepared(ranks) as task:
                for number in range(options.rounds or workload.rounds):
                    for contestant in order(options, name, ranks, number):
                        yield measure(task, name, contestant, number)


def order(options: Namespace, workload: str, ranks: int, number: int) -> list[str]:
    """Return the contestants of a round, in its order."""
    names = [
        name
        for name in (SHORT_CONTESTANTS[ranks] if options.short else CONTESTANTS)
        if name in options.contestants and CONTESTANTS[name].takes_part(workload, ranks)
    ]
    return harness.rotated(names, number)


if __name__ == "__main__":
    text = harness.run_benchmark("peers", option_parser(), measure_all, packages=PACKAGES)
    sys.exit(OTHER_WORK in text)
