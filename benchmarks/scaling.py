"""Predicted against measured time of a step on 1, 2 and 4 machines behind slow links.

Usage: ``python -m benchmarks.scaling [--rounds 2] [--write FOLDER]``, as root on Linux; a round
takes about 2 minutes. The machines are namespaces, each with a cable of its own to a switch, and
``tc tbf`` limits what each sends. Latency and bandwidth are measured between 2 machines and used
for 4 as well. All machines share the cores here: the compute of W ranks is that of the slowest of
W processes which train alone at the same time.
"""

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.namespaces import limit, machines, start_on_all
from ddp_sgd.scaling import Network, Workload, predict_step

RATES = {"100 Mbit/s": "100mbit", "1 Gbit/s": "1gbit"}
RANKS = (2, 4)
TURNS, STEPS, ROW = 2, 8, 2
"""Runs of a workload one after the other, their steps, and the steps of a row of the journal; the
first row is left out.
"""
MLP = {
    "class_path": "ddp_sgd.models.MLP",
    "init_args": {"inputs": 64, "hidden": [724, 724, 724], "classes": 10},
}
WORKLOADS: dict[str, dict[str, Any]] = {
    "MLP, buckets of 2 MiB": {"model": MLP, "batch": 512, "bucket_mb": 2.0},
    "MLP, one bucket": {"model": MLP, "batch": 512, "bucket_mb": 25.0},
    "ConvNet": {
        "model": {"class_path": "ddp_sgd.models.ConvNet"},
        "batch": 512,
        "bucket_mb": 25.0,
    },
}


class Measurements:
    """All that was measured.

    Attributes:
        alone_ms: Step times of the slowest rank while all train alone, by workload, rate and ranks.
        joined_ms: Step times of all ranks together, by the same.
        gradient_bytes: By workload.
        networks: By rate, one a round.
        reduced_ms: Times of an all-reduce without compute, by rate, ranks and bytes.
    """

    def __init__(self) -> None:
        self.alone_ms: dict[tuple[str, str, int], list[float]] = defaultdict(list)
        self.joined_ms: dict[tuple[str, str, int], list[float]] = defaultdict(list)
        self.gradient_bytes: dict[str, int] = {}
        self.networks: dict[str, list[Network]] = defaultdict(list)
        self.reduced_ms: dict[tuple[str, int, int], list[float]] = defaultdict(list)

    def add(self, found: dict[str, Any], rate: str, ranks: int) -> None:
        """Add what rank 0 printed."""
        for name in WORKLOADS:
            self.gradient_bytes[name] = found[name]["gradient_bytes"]
            self.alone_ms[name, rate, ranks] += found[name]["alone"]
            self.joined_ms[name, rate, ranks] += found[name]["joined"]
        for num_bytes, seconds, _ in found["links"]:
            self.reduced_ms[rate, ranks, num_bytes].append(1e3 * seconds)
        if ranks == RANKS[0]:
            self.networks[rate].append(network_of(found["links"]))

    def network(self, rate: str) -> Network:
        """Return the median network of a rate."""
        found = self.networks[rate]
        return Network(
            bandwidth_gbit=median(each.bandwidth_gbit for each in found),
            latency_us=median(each.latency_us for each in found),
        )

    def predict_ms(self, name: str, rate: str, ranks: int) -> float:
        """Return the predicted time of a step, in ms."""
        workload = Workload(
            compute_s=median(self.alone_ms[name, rate, ranks]) / 1e3,
            micro_batches=1,
            gradient_bytes=self.gradient_bytes[name],
            bucket_bytes=round(WORKLOADS[name]["bucket_mb"] * 2**20),
        )
        return 1e3 * predict_step(workload, self.network(rate), ranks).step_s


def network_of(timings: list[tuple[int, float, int]]) -> Network:
    """Solve the formula of the ring for 2 ranks, with the least and the largest message."""
    (_, least_s, _), (num_bytes, most_s, _) = timings[0], timings[-1]
    return Network(
        bandwidth_gbit=num_bytes * 8 / 1e9 / (most_s - least_s), latency_us=1e6 * least_s / 2
    )


def measure(rounds: int) -> Measurements:
    """Measure everything, in turn, several times."""
    measurements = Measurements()
    for _ in range(rounds):
        for ranks in RANKS:
            with machines(ranks) as nodes:
                for rate, tc_rate in RATES.items():
                    limit(nodes, tc_rate)
                    measurements.add(run(nodes), rate, ranks)
    return measurements


