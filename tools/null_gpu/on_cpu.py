"""PyTorch's operations on the null GPU, computed by their CPU kernels: the card's memory is the host's."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# They make or describe memory, and compute nothing.
MEMORY = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "detach", "alias",
    "lift_fresh", "_unsafe_view", "record_stream", "is_pinned", "_pin_memory",
}  # fmt: skip


def launches() -> int:
    """Kernels and matrix products that this process asked the card for, none of which was computed."""
    return _counter().value


@cache
def _counter() -> ctypes.c_long:
    return ctypes.c_long.in_dll(ctypes.CDLL(None), "nullgpu_launches")


def tensors_in(*values: Any) -> list[Tensor]:
    """Those of an operation's arguments or results, in their order: as PyTorch's pytree, at a tenth of its time."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


class ComputedOnCPU(TorchDispatchMode):
    """Inside, an operation on tensors of the null GPU leaves what the CPU computes for it, in the card's memory.

    Autograd, autocast and the choice of kernels happen before, as on a GPU. What does not pass PyTorch's dispatcher
    is not computed: CUDA and Triton kernels that are called directly; launches() tells of them.
    """

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = tensors_in(args, kwargs)
        is_on_card = any(t.is_cuda for t in tensors) or _is_card(kwargs.get("device"))
        if not is_on_card or any(t.is_meta for t in tensors) or _computes_nothing(func):
            return func(*args, **kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: OpOverload, args: tuple, kwargs: dict) -> Any:
        return compute(func, args, kwargs)


@cache
def _is_composite(func: OpOverload) -> bool:
    """Made of other operations, and not by a kernel of its own on a GPU (silu_backward has both)."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CUDA")


@cache
def _computes_nothing(func: OpOverload) -> bool:
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return is_view or func._schema.name.partition("::")[2] in MEMORY


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def compute(func: OpOverload, args: tuple, kwargs: dict) -> Any:
    name = func._schema.name.partition("::")[2]
    result, originals = result_on_cpu(func, args, kwargs)
    if name == "copy_":  # writes into its first argument, wherever that is
        return args[0]
    if name == "_to_copy" and not _is_card(kwargs.get("device") or args[0].device):
        return result

    def to_card(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return originals[id(x)][1] if id(x) in originals else on_card(x)

    return tree_map(to_card, result)


def result_on_cpu(func: OpOverload, args: tuple, kwargs: dict) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """What the CPU's kernel gives, and the arguments: (in the memory of the card, its own tensor) by id of the first.

    What it writes in place is written on the card.
    """
    originals: dict[int, tuple[Tensor, Tensor]] = {}  # keeps them alive, and so their ids

    def to_cpu(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_cuda:
            same = same_memory(x)
            originals[id(same)] = same, x
            return same
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device("cpu")
        return None if isinstance(x, torch.Generator) else x

    cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
    for key in ("pin_memory", "non_blocking"):
        cpu_kwargs.pop(key, None)
    if func._schema.name == "aten::_log_softmax" and cpu_args[2]:  # float16 to float32 at once, as no CPU kernel does
        cpu_args = (cpu_args[0].float(), cpu_args[1], False)
    return func(*cpu_args, **cpu_kwargs), originals


def same_memory(tensor: Tensor) -> Tensor:
    """A CPU tensor in the memory of one on the card."""
    storage = tensor.untyped_storage()
    if tensor.numel() == 0 or storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    cpu_storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    cpu_tensor = torch.empty(0, dtype=tensor.dtype)
    return cpu_tensor.set_(cpu_storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_card(tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")
    if tensor.numel():
        same_memory(copy).copy_(tensor)
    return copy
