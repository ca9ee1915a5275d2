"""The memory plan and the modelled time as `apo-lora plan` prints them."""

from collections.abc import Iterator, Sequence

from apo_lora.family.lookup import find_shape
from apo_lora.family.shape import ModelShape
from apo_lora.preflight.memory_plan import (
    MOMENTS,
    OVERHEAD,
    GiB,
    Plan,
    Row,
    largest_group,
    load_of,
    plan,
    server_needs,
    server_share,
)
from apo_lora.preflight.time_plan import time_table
from apo_lora.recipe.schema import Recipe
from apo_lora.run.tables import aligned

USUAL_SIZES = (8, 16, 24)
"""GiB; shown when no GPU memory is given."""

COMPLETION_LENGTHS = (256, 512, 1024, 2048, 4096)

REMEDIES = {
    "prefill": "grpo.prompts_per_step or data.max_pixels",
    "decode": "grpo.prompts_per_step, grpo.num_generations or grpo.max_completion_length",
    "score": "grpo.completions_per_pass, grpo.max_completion_length or data.max_pixels",
    "train": "grpo.completions_per_pass, grpo.max_completion_length or data.max_pixels",
}


def print_plan(name: str, recipe: Recipe, *, gpu_memory: float | None = None) -> bool:
    """`apo-lora plan`: prints what the recipe needs. False where it is more than `gpu_memory` (GiB).

    `gpu_memory` defaults to that of the visible GPU, if any. Raises ModelError for a base whose sizes are not known.
    """
    shape = find_shape(recipe.model.name, recipe.model.revision)
    planned, gpu_memory = plan(shape, recipe), gpu_memory or _visible_gpu()
    print("\n".join(plan_lines(name, recipe, shape, planned, gpu_memory)))
    if gpu_memory is None:
        return True
    has_room = not server_share(recipe) or completions_of_server(recipe, shape, gpu_memory) > 0
    return has_room and planned.total <= gpu_memory * (1 - server_share(recipe)) * GiB


def _visible_gpu() -> float | None:
    """GiB of the GPU, where there is one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GiB if torch.cuda.is_available() else None


def plan_lines(name: str, recipe: Recipe, shape: ModelShape, planned: Plan, gpu_memory: float | None) -> Iterator[str]:
    """The whole report; `gpu_memory` in GiB, where one is given or visible."""
    load = planned.load
    yield f"{name}: {recipe.model.name}. An estimate in GiB, not yet compared with a measured GPU run."
    yield (
        f"A rollout samples {load.rollout} completions at once and a pass trains on {load.rows}; prompts have at most "
        f"{load.prompt:,} tokens ({load.image:,} of an image), completions at most {load.completion:,}."
    )
    if recipe.rollout.engine == "vllm":
        yield "vLLM samples. The table is without it."
        yield from _server_lines(recipe, shape, gpu_memory)
    yield ""
    yield from _part_table(planned)
    yield ""
    yield from _verdict(planned, gpu_memory, server_share(recipe))
    yield ""
    yield from _group_table(recipe, shape, (gpu_memory,) if gpu_memory else USUAL_SIZES)
    yield ""
    yield "Time of a step at full length, modelled from its launches, bytes and arithmetic and never measured:"
    yield from aligned(time_table(shape, recipe))


def completions_of_server(recipe: Recipe, shape: ModelShape, gpu_memory: float) -> int:
    """Of full length, that its share of the GPU has cache for at once."""
    weights, cache = server_needs(shape, recipe)
    return max(0, int((gpu_memory * server_share(recipe) * GiB - weights - OVERHEAD) // cache))


def _server_lines(recipe: Recipe, shape: ModelShape, gpu_memory: float | None) -> Iterator[str]:
    share, (weights, cache) = server_share(recipe), server_needs(shape, recipe)
    if not share:
        yield "The servers of rollout.servers have memory of their own."
        return
    yield (
        f"Its server takes {share:.0%} of the GPU at its start (rollout.vllm_gpu_memory_utilization): "
        f"{weights / GiB:.2f} for weights, {cache / GiB:.3f} per completion at once."
    )
    if gpu_memory is not None:
        wanted = load_of(recipe, shape).rollout
        room = min(wanted, completions_of_server(recipe, shape, gpu_memory))
        end = "" if room else ": it would not start; raise rollout.vllm_gpu_memory_utilization"
        yield f"In {gpu_memory * share:.2f} it computes {room:,} of the rollout's {wanted:,} completions at once{end}."


def _part_table(planned: Plan) -> list[str]:
    head = ["part", *MOMENTS, ""]
    parts = [[row.part, *(_cell(row, moment) for moment in MOMENTS), row.how] for row in planned.rows]
    peaks = ["peak of torch's allocator", *(f"{planned.peaks[m] / GiB:.2f}" for m in MOMENTS), ""]
    return aligned([head, *parts, peaks], left=(0, len(head) - 1))


def _cell(row: Row, moment: str) -> str:
    if moment not in row.moments:
        return ""
    return f"{row.bytes / GiB:.2f}" if row.bytes >= 0.005 * GiB else "<0.01"


def _verdict(planned: Plan, gpu_memory: float | None, share: float) -> Iterator[str]:
    largest, needed = max(planned.peaks, key=planned.peaks.__getitem__), planned.total / GiB
    yield (
        f"Needed: {needed:.2f} = {planned.peaks[largest] / GiB:.2f} ({largest}) + {OVERHEAD / GiB:.2f} for "
        "CUDA's context and fragmentation (assumed)"
    )
    if gpu_memory is None:
        return
    left = gpu_memory * (1 - share)
    gpu = f"a GPU with {gpu_memory:g} GiB" + (f", of which vLLM leaves {left:.2f}" if share else "")
    if needed <= left:
        yield f"Fits {gpu}; {left - needed:.2f} to spare."
    else:
        yield f"Does not fit {gpu}: {needed - left:.2f} too much; lower {REMEDIES[largest]}."


def _group_table(recipe: Recipe, shape: ModelShape, sizes: Sequence[float]) -> list[str]:
    rows = [
        [
            f"{gpu_memory:g}",
            str(prompts),
            *(_largest(recipe, shape, gpu_memory, prompts, completion) for completion in COMPLETION_LENGTHS),
        ]
        for gpu_memory in sizes
        for prompts in sorted({1, recipe.prompts_per_rollout})
    ]
    title = "Largest num_generations that fits with completions_per_pass 1, by max_completion_length (up to 64):"
    return [title, *aligned([["GPU memory", "prompts per rollout", *map(str, COMPLETION_LENGTHS)], *rows])]


def _largest(recipe: Recipe, shape: ModelShape, gpu_memory: float, prompts: int, completion: int) -> str:
    left = int(gpu_memory * (1 - server_share(recipe)) * GiB)
    return str(largest_group(shape, recipe, left, prompts=prompts, completion=completion) or "none")
