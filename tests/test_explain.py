import subprocess
import sys

import numpy as np
import pytest
from limits import WAIT_S

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.errors import ExitCode
from ddp_sgd.explain import main
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import make_plan
from ddp_sgd.report.curve import curve
from ddp_sgd.report.plan_table import plan_table
from ddp_sgd.scaling import Network, Workload, scaling_table

SCALING = ("--step_ms=12.5", "--bandwidth_gbit=10", "--latency_us=20")
MIB = 2**20


def _expected(*, samples=1437, world_size=1, **sections):
    config = RunConfig.model_validate(sections)
    plan = make_plan(config, samples=samples, world_size=world_size)
    schedule = build_schedule(config.schedule, plan)
    return f"{plan_table(plan, schedule, config.schedule.milestones)}\n\n{curve(plan, schedule)}\n"


def test_default_is_one_rank_on_the_embedded_digits(capsys):
    assert main([]) == ExitCode.DONE
    assert capsys.readouterr().out == _expected()


def test_any_number_of_ranks_and_the_options_of_train(capsys):
    argv = ["--world_size", "64", "--data.batch_size=8", "--optim.scaling=sqrt", "--epochs=7"]
    assert main(argv) == ExitCode.DONE
    assert capsys.readouterr().out == _expected(
        world_size=64, epochs=7, data={"batch_size": 8}, optim={"scaling": "sqrt"}
    )


def test_goyal_et_al_2017_from_the_command_line(capsys):
    argv = [
        "--world_size=256",
        "--samples=1281167",
        "--epochs=90",
        "--optim.lr=0.1",
        "--optim.reference_batch=256",
        "--schedule={name: step, milestones: [30, 60, 80], warmup_epochs: 5}",
    ]
    assert main(argv) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "157 steps (1,281,167 samples)" in out
    assert "3.2 for 8,192 samples per step" in out
    assert "785 steps (6,405,835 samples, 5 of 90 epochs) from 0.1" in out


def test_a_long_schedule_on_a_shortened_run(capsys):
    argv = ["--samples=1437", "--world_size=2", "--epochs=3"]
    argv += ["--schedule={name: step, milestones: [2, 30], warmup_epochs: 5}"]
    assert main(argv) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "  note                  milestones [30] are not reached in 3 epochs\n" in out
    assert "  note                  the warm-up is cut off after 3 epochs, before the peak\n" in out


def test_a_data_set_that_is_named_gives_the_number_of_samples(tmp_path, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, x_train=np.zeros((77, 3), np.float32), y_train=np.zeros(77, np.int64))
    train = f"{{class_path: ddp_sgd.data.Arrays, init_args: {{path: {path}, split: train}}}}"
    assert main([f"--data.train={train}", "--world_size=2"]) == ExitCode.DONE
    assert capsys.readouterr().out == _expected(samples=77, world_size=2)


def test_samples_given_leave_the_data_alone(capsys):
    argv = ["--samples=100", "--data.train.class_path=no_such_package.Data"]
    assert main(argv) == ExitCode.DONE
    assert capsys.readouterr().out == _expected(samples=100)


def _scaled(*, samples=1437, world_size=1, workload, network=None, **sections):
    config = RunConfig.model_validate(sections)
    given = {"compute_s": 0.0125, "micro_batches": 1, "bucket_bytes": 25 * MIB}
    table = scaling_table(
        lambda ranks: make_plan(config, samples=samples, world_size=ranks),
        world_size,
        Workload(**(given | workload)),
        network or Network(bandwidth_gbit=10.0, latency_us=20.0),
    )
    return f"{_expected(samples=samples, world_size=world_size, **sections)}\n{table}\n"


