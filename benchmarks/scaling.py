"""Scaling: predicted and measured time of a step, on 2 and 4 machines behind slow links.

Usage: ``python -m benchmarks.scaling [--rounds 2]``, as root on Linux; a round takes about 2
minutes.

Each rank has a network namespace of its own, with a cable to a switch, and `tc tbf` limits what it
sends; all share the CPUs of one machine. `alone` is the median step of the slowest rank while all
train at the same time without each other, in turn with `measured`; with one rank there is nothing
to predict. Latency and bandwidth are those of 2 ranks, one per round, and used for 4 as well.
"""

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.namespaces import RATES, limit, machines, run_on_all
from ddp_sgd.scaling import Network, Workload, predict_step

RANKS = (2, 4)
TURNS, STEPS, ROW = 2, 8, 2
"""Runs of a workload one after the other, their steps, and the steps of a row of the journal; the
first row is left out.
"""
MLP = {
    "class_path": "ddp_sgd.models.MLP",
    "init_args": {"inputs": 64, "hidden": [724, 724, 724], "classes": 10},
}
CONV_NET = {"class_path": "ddp_sgd.models.ConvNet"}
WORKLOADS: dict[str, dict[str, Any]] = {
    "MLP, buckets of 2 MiB": {"model": MLP, "batch": 512, "bucket_mb": 2.0},
    "MLP, one bucket": {"model": MLP, "batch": 512, "bucket_mb": 25.0},
    "ConvNet": {"model": CONV_NET, "batch": 512, "bucket_mb": 25.0},
}

Found = dict[tuple[str, int], list[dict[str, Any]]]
"""By rate and number of ranks: what rank 0 found in each round. That is the size of the gradients
and the step times by workload, alone and joined, and the times of all-reduces under ``links``.
"""


def measure(options: Namespace) -> Iterator[str]:
    """Measure every rate and number of ranks, in turn."""
    with machines(max(RANKS)) as nodes:
        cases = {(rate, n): partial(run, nodes[:n], rate) for n in RANKS for rate in RATES}
        found = harness.alternate(cases, options.rounds)
    yield from report(found)


def networks_of(found: Found, rate: str) -> list[Network]:
    """Solve the formula of the ring for 2 ranks, by the least and the largest message."""
    networks = []
    for each in found[rate, 2]:
        (_, least_s, _), *_, (num_bytes, most_s, _) = each["links"]
        bandwidth_gbit = num_bytes * 8 / 1e9 / (most_s - least_s)
        networks.append(Network(bandwidth_gbit=bandwidth_gbit, latency_us=1e6 * least_s / 2))
    return networks


def network_of(found: Found, rate: str) -> Network:
    """Return the median network of a rate."""
    networks = networks_of(found, rate)
    return Network(
        bandwidth_gbit=median(each.bandwidth_gbit for each in networks),
        latency_us=median(each.latency_us for each in networks),
    )


def run(nodes: list[Any], rate: str) -> dict[str, Any]:
    """Run a rank on each machine; return what rank 0 finds."""
    limit(nodes, rate)
    with tempfile.TemporaryDirectory() as folder:
        texts = run_on_all(nodes, "-m", "benchmarks.scaling", f"--worker={json.dumps([folder])}")
    found: dict[str, Any] = json.loads(texts[0].splitlines()[-1])
    return found


def work_as_rank(folder: str) -> dict[str, Any]:
    """Time the links and train every workload, alone and together in turn."""
    import torch
    import torch.distributed as dist

    from ddp_sgd import Runtime, start_runtime
    from ddp_sgd.distributed.collectives import gather_over_ranks
    from ddp_sgd.doctor.links import time_all_ranks

    torch.set_num_threads(1)
    found: dict[str, Any] = {name: {"alone": [], "joined": []} for name in WORKLOADS}
    with start_runtime(device="cpu") as runtime:
        found["links"] = time_all_ranks(runtime, budget_s=4.0)
        for number, (name, work) in enumerate(WORKLOADS.items()):
            for turn in range(TURNS):
                for how in ("alone", "joined"):
                    dist.barrier()
                    alone = how == "alone"
                    place = (
                        Path(folder) / f"{number}-{turn}-{how}-{runtime.rank if alone else 'all'}"
                    )
                    who = Runtime(device=runtime.device) if alone else runtime
                    found[name]["gradient_bytes"], steps_ms = train(work, who, place)
                    of_all = gather_over_ranks(steps_ms, runtime)
                    found[name][how] += map(max, zip(*of_all, strict=True)) if alone else steps_ms
    return found