def run(nodes: list[Any]) -> dict[str, Any]:
    """Run a rank on each machine; return what rank 0 prints."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("-m", "benchmarks.scaling", f"--as_rank={folder}")
        processes = start_on_all(nodes, *words, said=None)
        texts = [process.communicate(timeout=400)[0] for process in processes]
    return json.loads(texts[0].splitlines()[-1])


def work_as_rank(folder: Path) -> None:
    """Time the links and train every workload, alone and together in turn; print it as JSON."""
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
                    place = folder / f"{number}-{turn}-{how}-{runtime.rank if alone else 'all'}"
                    who = Runtime(device=runtime.device) if alone else runtime
                    found[name]["gradient_bytes"], steps_ms = train(work, who, place)
                    of_all = gather_over_ranks(steps_ms, runtime)
                    found[name][how] += map(max, zip(*of_all, strict=True)) if alone else steps_ms
    print(json.dumps(found))


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
    lines = (folder / config.name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    return sum(p.nbytes for p in model.parameters()), [row["time/step_ms"] for row in rows][1:]


def report(measurements: Measurements, rounds: int, loads: list[float]) -> str:
    """Write the result in Markdown."""
    rows, errors = [], []
    for (name, rate, ranks), times in measurements.joined_ms.items():
        alone_ms = median(measurements.alone_ms[name, rate, ranks])
        predicted_ms = measurements.predict_ms(name, rate, ranks)
        low, middle, high = quantiles(times, n=4)
        errors.append(100 * (predicted_ms / middle - 1))
        shares = (f"{100 * alone_ms / each:.0f} %" for each in (predicted_ms, middle))
        cells = (
            f"{name} | {rate} | {ranks} | {alone_ms:.1f} | {predicted_ms:.1f}",
            f"{middle:.1f} ({low:.1f} to {high:.1f}) | {errors[-1]:+.0f} %",
            *shares,
            str(len(times)),
        )
        rows.append(f"| {' | '.join(cells)} |")
    links = [
        f"| {rate} | {', '.join(f'{each.bandwidth_gbit:.3f}' for each in found)} | "
        f"{', '.join(f'{each.latency_us:.0f}' for each in found)} |"
        for rate, found in measurements.networks.items()
    ]
    return f"""# Scaling: predicted and measured time of a step

`python -m benchmarks.scaling --rounds {rounds}`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} \
CPUs for all ranks, {platform.machine()}, Python {platform.python_version()}, torch \
{version("torch")}, gloo, one thread a rank, {rounds} rounds; load average {loads[0]:.1f} before, \
{loads[1]:.1f} after.

Each rank has a network namespace of its own, and `tc tbf` limits what it sends. `alone` is the \
median step of the slowest rank while all ranks train at the same time without each other, in turn \
with `measured`; with one rank there is nothing to predict. Latency and bandwidth are those of 2 \
ranks, once a round:

| link | bandwidth, Gbit/s | latency of a message, us |
|---|---|---|
{chr(10).join(links)}

| workload | link | ranks | alone, ms | predicted, ms | measured, ms (quartiles) | error | \
efficiency predicted | measured | n |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(sorted(rows))}

Errors of steps from {min(errors):+.0f} % to {max(errors):+.0f} %; their size is \
{median(map(abs, errors)):.0f} % in the median.

All-reduces without compute, by the formula and measured. Latency and bandwidth come from the \
first and the last row of 2 ranks. `tbf` lets the first 128 kB of a burst pass, so that the \
formula does not hold for smaller messages:

| link | ranks | bytes | predicted, ms | measured, ms | error |
|---|---|---|---|---|---|
{chr(10).join(reductions(measurements))}
"""


def reductions(measurements: Measurements) -> Iterator[str]:
    """Write how long an all-reduce takes, by the formula of the ring and by the clock."""
    for (rate, ranks, num_bytes), times in measurements.reduced_ms.items():
        predicted_ms = 1e3 * measurements.network(rate).all_reduce_s(num_bytes, ranks)
        error = 100 * (predicted_ms / median(times) - 1)
        cells = (f"{predicted_ms:.2f}", f"{median(times):.2f}", f"{error:+.0f} %")
        yield f"| {rate} | {ranks} | {num_bytes:,} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, compare, print, and keep the result if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--as_rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank is not None:
        work_as_rank(options.as_rank)
        return
    load_before = os.getloadavg()[0]
    measurements = measure(options.rounds)
    text = report(measurements, options.rounds, [load_before, os.getloadavg()[0]])
    print(text)
    if options.write:
        path = options.write / f"scaling_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