def test_a_measured_step_is_scaled(capsys):
    argv = [*SCALING, "--world_size=100", "--gradient_mb=0.5", "--data.accumulate=2"]
    assert main([*argv, "--parallel.bucket_mb=0.125"]) == ExitCode.DONE
    workload = {"micro_batches": 2, "gradient_bytes": MIB // 2, "bucket_bytes": MIB // 8}
    sections = {"data": {"accumulate": 2}, "parallel": {"bucket_mb": 0.125}}
    assert capsys.readouterr().out == _scaled(world_size=100, workload=workload, **sections)


def test_flat_buffers_are_one_bucket(capsys):
    argv = [*SCALING, "--world_size=8", "--gradient_mb=0.5", "--parallel.bucket_mb=0.125"]
    assert main([*argv, "--parallel.replica=flat"]) == ExitCode.DONE
    workload = {"gradient_bytes": MIB // 2, "bucket_bytes": MIB // 2}
    assert capsys.readouterr().out == _scaled(world_size=8, workload=workload)


def test_hosts_have_links_of_their_own(capsys):
    argv = [*SCALING, "--gradient_mb=0.5", "--ranks_per_host=4", "--local_bandwidth_gbit=200"]
    assert main([*argv, "--world_size=8"]) == ExitCode.DONE
    network = Network(
        bandwidth_gbit=10.0, latency_us=20.0, ranks_per_host=4, local_bandwidth_gbit=200.0
    )
    expected = _scaled(world_size=8, workload={"gradient_bytes": MIB // 2}, network=network)
    assert capsys.readouterr().out == expected


def test_the_model_gives_the_size_of_its_gradients(capsys):
    assert main([*SCALING, "--world_size=2"]) == ExitCode.DONE
    weights = 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    assert capsys.readouterr().out == _scaled(
        world_size=2, workload={"gradient_bytes": 4 * weights}
    )


def test_a_model_that_is_frozen_has_no_gradients(capsys):
    model = "{class_path: torch.nn.Flatten}"
    assert main([*SCALING, f"--model={model}"]) == ExitCode.CONFIG
    words = "model is torch.nn.Flatten, which has nothing to train; name another one, or give --gra"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--step_ms=0"], ExitCode.CONFIG, "--step_ms is 0.0; choose a number in [1e-06, 1e+09]"),
        (["--bandwidth_gbit=0"], ExitCode.CONFIG, "--bandwidth_gbit is 0.0; choose a number in"),
        (["--bandwidth_gbit=nan"], ExitCode.CONFIG, "--bandwidth_gbit is nan; choose a number"),
        (["--bandwidth_gbit=inf"], ExitCode.CONFIG, "--bandwidth_gbit is inf; choose a number"),
        (["--latency_us=-1"], ExitCode.CONFIG, "--latency_us is -1.0; choose a number in [0, "),
        (["--gradient_mb=0"], ExitCode.CONFIG, "--gradient_mb is 0.0; choose a number in"),
        (["--ranks_per_host=0"], ExitCode.CONFIG, "--ranks_per_host is 0; choose a number in [1"),
        (["--local_bandwidth_gbit=-2"], ExitCode.CONFIG, "--local_bandwidth_gbit is -2.0; choose"),
        (["--step_ms=x"], ExitCode.CONFIG, "--step_ms: invalid float value: 'x'; see python -m"),
        (
            ["--step_ms=5"],
            ExitCode.CONFIG,
            "--step_ms is 5 without --bandwidth_gbit; add one, such as --bandwidth_gbit=10, or "
            "leave out --step_ms.",
        ),
        (
            ["--step_ms=5", "--bandwidth_gbit=1"],
            ExitCode.CONFIG,
            "add one, such as --latency_us=10",
        ),
        (["--bandwidth_gbit=1"], ExitCode.CONFIG, "--bandwidth_gbit is 1 without --step_ms; add"),
        (["--latency_us=0"], ExitCode.CONFIG, "--latency_us is 0 without --step_ms; add"),
        (["--gradient_mb=9"], ExitCode.CONFIG, "--gradient_mb is 9 without --step_ms; add"),
        (
            [*SCALING, "--ranks_per_host=8"],
            ExitCode.CONFIG,
            "--ranks_per_host is 8 without --local_bandwidth_gbit; add",
        ),
        (
            [*SCALING, "--local_bandwidth_gbit=8"],
            ExitCode.CONFIG,
            "--local_bandwidth_gbit is 8 without --ranks_per_host; add one, such as "
            "--ranks_per_host=8,",
        ),
        (["--world_size=0"], ExitCode.CONFIG, "--world_size is 0; choose"),
        (["--samples=-3"], ExitCode.CONFIG, "--samples is -3; choose"),
        (["--optim.lrr=1"], ExitCode.CONFIG, "optim.lr"),
        (["--data.tail=drop", "--world_size=64"], ExitCode.CONFIG, "data.batch_size=22 or less"),
        (
            ["--data.train={class_path: itertools.count}"],
            ExitCode.DATA,
            "data.train is itertools.count, which has no length; name a map-style data set",
        ),
        (
            ["--data.train={class_path: no_such_package.Data}"],
            ExitCode.CONFIG,
            "no_such_package",
        ),
    ],
)
def test_faults_are_one_line_with_a_remedy(argv, code, words, capsys):
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ddp_sgd: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_help_names_its_own_options(capsys):
    assert main(["--help"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "--world_size" in out
    assert "--samples" in out
    assert "--step_ms" in out


def test_command_needs_no_torch():
    program = "import sys; sys.argv[0] = 'explain'; from ddp_sgd.explain import main; code = main()"
    check = "; sys.exit(code or (9 if {'torch', 'wandb'} & set(sys.modules) else 0))"
    scaling = ["--gradient_mb=0.5", *SCALING]
    done = subprocess.run(
        [sys.executable, "-c", program + check, "--world_size", "64", *scaling],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    assert done.stdout == _scaled(world_size=64, workload={"gradient_bytes": MIB // 2})
    assert done.stderr == ""


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "ddp_sgd.explain", "--world_size=0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert done.returncode == ExitCode.CONFIG
    assert done.stderr.startswith("ddp_sgd: error: --world_size is 0; ")


def test_an_order_is_evaluated_for_the_batch_of_the_plan(capsys):
    argv = ["--samples=30", "--data.batch_size=4", "--world_size=2"]
    order = "{class_path: orders.by_batch, call: false}"
    assert main([*argv, f"--data.order={order}"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "  order                 by_batch, reads 5 of 30 samples, 5 of them more than\n" in out
    assert "  an epoch              5 steps (40 samples)\n" in out
    assert main([*argv, "--data.order=sequential"]) == ExitCode.DONE
    assert "  order                 sequential\n" in capsys.readouterr().out


def test_an_order_that_fails_is_one_line(capsys):
    order = "{class_path: user_code.Zeros, init_args: {samples: 3}}"
    assert main(["--samples=30", f"--data.order={order}"]) == ExitCode.CONFIG
    words = "data.order is a Zeros; name a function of (n, seed, epoch, global_batch) that returns"
    assert words in capsys.readouterr().err