def train(work: dict[str, Any], runtime: Any, folder: Path) -> tuple[int, list[float]]:
    """Return the size of the gradients in bytes, and the step times in ms in the journal."""
    import torch

    from ddp_sgd import RunConfig, fit
    from ddp_sgd.data.datasets import InMemory
    from ddp_sgd.engine.components import ready_model

    sections = {
        "output_dir": str(folder),
        "epochs": 1,
        "model": work["model"],
        "data": {"batch_size": work["batch"]},
        "parallel": {"bucket_mb": work["bucket_mb"]},
        "log": {"every_steps": ROW},
        "wandb": {"mode": "disabled"},
    }
    config = RunConfig.model_validate(sections)
    model = ready_model(config.model, config.seed)
    samples = STEPS * work["batch"] * runtime.world_size
    inputs, targets = torch.randn(samples, 8, 8), torch.randint(10, (samples,))
    fit(config, runtime, model=model, train_set=InMemory(inputs, targets))
    rows = harness.journal_rows(folder / config.name)
    return sum(p.nbytes for p in model.parameters()), [row["time/step_ms"] for row in rows][1:]


def report(found: Found) -> Iterator[str]:
    """Write the result."""
    networks = {rate: networks_of(found, rate) for rate in RATES if (rate, 2) in found}
    yield harness.markdown_table(
        "link | bandwidth, Gbit/s | latency of a message, us",
        (
            (rate, [each.bandwidth_gbit for each in all_], [each.latency_us for each in all_])
            for rate, all_ in networks.items()
        ),
    )
    steps = [_step(found, name, *key) for name in sorted(WORKLOADS) for key in sorted(found)]
    headings = "workload | link | ranks | alone, ms | predicted, ms | measured, ms (quartiles)"
    headings += " | error, % | efficiency predicted, % | measured, % | n"
    yield harness.markdown_table(headings, steps)
    errors = [row[6] for row in steps]
    yield (
        f"Errors of steps from {min(errors):+d} % to {max(errors):+d} %; their size is "
        f"{median(map(abs, errors)):.0f} % in the median."
    )
    yield (
        "All-reduces without compute, by the formula and measured. Latency and bandwidth come from "
        "the first and the last row of 2 ranks. `tbf` lets the first 128 kB of a burst pass, so "
        "that the formula does not hold for smaller messages:"
    )
    headings = "link | ranks | bytes | predicted, ms | measured, ms | error, %"
    yield harness.markdown_table(headings, _reductions(found))


def _step(found: Found, name: str, rate: str, ranks: int) -> tuple[Any, ...]:
    """Return the row of a workload, link and number of ranks."""
    rounds = [each[name] for each in found[rate, ranks]]
    alone_ms, times = ([ms for each in rounds for ms in each[how]] for how in ("alone", "joined"))
    workload = Workload(
        compute_s=median(alone_ms) / 1e3,
        micro_batches=1,
        gradient_bytes=rounds[0]["gradient_bytes"],
        bucket_bytes=round(WORKLOADS[name]["bucket_mb"] * 2**20),
    )
    predicted_ms = 1e3 * predict_step(workload, network_of(found, rate), ranks).step_s
    error = round(100 * (predicted_ms / median(times) - 1))
    shares = (round(100 * median(alone_ms) / each) for each in (predicted_ms, median(times)))
    figures = (median(alone_ms), predicted_ms, harness.quartiles(times), error, *shares)
    return name, rate, ranks, *figures, len(times)


def _reductions(found: Found) -> Iterator[tuple[Any, ...]]:
    """Yield how long an all-reduce takes, by the formula of the ring and by the clock."""
    for (rate, ranks), rounds in found.items():
        links = [link for each in rounds for link in each["links"]]
        for num_bytes in dict.fromkeys(size for size, *_ in links):
            measured_ms = 1e3 * median(s for size, s, _ in links if size == num_bytes)
            predicted_ms = 1e3 * network_of(found, rate).all_reduce_s(num_bytes, ranks)
            error = round(100 * (predicted_ms / measured_ms - 1))
            yield rate, ranks, num_bytes, predicted_ms, measured_ms, error


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=2)
    harness.run_benchmark("scaling", parser, measure, worker=work_as_rank)
