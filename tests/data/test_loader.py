import multiprocessing
import os
import signal
import sys
from collections import UserDict
from itertools import chain
from typing import NamedTuple

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.data import InMemory
from ddp_sgd.data.device import for_movable, move, pin
from ddp_sgd.data.loader import EvalLoader, TrainLoader, _read
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.errors import DataError, lost_worker

CPU = torch.device("cpu")


class Augmented:
    """Real samples with noise that must not depend on who reads them, or when."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.full((2,), float(index)) + torch.rand(2), index


class Dying(Augmented):
    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Sulking(Augmented):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("disk on fire")
        return super().__getitem__(index)


def loader(dataset, rank=0, world_size=1, *, accumulate=2, epochs=2, workers=0, **more):
    order = TrainSampler(
        len(dataset),
        global_batch=4 * accumulate * world_size,
        batch_size=4,
        rank=rank,
        world_size=world_size,
        seed=3,
    )
    return TrainLoader(dataset, order, epochs=epochs, workers=workers, device=CPU, **more)


def read(batches):
    return [
        (
            b.step,
            b.samples,
            [(m.inputs.tolist(), m.targets.tolist(), m.samples) for m in b.micro_batches],
        )
        for b in batches
    ]


@pytest.fixture
def workers_may_be_forked(recwarn):
    return recwarn


def test_steps_count_on_and_the_last_micro_batch_is_marked():
    steps = list(loader(Augmented()).from_step(0))
    assert [b.step for b in steps] == list(range(6))
    assert [b.samples for b in steps] == [8, 8, 7] * 2
    assert [[m.samples for m in b.micro_batches] for b in steps] == [[4, 4], [4, 4], [4, 3]] * 2
    assert [[m.is_last for m in b.micro_batches] for b in steps] == [[False, True]] * 6


@pytest.mark.parametrize("start", [1, 2, 3, 5, 6])
def test_starting_late_gives_the_same_batches(start):
    assert (
        read(loader(Augmented()).from_step(start)) == read(loader(Augmented()).from_step(0))[start:]
    )


class Counted(Augmented):
    """Samples that are counted where they are read."""

    def __init__(self):
        self.read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("total_steps", [1, 3, 4, 5])
def test_a_run_that_ends_within_an_epoch_has_the_first_batches_of_it(total_steps, workers):
    epochs = -(-total_steps // 3)
    cut = {"epochs": epochs, "total_steps": total_steps, "workers": workers}
    steps = read(loader(Augmented(), **cut).from_step(0))
    assert steps == read(loader(Augmented()).from_step(0))[:total_steps]
    assert read(loader(Augmented(), **cut).from_step(total_steps)) == []


def test_no_sample_is_read_beyond_the_end_of_a_run():
    samples = Counted()
    read(loader(samples, epochs=2, total_steps=4).from_step(0))
    assert samples.read == 23 + 8


def test_worker_processes_change_nothing():
    assert read(loader(Augmented(), workers=2).from_step(0)) == read(
        loader(Augmented()).from_step(0)
    )


@pytest.fixture
def as_in_python_3_14(monkeypatch):
    """Make a fork server the default, which somebody has used, so that it seems chosen."""
    methods = ["forkserver", "fork", "spawn"]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    _choose_start_method(monkeypatch, "forkserver")


def _choose_start_method(monkeypatch, method):
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms start by spawn")
@pytest.mark.usefixtures("workers_may_be_forked", "as_in_python_3_14")
def test_data_set_that_no_pickle_holds_is_read_by_workers_on_linux():
    class Local(Augmented):
        pass

    assert read(loader(Local(), workers=2).from_step(0)) == read(loader(Local()).from_step(0))


@pytest.mark.usefixtures("workers_may_be_forked")
def test_workers_that_are_spawned_change_nothing(monkeypatch):
    _choose_start_method(monkeypatch, "spawn")
    assert read(loader(Augmented(), workers=1).from_step(0)) == read(
        loader(Augmented()).from_step(0)
    )


def test_ranks_read_the_same_samples_with_the_same_noise():
    alone = {}
    for batch in loader(Augmented(), accumulate=2).from_step(0):
        for m in batch.micro_batches:
            alone |= {
                (batch.step, i): x
                for x, i in zip(m.inputs.tolist(), m.targets.tolist(), strict=True)
            }
    shared = {}
    for rank in range(2):
        for batch in loader(Augmented(), rank, 2, accumulate=1).from_step(0):
            for m in batch.micro_batches:
                shared |= {
                    (batch.step, i): x
                    for x, i in zip(m.inputs.tolist(), m.targets.tolist(), strict=True)
                }
    assert shared == alone


def test_the_model_s_random_numbers_are_left_alone():
    batches = loader(InMemory(torch.zeros(23, 2), torch.zeros(23))).from_step(0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(batches)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_one_line(workers):
    with pytest.raises(
        DataError, match=r"^data.train\[7\] cannot be read, OSError: disk on fire; "
    ) as caught:
        list(loader(Sulking(), workers=workers).from_step(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(5, "Input/output error"),
    ],
)
def test_an_error_that_no_lost_process_explains_passes_unchanged(error):
    def batches():
        raise error
        yield

    assert lost_worker(error) is None
    with pytest.raises(type(error)) as caught:
        next(_read(batches()))
    assert caught.value is error


def kill_a_worker(runtime):
    list(loader(Dying(), workers=1).from_step(0))


def test_a_killed_worker_is_told_plainly():
    (error,) = run_ranks(1, kill_a_worker, raises=True)
    assert error.error == "LostWorkerError"
    assert "data.workers lost a process" in error.text


def signal_the_workers(runtime):
    batches = loader(Augmented(), workers=2).from_step(0)
    next(batches)
    import multiprocessing

    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    return len(list(batches))


def test_workers_leave_signals_to_the_rank():
    assert run_ranks(1, signal_the_workers) == [5]


def test_evaluation_reads_chunks_in_order_and_always_alike():
    seen = []
    for rank in range(3):
        chunks = EvalSampler(23, batch_size=5, rank=rank, world_size=3)
        held_out = EvalLoader(Augmented(), chunks, seed=3, workers=0, device=CPU)
        first, second = list(held_out), list(held_out)
        assert [(c, x.tolist()) for c, _, x, _ in first] == [
            (c, x.tolist()) for c, _, x, _ in second
        ]
        assert [samples for _, samples, _, _ in first] == [len(x) for _, _, x, _ in first]
        seen += [(chunk, targets.tolist()) for chunk, _, _, targets in first]
    assert list(chain(*(targets for _, targets in sorted(seen)))) == list(range(23))


def test_containers_move_as_a_whole():
    value = {"a": [torch.zeros(1), (torch.ones(2), "text")]}
    moved = move(value, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert moved["a"][1][1] == "text"


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_packed_sequences_move_with_their_lengths_on_the_host():
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)])
    (moved,) = move([packed], torch.device("meta"))
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


class Encoding(UserDict):
    """As a tokenizer gives it: a mapping with attributes, that moves itself."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.items()})


