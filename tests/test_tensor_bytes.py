import pytest
import torch

from ddp_sgd.tensor_bytes import bytes_of

MATRIX = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "tensor",
    [
        MATRIX,
        MATRIX.t(),
        MATRIX[:, ::2],
        torch.ones(1).expand(5),
        torch.ones(1).expand(5).narrow(0, 0, 1),  # one element with a stride of 0
        torch.tensor(3),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        MATRIX.to(torch.bfloat16),
        MATRIX.to(torch.float8_e4m3fn),
        MATRIX.to(torch.uint16),
        torch.complex(MATRIX, -MATRIX).conj(),
        MATRIX.clone().requires_grad_(),
    ],
)
def test_bytes_are_those_of_the_numbers_in_order(tensor):
    found = bytes_of(tensor)
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    plain.copy_(tensor.detach())
    assert found.dtype == torch.uint8
    assert found.shape == (tensor.numel() * tensor.element_size(),)
    assert bytes(found.tolist()) == bytes(plain.reshape(-1).view(torch.uint8).tolist())


def test_contiguous_memory_is_shared():
    assert bytes_of(MATRIX).data_ptr() == MATRIX.data_ptr()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_tensors_differ_by_place_and_value(kind):
    eye = torch.eye(3)
    one, same, other, moved = (getattr(t, kind)() for t in (eye, eye, 2 * eye, eye.flip(0)))
    assert torch.equal(bytes_of(one), bytes_of(same))
    assert not torch.equal(bytes_of(one), bytes_of(other))
    assert not torch.equal(bytes_of(one), bytes_of(moved))


@pytest.mark.filterwarnings("ignore")  # torch calls quantized tensors deprecated
def test_quantized_tensors():
    quantized = torch.quantize_per_tensor(MATRIX, 0.5, 0, torch.qint8)
    assert bytes_of(quantized).tolist() == [0, 2, 4, 6, 8, 10]
