import hashlib

import torch
from torch import nn

from ddp_sgd.engine.result import weights_digest


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer("brief", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("secret", torch.ones(1), persistent=False)


def test_the_recipe_is_names_types_shapes_and_bytes_in_order():
    model = Mixed()
    text = b"weight:torch.float32:2x3:" + model.weight.detach().numpy().tobytes()
    text += b"brief:torch.bfloat16:2:" + b"\x80\x3f\x80\x3f"
    text += b"count:torch.int64::" + (3).to_bytes(8, "little") + b"empty:torch.float32:0:"
    assert weights_digest(model) == hashlib.sha256(text).hexdigest()


def test_one_bit_of_a_weight_or_buffer_shows():
    digests = {weights_digest(Mixed())}
    for change in (
        lambda m: m.weight.data.view(torch.int32)[1, 2].bitwise_xor_(1),
        lambda m: m.count.add_(1),
    ):
        model = Mixed()
        change(model)
        digests.add(weights_digest(model))
    assert len(digests) == 3


def test_memory_layout_does_not_matter():
    model = Mixed()
    before = weights_digest(model)
    model.weight.data = model.weight.data.t().contiguous().t()
    assert weights_digest(model) == before
