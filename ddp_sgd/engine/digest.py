"""Digest of a model's weights."""

import hashlib

import torch
from torch import nn

from ddp_sgd.tensor_bytes import bytes_of


def weights_digest(model: nn.Module) -> str:
    """Hash all parameters and buffers.

    Args:
        model: Module on any device; with equal names, types, shapes and bytes the digest is equal.

    Returns:
        SHA-256 over the name, dtype, shape and bytes of each tensor, in state-dict order, in
        hexadecimal.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        shape = "x".join(map(str, value.shape))
        digest.update(f"{name}:{value.dtype}:{shape}:".encode())
        digest.update(bytes_of(value.cpu()).numpy().data)
    return digest.hexdigest()
