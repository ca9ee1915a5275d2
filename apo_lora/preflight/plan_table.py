"""The memory plan as `apo-lora plan` prints it."""

from collections.abc import Iterator, Sequence

from apo_lora.family.shape import ModelShape
from apo_lora.preflight.memory_plan import MOMENTS, OVERHEAD, GiB, Plan, Row, largest_group
from apo_lora.recipe.schema import Recipe
from apo_lora.run.tables import aligned

USUAL_CARDS = (8, 16, 24)
"""GiB, where no card is given."""

COMPLETION_LENGTHS = (256, 512, 1024, 2048, 4096)

REMEDIES = {
    "prefill": "grpo.prompts_per_step or data.max_pixels",
    "decode": "grpo.prompts_per_step, grpo.num_generations or grpo.max_completion_length",
    "score": "grpo.completions_per_pass, grpo.max_completion_length or data.max_pixels",
    "train": "grpo.completions_per_pass, grpo.max_completion_length or data.max_pixels",
}


def plan_lines(name: str, recipe: Recipe, shape: ModelShape, plan: Plan, card: float | None) -> Iterator[str]:
    """The whole report; `card` in GiB, where one is given or visible."""
    load = plan.load
    yield f"{name}: {recipe.model.name}. An estimate; not yet compared with a measured GPU run. GiB."
    yield (
        f"A rollout samples {load.rollout} completions at once, a pass trains {load.rows}; prompts of at most "
        f"{load.prompt:,} tokens ({load.image:,} image), completions of at most {load.completion:,}."
    )
    if recipe.rollout.engine == "vllm":
        yield (
            f"vLLM samples: its cache is within {recipe.rollout.vllm_gpu_memory_utilization:.0%} of the card, which it "
            "takes at once (rollout.vllm_gpu_memory_utilization); the columns prefill and decode do not apply."
        )
    yield ""
    yield from _part_table(plan)
    yield ""
    yield from _verdict(plan, card)
    yield ""
    yield from _group_table(recipe, shape, (card,) if card else USUAL_CARDS)


def fits(plan: Plan, card: float) -> bool:
    return plan.total <= card * GiB


def _part_table(plan: Plan) -> list[str]:
    head = ["part", *MOMENTS, ""]
    parts = [[row.part, *(_cell(row, moment) for moment in MOMENTS), row.how] for row in plan.rows]
    peaks = ["peak of torch's allocator", *(f"{plan.peaks[m] / GiB:.2f}" for m in MOMENTS), ""]
    return aligned([head, *parts, peaks], left=(0, len(head) - 1))


def _cell(row: Row, moment: str) -> str:
    if moment not in row.moments:
        return ""
    return f"{row.bytes / GiB:.2f}" if row.bytes >= 0.005 * GiB else "<0.01"


def _verdict(plan: Plan, card: float | None) -> Iterator[str]:
    largest = max(plan.peaks, key=plan.peaks.__getitem__)
    yield (
        f"Needed: {plan.total / GiB:.2f} = {plan.peaks[largest] / GiB:.2f} ({largest}) + {OVERHEAD / GiB:.2f} for "
        "CUDA's context and fragmentation (assumed)"
    )
    if card and fits(plan, card):
        yield f"Fits a card of {card:g}, with {card - plan.total / GiB:.2f} to spare."
    elif card:
        yield f"Does not fit a card of {card:g}: {plan.total / GiB - card:.2f} too much; lower {REMEDIES[largest]}."


def _group_table(recipe: Recipe, shape: ModelShape, cards: Sequence[float]) -> list[str]:
    rows = [
        [
            f"{card:g}",
            str(prompts),
            *(_largest(recipe, shape, card, prompts, completion) for completion in COMPLETION_LENGTHS),
        ]
        for card in cards
        for prompts in sorted({1, recipe.prompts_per_rollout})
    ]
    title = "Largest num_generations that fits with completions_per_pass 1, by max_completion_length (up to 64):"
    return [title, *aligned([["card", "prompts per rollout", *map(str, COMPLETION_LENGTHS)], *rows])]


def _largest(recipe: Recipe, shape: ModelShape, card: float, prompts: int, completion: int) -> str:
    return str(largest_group(shape, recipe, int(card * GiB), prompts=prompts, completion=completion) or "none")
