"""How long work takes on a machine that is not here: every operation by its arithmetic and its bytes.

The roofline model (Williams et al. 2009): an operation takes the longer of its arithmetic at the speed that
matrix products reach and its bytes at the speed that memory reaches, and never less than a kernel's start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Machine:
    """One processor.

    Attributes:
        bf16, float32: FLOP/s that large matrix products reach.
        bandwidth: bytes/s that element-wise work reaches.
        memory: bytes.
        start: seconds from one operation to the next at the least.
    """

    bf16: float
    float32: float
    bandwidth: float
    memory: float
    start: float = 6e-6


# Published peaks (dense bfloat16 products, float32, memory) times what large products and copies reach.
_PRODUCTS, _COPIES = 0.6, 0.8
MACHINES = {
    "a100": Machine(312e12 * _PRODUCTS, 19.5e12 * _PRODUCTS, 2.0e12 * _COPIES, 80e9),
    "h100": Machine(989e12 * _PRODUCTS, 67e12 * _PRODUCTS, 3.35e12 * _COPIES, 80e9),
    "rtx4090": Machine(165e12 * _PRODUCTS, 82e12 * _PRODUCTS, 1.0e12 * _COPIES, 24e9),
    "l4": Machine(121e12 * _PRODUCTS, 30e12 * _PRODUCTS, 0.3e12 * _COPIES, 24e9),
    # Measured on two cores of a server with AVX-512 BF16.
    "cpu": Machine(440e9, 220e9, 22e9, 8e9, 1e-5),
}


class Roofline(TorchDispatchMode):
    """Counts whatever runs inside it, forward and backward; made for `meta` tensors, true of any.

    Attributes:
        flops: a multiply and an add are two.
        seconds: on the machine, one operation after the other.
    """

    def __init__(self, machine: Machine, *, bf16: bool) -> None:
        super().__init__()
        self.machine = machine
        self.rate = machine.bf16 if bf16 else machine.float32
        self.flops = 0.0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._overloadpacket in _FREE:
            return out
        flops = 0.0
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            flops = float(count(*args, **kwargs, out_val=out))
        moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        self.flops += flops
        self.seconds += max(flops / self.rate, moved / self.machine.bandwidth, self.machine.start)
        return out


_FREE = (torch.ops.aten.detach, torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


class Kept:
    """Bytes that a forward pass keeps for its backward pass, each storage once, parameters left out."""

    def __init__(self, parameters: Any) -> None:
        self._ours = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._storages: dict[int, Any] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._ours:
            self._storages[storage._cdata] = storage  # held, so that no other takes its number
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._hooks.__exit__(*problem)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
