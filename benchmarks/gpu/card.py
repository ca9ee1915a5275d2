"""A large card that behaves like a small one, for whoever allocates in this process."""

import torch

GiB = 2**30
OUTSIDE = GiB // 2
"""Of a card's memory, what CUDA's context takes and torch's allocator never gets: assumed."""


def pretend_card(gib: float) -> int | None:
    """Caps torch's allocator at a card of so many GiB, for the rest of the process; returns the cap in bytes.

    Unsloth sizes its chunks from the free memory that it is told, so the telling is capped as well. Without a GPU, or
    where the card is no larger than that, nothing is capped, and the return value is None.
    """
    if not torch.cuda.is_available():
        return None
    real_mem_get_info = torch.cuda.mem_get_info
    _, total = real_mem_get_info()
    cap = int(gib * GiB) - OUTSIDE
    if cap >= total:
        return None
    torch.cuda.empty_cache()  # what loading left behind counts, too
    torch.cuda.set_per_process_memory_fraction(cap / total)

    def mem_get_info(device: object = None) -> tuple[int, int]:
        free, _ = real_mem_get_info(device)
        return max(0, min(free, cap - torch.cuda.memory_reserved(device))), cap

    torch.cuda.mem_get_info = mem_get_info
    # Who asks for the fraction multiplies it with the total above, which is the cap already.
    torch.cuda.get_per_process_memory_fraction = lambda device=None: 1.0
    return cap
