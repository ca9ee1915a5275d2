"""The model card of a run, its README.md there and on the Hub, written from what the run recorded; and that of an
adapter without a run: what its folder says, and what is not known.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from apo_lora import __version__
from apo_lora.family.licence import OWN
from apo_lora.family.lookup import licence_of_base
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import CONFIG, RECIPE_ON_HUB, AdapterSource
from apo_lora.run.summary import evaluation_table
from apo_lora.tiny import BASE_DIR

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

What = Literal["adapter", "merged", "gguf"]


# The Hub's own terms for what a model is to its base, and for the library that loads it.
RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARIES = {"adapter": {"library_name": "peft"}, "merged": {"library_name": "transformers"}, "gguf": {}}


def model_card(
    recipe: Recipe,
    base: str,
    evaluation: dict[str, Any],
    steps: int,
    environment: dict[str, Any],
    *,
    what: What = "adapter",
    place: str = "adapter",
    onto: str | None = None,
    start: Mapping[str, str] | None = None,
) -> str:
    """The model card of a run, in Markdown with a Hub front matter.

    `base`: the Hugging Face id or folder that was trained on; `environment`: the run's environment.json;
    `place`: what to load it from, a folder or ORG/NAME; `onto`: trained or original, what a base trained on in 4 bits
    was merged as; `start`: the adapter that training started from (run/inputs.py, start_of).
    """
    data, gpu, packages = recipe.data.train, environment["gpu"], environment["packages"]
    versions = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
    return _render(
        base,
        what,
        place,
        onto=onto,
        tiny=recipe.model.name == "tiny",
        tags=("grpo", "apo", "apo-lora"),
        front_matter={"datasets": [data]} if _is_hub_id(data) else {},
        recipe=recipe,
        version=packages["apo-lora"] or __version__,
        steps=steps,
        start=start and {**start, "name": _name_elsewhere(start["name"])},
        data=_name_elsewhere(data),
        rows=evaluation_table(evaluation),
        versions=f"Python {environment['python']} on {gpu['name'] if gpu else 'a CPU'}; {versions}.",
    )


def card_without_run(source: AdapterSource, what: What, place: str, onto: str | None = None) -> str:
    """In Markdown with a Hub front matter. `place` and `onto`: see `model_card`."""
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    return _render(
        source.base_name,
        what,
        place,
        onto=onto,
        tiny=source.base_name == str(BASE_DIR),
        recipe=None,
        sizes=[f"{name} {config[key]}" for key, name in (("r", "rank"), ("lora_alpha", "alpha")) if key in config],
        recipe_beside=RECIPE_ON_HUB if (source.folder / RECIPE_ON_HUB).is_file() else None,
    )


def _render(
    base: str,
    what: What,
    place: str,
    *,
    tiny: bool,
    tags: Sequence[str] = (),
    front_matter: Mapping[str, Any] = MappingProxyType({}),
    **facts: Any,
) -> str:
    """`facts` are the template's own."""
    from jinja2 import Environment, StrictUndefined

    name = "apo-lora tiny base" if tiny else _name_elsewhere(base)
    licence = OWN if tiny else licence_of_base(base)
    # The Hub checks that base_model and datasets are ids of its own: a name or path of this machine is left out.
    keys = {
        **({"base_model": base, "base_model_relation": RELATIONS[what]} if _is_hub_id(base) else {}),
        **LIBRARIES[what],
        "pipeline_tag": "image-text-to-text",
        **licence.front_matter,
        **front_matter,
        "tags": ["lora", *tags, "vision-language", *(["gguf"] if what == "gguf" else [])],
    }
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=yaml.safe_dump(keys, sort_keys=False),
        name=name,
        what=what,
        place=place,
        tiny=tiny,
        base="BASE_DIR" if tiny else f'"{name}"',
        licence=licence.text,
        **facts,
    )


_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DATA_FILES = (".json", ".jsonl", ".parquet")


def _name_elsewhere(text: str) -> str:
    """Only the name of a file or folder: its path means nothing on another machine."""
    return text if _is_hub_id(text) else Path(text).name


def _is_hub_id(text: str) -> bool:
    """Whether it looks like one and is not a local path: data/puzzles.jsonl and models/mine look alike."""
    path = Path(text)
    return bool(_HUB_ID.fullmatch(text)) and path.suffix not in _DATA_FILES and not path.exists()
