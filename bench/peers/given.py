"""A torch model whose gradients are given: parameters by shape, values from one small pool.

All gradients are cut from the same pool of fixed random values, as long as the largest tensor, so
that they cost no memory of their own. It differs from rank to rank.
"""

from __future__ import annotations

import shapes
import torch

THREADS = 1  # as torchrun sets it, and as fits a machine whose cores all have a process


class Given(torch.nn.Module):
    """Parameters of these shapes."""

    def __init__(self, size: str, rank: int) -> None:
        super().__init__()
        torch.set_num_threads(THREADS)
        cut = shapes.shapes_of(size)
        torch.manual_seed(0)
        self.tensors = torch.nn.ParameterList(torch.randn(shape) * 0.05 for shape in cut)
        torch.manual_seed(1 + rank)
        pool = torch.randn(max(map(shapes.numel, cut))) * 1e-2
        self.given = [pool[: shapes.numel(shape)].view(shape) for shape in cut]

    @torch.no_grad()
    def fill(self) -> None:
        """Copy the given values into the gradients, which keep their memory."""
        for tensor, given in zip(self.tensors, self.given, strict=True):
            if tensor.grad is None:
                tensor.grad = torch.empty_like(tensor)
            tensor.grad.copy_(given)
