"""Which recipe suits the machine that a notebook was given."""

from apo_lora.machine.host import Gpu

GiB = 2**30


def suited_recipe(gpu: Gpu | None) -> str:
    """Name of the shipped recipe: the largest 3B recipe that the GPU allows, the embedded model without a GPU."""
    if gpu is None:
        return "tiny_cpu"
    if gpu.total_bytes < 14 * GiB:
        return "gpu_8gb"
    if gpu.total_bytes < 22 * GiB or gpu.dtype == "float16":
        return "colab_t4"
    return "single_gpu"


def banner(gpu: Gpu | None, recipe_name: str) -> list[str]:
    """GPU, memory, number format and recipe, a line each."""
    if gpu is None:
        return [
            "No GPU here: the embedded tiny model trains on the CPU, which shows every step at a small scale.",
            "For Qwen2.5-VL-3B choose Runtime > Change runtime type > T4 GPU, then Run all again.",
            f"Recipe    {recipe_name}.yaml",
        ]
    return [
        f"GPU       {gpu.name}",
        f"Memory    {gpu.total_bytes / GiB:.1f} GiB, {gpu.free_bytes / GiB:.1f} free",
        f"Precision {gpu.dtype}",
        f"Recipe    {recipe_name}.yaml",
    ]
