import pytest

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.plan import make_plan
from ddp_sgd.scaling import Network, Workload, predict_step, scaling_table

WORKLOAD = Workload(
    compute_s=0.18, micro_batches=1, gradient_bytes=100_000_000, bucket_bytes=25 * 2**20
)
NETWORK = Network(bandwidth_gbit=50.0, latency_us=10.0, ranks_per_host=8, local_bandwidth_gbit=160)

GOLDEN = """\
Scaling on paper
  compute    180 ms per step of one rank alone
  gradients  95.37 MiB in 4 buckets, reduced during 120 ms of backward pass
  ring       50 Gbit/s, 10 us per message; up to 8 ranks on one host: 160 Gbit/s

  ranks    step  waiting  efficiency  samples/s  an epoch   the run
      1  180 ms     0 ms     100.0 %        178       2 h     180 h
      2  181 ms  1.09 ms      99.4 %        353  60.4 min    90.6 h
      4  182 ms  1.66 ms      99.1 %        705  30.3 min    45.5 h
      8  182 ms  2.01 ms      98.9 %      1,406  15.2 min    22.8 h
     16  187 ms  6.71 ms      96.4 %      2,741  7.79 min    11.7 h
     32  187 ms  7.24 ms      96.1 %      5,465  3.91 min    5.86 h
     64  188 ms  7.99 ms      95.8 %     10,887  1.96 min    2.94 h
    128  189 ms  9.32 ms      95.1 %     21,620    59.3 s  88.9 min
    256  192 ms  11.9 ms      93.8 %     42,522    30.1 s  45.2 min"""


def _plan_for(ranks):
    return make_plan(RunConfig(epochs=90), samples=1_281_167, world_size=ranks)


def _rows(text):
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if "efficiency" in line)
    return lines[head + 1 :]


def test_table_word_for_word():
    assert scaling_table(_plan_for, 256, WORKLOAD, NETWORK) == GOLDEN


@pytest.mark.parametrize(
    ("world_size", "ranks"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_ranks_double_up_to_those_asked_for(world_size, ranks):
    rows = _rows(scaling_table(_plan_for, world_size, WORKLOAD, NETWORK))
    assert [int(row.split()[0]) for row in rows] == ranks


def test_an_epoch_is_its_steps_and_a_run_its_epochs():
    network = Network(bandwidth_gbit=1.0, latency_us=100.0)
    row = _rows(scaling_table(_plan_for, 64, WORKLOAD, network))[-1]
    step_s = predict_step(WORKLOAD, network, 64).step_s
    plan = _plan_for(64)
    epoch_s = plan.steps_per_epoch * step_s
    assert f"{1_281_167 / epoch_s:,.0f}" in row
    assert f"{epoch_s / 60:.3g} min" in row
    assert f"{90 * epoch_s / 3600:.3g} h" in row


@pytest.mark.parametrize(
    ("compute_s", "text"),
    [
        (1e-7, "0.0001 ms"),
        (0.0123456, "12.3 ms"),
        (0.9994, "999 ms"),
        (1.0, "1 s"),
        (99.9, "99.9 s"),
        (100.0, "1.67 min"),
        (5999.0, "100 min"),
        (6000.0, "1.67 h"),
        (3.6e7, "10,000 h"),
    ],
)
def test_times_have_three_digits(compute_s, text):
    workload = Workload(compute_s=compute_s, micro_batches=1, gradient_bytes=100, bucket_bytes=100)
    row = _rows(scaling_table(_plan_for, 1, workload, NETWORK))[0]
    assert row.split("  ")[2].strip() == text or f"  {text}  " in row


def test_what_is_assumed_stands_above():
    lean = Workload(compute_s=0.1, micro_batches=4, gradient_bytes=2**20, bucket_bytes=2**20)
    text = scaling_table(_plan_for, 2, lean, Network(bandwidth_gbit=1.0, latency_us=100.0))
    assert "100 ms per step of one rank alone, in 4 micro-batches\n" in text
    assert "1 MiB in one bucket, reduced after the backward pass\n" in text
    assert "1 Gbit/s, 100 us per message\n" in text


def test_text_is_ascii_and_fits_a_terminal():
    text = scaling_table(_plan_for, 1000, WORKLOAD, NETWORK)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