def test_objects_move_themselves():
    moved = move((Encoding(ids=torch.zeros(2)), 3), torch.device("meta"))
    assert isinstance(moved[0], Encoding)
    assert moved[0]["ids"].device.type == "meta"
    assert moved[1] == 3


class Pinned(Encoding):
    def pin_memory(self):
        return "pinned"


def test_what_cannot_be_pinned_stays_as_it_is():
    """A mapping that cannot be pinned keeps its type: a model sees the same on each device."""
    encoding = Encoding(ids=3)
    assert for_movable([encoding, {"a": Pinned()}], pin) == [encoding, {"a": "pinned"}]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, device="meta"), torch.eye(2).to_sparse()],
)
def test_tensors_on_a_device_and_sparse_ones_are_not_pinned(tensor):
    """torch would raise: it locks the memory of dense tensors on the host only."""
    assert pin(tensor) is tensor


class Packed:
    """A packed sequence on a GPU, as far as pinning goes."""

    is_cuda = True

    def pin_memory(self):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor'")


def test_packed_sequences_on_a_device_are_not_pinned():
    packed = Packed()
    assert pin(packed) is packed


def test_mappings_of_any_type_move():
    moved = move(UserDict(ids=torch.zeros(2)), torch.device("meta"))
    assert moved["ids"].device.type == "meta"


def pad(samples):
    """Form a batch of rows of different lengths, with noise of its own."""
    rows = [row[: 1 + index % 3] for row, index in samples]
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return inputs + torch.rand(inputs.shape), torch.tensor([index for _, index in samples])


