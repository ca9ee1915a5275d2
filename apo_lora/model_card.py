"""The README.md of a run: a Hub model card made of what the run measured."""

from typing import Any

import yaml

from apo_lora import __version__
from apo_lora.environment import installed
from apo_lora.recipe import Recipe
from apo_lora.summary import evaluation_table

CARD = """---
{front_matter}---

# {title}

A LoRA adapter for `{base}`, trained with apo-lora {version} by {method}
(Asymmetric Policy Optimization, [arXiv 2506.21655](https://arxiv.org/abs/2506.21655)) for {steps} optimizer steps of
{prompts} prompts x {generations} completions on `{data}`.

## Measured before and after

{table}

One sampled completion per held-out item at temperature {temperature}, same seed before and after.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "adapter")
processor = AutoProcessor.from_pretrained("{base}")
```

The adapter changes the base only where it is loaded; the base's licence holds for both.

## Recipe

```yaml
{recipe}```

Versions: {versions}.
"""


def model_card(recipe: Recipe, base: str, evaluation: dict[str, Any], steps: int) -> str:
    """The card's text, in Markdown with a Hub front matter."""
    name = "apo-lora tiny base" if recipe.model.name == "tiny" else base
    front_matter = {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "grpo", "apo", "apo-lora", "vision-language"],
    }
    rows = evaluation_table(evaluation)
    table = "\n".join(
        ["| task | figure | before | after |", "|---|---|---|---|"] + [f"| {' | '.join(row)} |" for row in rows]
    )
    return CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        title=f"{name} + {recipe.method}",
        base=name,
        version=__version__,
        method=recipe.method,
        steps=steps,
        prompts=recipe.grpo.prompts_per_step,
        generations=recipe.grpo.num_generations,
        data=recipe.data.train,
        table=table if rows else "Not measured (no held-out data in the recipe).",
        temperature=recipe.grpo.temperature,
        recipe=recipe.to_yaml(),
        versions=", ".join(f"{p} {installed(p)}" for p in ("torch", "transformers", "trl", "peft", "unsloth")),
    )
