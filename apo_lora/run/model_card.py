"""The README.md of a run, there and on the Hub: a model card made of what the run recorded."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from apo_lora import __version__
from apo_lora.recipe.schema import Recipe
from apo_lora.run.licence import Licence, licence_of
from apo_lora.run.summary import evaluation_table

What = Literal["adapter", "merged", "gguf"]

CARD = """---
{front_matter}---

# {title}

{kind} `{base}`, trained with apo-lora {version} by {method}
(Asymmetric Policy Optimization, [arXiv 2506.21655](https://arxiv.org/abs/2506.21655)) for {steps} optimizer steps of
{prompts} prompts x {generations} completions on `{data}`.

## Measured before and after

{table}

One sampled completion per held-out item at temperature {temperature}, same seed before and after.

## Use

{use}

## Licence

{licence}

## Recipe

<details>
<summary>Every key with its value, and the versions it ran on</summary>

```yaml
{recipe}```

{versions}

</details>
"""

KINDS = {
    "adapter": "A LoRA adapter for",
    "merged": "The merged weights of a LoRA adapter and its base",
    "gguf": "A GGUF for llama.cpp (language model and mmproj) of a LoRA adapter merged into its base",
}
# The Hub's own words for what a model is to its base, and for the library that loads it.
RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARIES = {"adapter": {"library_name": "peft"}, "merged": {"library_name": "transformers"}, "gguf": {}}

USE = {
    "adapter": """```python
{imports}from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{place}")
processor = AutoProcessor.from_pretrained({base})
```

The adapter changes the base only where it is loaded.""",
    "merged": """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{place}")
processor = AutoProcessor.from_pretrained("{place}")
```""",
    "gguf": """```sh
llama-mtmd-cli -hf {place} --image picture.png -p "How many?"
```""",
}

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DATA_FILES = (".json", ".jsonl", ".parquet")


def model_card(
    recipe: Recipe,
    base: str,
    evaluation: dict[str, Any],
    steps: int,
    environment: dict[str, Any],
    *,
    what: What = "adapter",
    place: str = "adapter",
) -> str:
    """The card's text, in Markdown with a Hub front matter.

    `base`: the Hugging Face id or folder that was trained on; `environment`: the run's environment.json;
    `place`: what is typed to load it, a folder or ORG/NAME.
    """
    tiny = recipe.model.name == "tiny"
    name = "apo-lora tiny base" if tiny else as_known_elsewhere(base)
    licence = licence_of("tiny" if tiny else base)
    datasets = {"datasets": [recipe.data.train]} if _is_hub_id(recipe.data.train) else {}
    rows = evaluation_table(evaluation)
    table = "\n".join(
        ["| task | figure | before | after |", "|---|---|---|---|"] + [f"| {' | '.join(row)} |" for row in rows]
    )
    return CARD.format(
        front_matter=front_matter(base, what, licence, datasets, tags=["grpo", "apo", "apo-lora"]),
        title=f"{name} + {recipe.method}",
        kind=KINDS[what],
        base=name,
        version=environment["packages"]["apo-lora"] or __version__,
        method=recipe.method,
        steps=steps,
        prompts=recipe.grpo.prompts_per_step,
        generations=recipe.grpo.num_generations,
        data=as_known_elsewhere(recipe.data.train),
        table=table if rows else "Not measured (no held-out data in the recipe).",
        temperature=recipe.grpo.temperature,
        use=how_to_use(name, what, place, tiny),
        licence=licence.words,
        recipe=recipe.to_yaml(),
        versions=_versions(environment),
    )


def front_matter(base: str, what: What, licence: Licence, datasets: dict[str, Any], tags: Sequence[str] = ()) -> str:
    """The card's head, as YAML."""
    # The Hub checks that base_model and datasets are ids of its own: a name or path of this machine is left out.
    base_keys = {"base_model": base, "base_model_relation": RELATIONS[what]} if _is_hub_id(base) else {}
    keys = {
        **base_keys,
        **LIBRARIES[what],
        "pipeline_tag": "image-text-to-text",
        **licence.front_matter,
        **datasets,
        "tags": ["lora", *tags, "vision-language", *(["gguf"] if what == "gguf" else [])],
    }
    return yaml.safe_dump(keys, sort_keys=False)


def how_to_use(name: str, what: What, place: str, tiny: bool) -> str:
    imports = "from apo_lora.tiny import BASE_DIR\n" if tiny else ""
    return USE[what].format(imports=imports, base="BASE_DIR" if tiny else f'"{name}"', place=place)


def _versions(environment: dict[str, Any]) -> str:
    gpu = environment["gpu"]
    packages = ", ".join(f"{package} {version}" for package, version in environment["packages"].items() if version)
    return f"Python {environment['python']} on {gpu['name'] if gpu else 'a CPU'}; {packages}."


def as_known_elsewhere(text: str) -> str:
    """Of a file or folder its name alone: its path says nothing on another machine."""
    return text if _is_hub_id(text) else Path(text).name


def _is_hub_id(text: str) -> bool:
    """Whether it has the form of one and is nothing here: data/puzzles.jsonl and a folder models/mine have it too."""
    path = Path(text)
    return bool(_HUB_ID.fullmatch(text)) and path.suffix not in _DATA_FILES and not path.exists()