@pytest.mark.parametrize("start", [0, 1, 4])
def test_what_a_collate_function_draws_is_the_same_after_a_restart_and_in_workers(start):
    def batches(workers, start):
        return read(loader(Augmented(), workers=workers, collate=pad).from_step(start))

    expected = batches(0, 0)
    assert batches(2, start) == batches(0, start) == expected[start:]
    assert expected[0][2] != expected[3][2]  # another epoch


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_that_fails_is_one_line(workers):
    def fail(samples):
        raise ValueError("no\nluck")

    with pytest.raises(
        DataError, match=r"^data.collate is .*fail, which fails for 4 samples of data.train, "
    ) as caught:
        list(loader(Augmented(), workers=workers, collate=fail).from_step(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("collate", "cause"),
    [
        (lambda samples: (torch.zeros(2), lambda: 3), "lambda"),
        (lambda samples: (torch.zeros(2, requires_grad=True) + 1, 3), "requires_grad"),
    ],
)
def test_a_batch_that_cannot_leave_its_process_is_one_line(collate, cause):
    with pytest.raises(
        DataError,
        match=rf"^data.workers is 1 while a batch of data.train cannot leave its loader process, "
        rf"\w+: .*{cause}.*; return tensors without gradients and plain containers, or set "
        r"data.workers=0\.$",
    ):
        list(loader(Augmented(), workers=1, collate=collate).from_step(0))
    assert list(loader(Augmented(), workers=0, collate=collate).from_step(0))


def test_chunks_are_counted_by_their_indices():
    """Whatever a batch looks like: here one number, and a text, for all its samples."""
    chunks = EvalSampler(23, batch_size=5, rank=0, world_size=1)
    held_out = EvalLoader(
        Augmented(), chunks, seed=3, workers=0, device=CPU, collate=lambda each: (len(each), "text")
    )
    read_again = [tuple(held_out), tuple(held_out)]
    expected = tuple((chunk, n, n, "text") for chunk, n in enumerate([5, 5, 5, 5, 3]))
    assert read_again == [expected, expected]


def test_named_tuples_keep_their_names():
    moved = move(Pair(torch.zeros(1), torch.zeros(2)), torch.device("meta"))
    assert isinstance(moved, Pair)
    assert moved.right.device.type == "meta"


def test_small_batches_are_read_together_and_yet_one_by_one(monkeypatch):
    calls = []
    take = InMemory.__getitems__
    monkeypatch.setattr(
        InMemory, "__getitems__", lambda self, rows: (calls.append(len(rows)), take(self, rows))[1]
    )
    monkeypatch.setattr(InMemory.__getitems__, "__module__", "ddp_sgd.data.datasets")
    data = InMemory(torch.arange(23.0), torch.arange(23))
    together = read(loader(data, epochs=1).from_step(0))
    assert calls == [4, 19]  # the first batch tells how large they are
    assert together == read(loader([data[i] for i in range(23)], epochs=1).from_step(0))


class Whole(Augmented):
    """Whole batches with noise, and the number of rows of each reading."""

    def __init__(self, width=2):
        self.width = width
        self.rows = []

    def __getitems__(self, indices):
        self.rows.append(len(indices))
        noise = torch.rand(len(indices), self.width)
        return {"x": noise}, torch.tensor(indices)


@pytest.mark.parametrize(("width", "in_a_row"), [(2, 8), (1 << 12, 3), (1 << 15, 1)])
def test_small_batches_of_ones_own_are_read_in_a_row(width, in_a_row):
    data = Whole(width)
    steps = TrainSampler(100, global_batch=4, batch_size=4, rank=0, world_size=1, seed=3)
    batches = TrainLoader(data, steps, epochs=1, workers=0, device=CPU).from_step(0)
    data.rows.clear()  # of the look at what the method gives
    next(batches)
    assert data.rows == [4]
    next(batches)
    assert data.rows == [4] * (1 + in_a_row)


@pytest.mark.parametrize("start", [1, 5, 9])
def test_batches_of_ones_own_do_not_depend_on_where_a_run_begins(start):
    def inputs(first):
        steps = TrainSampler(100, global_batch=4, batch_size=4, rank=0, world_size=1, seed=3)
        batches = TrainLoader(Whole(), steps, epochs=1, workers=0, device=CPU).from_step(first)
        return [batch.micro_batches[0].inputs["x"].tolist() for batch in batches]

    assert inputs(0)[start:] == inputs(start)


def test_a_batch_of_ones_own_that_cannot_be_read_comes_in_its_turn():
    class Bad(Whole):
        def __getitems__(self, indices):
            if len(self.rows) == 5:
                raise OSError("disk on fire")
            return super().__getitems__(indices)

    steps = TrainSampler(100, global_batch=4, batch_size=4, rank=0, world_size=1, seed=3)
    batches = TrainLoader(Bad(), steps, epochs=1, workers=0, device=CPU).from_step(0)
    for _ in range(4):
        next(batches)
    with pytest.raises(DataError, match="disk on fire"):
        next(batches)
