"""Whatever a pass changes is put back, and listed before that."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from ddp_sgd.engine.side_effects import undo_side_effects

HOST = [torch.default_generator]


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("read", torch.zeros(2))
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)
        self.register_buffer("none", None)
        self.number = 1
        self.containers = {"list": [1]}
        self.queue = deque([1], maxlen=3)
        self.names = {"a"}


def test_a_block_that_does_nothing_changes_nothing():
    module = Holder()
    with undo_side_effects([module], HOST) as effects:
        module.read.sum()
        assert effects.changed_buffers() == []
        assert effects.changed_parameters() == []
        assert not effects.draws_from_random
        assert not effects.draws_from_numpy


def write_equal(module):
    module.written.add_(0.0)  # the same values: it was written all the same


def assign(module):
    module.written = module.written + 1


def through_data(module):
    module.written.data.add_(1)


def by_numpy(module):
    module.written.numpy()[0] = 7


def resize(module):
    module.written.resize_(5).fill_(2.0)


def resize_and_write_within(module):
    module.written.resize_(1)


@pytest.mark.parametrize(
    "change", [write_equal, assign, through_data, by_numpy, resize, resize_and_write_within]
)
def test_a_changed_buffer_is_listed_and_restored(change):
    module = Holder()
    buffer = module.written
    with undo_side_effects([module], HOST) as effects:
        change(module)
        assert effects.changed_buffers() == [(module, "written")]
    assert module.written is buffer
    assert buffer.tolist() == [0, 0]


def test_a_buffer_that_had_no_size():
    module = Holder()
    with undo_side_effects([module], HOST) as effects:
        module.empty.resize_(4).fill_(3.0)
        assert effects.changed_buffers() == [(module, "empty")]
    assert module.empty.shape == (0,)


def test_parameters_gradients_attributes_and_containers():
    module = Holder()
    gradient = module.weight.grad = torch.ones(3)
    with undo_side_effects([nn.Sequential(module)], HOST) as effects:
        assert module.weight.grad is None
        module.weight.grad = torch.zeros(3)
        module.weight.data.add_(1)
        module.number, module.new = 2, 3
        module.containers["list"] = 5
        module.queue.append(2)
        module.names.add("b")
        module.register_buffer("later", torch.zeros(1))
        assert effects.changed_parameters() == [module.weight]
        assert effects.changed_buffers() == [(module, "later")]
    assert module.weight.tolist() == [0, 0, 0]
    assert module.weight.grad is gradient
    assert (module.number, module.containers) == (1, {"list": [1]})
    assert (list(module.queue), module.queue.maxlen, module.names) == ([1], 3, {"a"})
    assert not hasattr(module, "new")
    assert not hasattr(module, "later")


def test_it_is_undone_after_an_error_too():
    module = Holder()
    with pytest.raises(KeyError), undo_side_effects([module], HOST):
        module.written.add_(1)
        raise KeyError
    assert module.written.tolist() == [0, 0]


def test_random_numbers():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with undo_side_effects([], HOST) as effects:
        random.random()
        assert (effects.draws_from_random, effects.draws_from_numpy) == (True, False)
        for _ in range(700):  # once around: the position may be the same again
            np.random.rand()
        torch.rand(3)
        assert effects.draws_from_numpy
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_a_shared_memory_comes_back_once():
    whole = torch.zeros(4)
    module = nn.Module()
    module.register_buffer("first", whole[:2])
    module.register_buffer("second", whole[2:])
    with undo_side_effects([module], HOST):
        module.first.add_(1)
    assert whole.tolist() == [0, 0, 0, 0]


def test_sparse_buffers_are_left_alone():
    module = nn.Module()
    module.register_buffer("graph", torch.eye(2).to_sparse())
    with undo_side_effects([module], HOST) as effects:
        assert effects.changed_buffers() == []


def test_a_lazy_module_may_get_its_shape():
    model = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3))
    with undo_side_effects([model], HOST):
        model(torch.ones(2, 5))
    assert model[0].weight.shape == (3, 5)
    assert type(model[0]) is nn.Linear
    assert model[1].num_batches_tracked == 0
    again = nn.Sequential(nn.LazyLinear(3))
    again.load_state_dict({"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3)})
    with undo_side_effects([again], HOST):  # it becomes a Linear, and lazy again
        again(torch.ones(2, 5))
    assert again(torch.ones(2, 5)).tolist() == [[6, 6, 6]] * 2
