"""Bytes of a tensor of any dtype and memory format, for digests, comparisons and broadcasts."""

import torch


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor as bytes, in the order of its indices.

    Args:
        tensor: Any dtype and layout: strided, expanded, sparse or quantized.

    Returns:
        uint8 tensor of shape (nbytes,) on the same device; it shares memory with a contiguous
        tensor, and is a copy of any other.
    """
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return torch.cat([bytes_of(tensor.indices()), bytes_of(tensor.values())])
    if tensor.layout is not torch.strided:
        return torch.cat([bytes_of(part) for part in _compressed_parts(tensor)])
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    packed = tensor.resolve_conj().resolve_neg().contiguous()
    # Not reshape: one element of an expanded tensor counts as contiguous with a stride of 0.
    return packed.as_strided((packed.numel(),), (1,)).view(torch.uint8)


def _compressed_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
