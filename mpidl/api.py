"""Small functions for loops of one's own: who am I, wait for all, add up, tell all.

All but the first three are collective: every rank must call them, in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidl.runtime import init


def rank() -> int:
    """This rank, 0 <= rank < size; ranks of one node follow each other."""
    return init().rank


def size() -> int:
    """The number of ranks."""
    return init().size


def local_rank() -> int:
    """This rank among those of its node."""
    return init().local_rank


def barrier() -> None:
    """Wait for every rank. Collective."""
    init().barrier()


def allreduce(value: Any, operation: str = "sum") -> Any:
    """Add numbers or arrays up over all ranks, or take their "min" or "max". Collective.

    Args:
        value: a number, a NumPy array or a torch tensor on the CPU; same shape and dtype on every rank.
        operation: "sum", "min" or "max".

    Returns:
        The same kind of thing; a new one. Sums of floats may depend on the number of ranks in the last bits.
    """
    if hasattr(value, "detach"):
        import torch

        array = value.detach().contiguous().numpy()
        return torch.from_numpy(init().allreduce(array.reshape(-1), operation)).view(value.shape)
    result = init().allreduce(np.atleast_1d(np.asarray(value)), operation)
    if isinstance(value, np.ndarray):
        return result.reshape(value.shape)
    return type(value)(result[0])


def broadcast_object(value: Any, root: int = 0) -> Any:
    """The root's object on every rank; it is pickled. Collective."""
    return init().broadcast_object(value, root)
