"""The card of an adapter without a run: what its folder says, and plainly what it does not."""

import json

from apo_lora.run.adapter_source import CONFIG, RECIPE_ON_HUB, AdapterSource
from apo_lora.run.licence import licence_of
from apo_lora.run.model_card import KINDS, What, as_known_elsewhere, front_matter, how_to_use
from apo_lora.tiny import BASE_DIR

CARD = """---
{front_matter}---

# {name} + LoRA

{kind} `{name}`{shape}.

## Not known

It was pushed by apo-lora without the record of a run. So nothing here says what it was trained on, by which method, for
how long and with which versions, and nothing was measured. {recipe}

## Use

{use}

## Licence

{licence}
"""

_WITH_RECIPE = f"`{RECIPE_ON_HUB}`, which lay beside it, is the recipe it came with."
_WITHOUT_RECIPE = "Whoever trained it can say so here."


def lone_card(source: AdapterSource, what: What, place: str) -> str:
    """In Markdown with a Hub front matter. `place`: what is typed to load it, a folder or ORG/NAME."""
    tiny = source.base_name == str(BASE_DIR)
    name = "apo-lora tiny base" if tiny else as_known_elsewhere(source.base_name)
    licence = licence_of("tiny" if tiny else source.base_name)
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8"))
    sizes = [f"{word} {config[key]}" for key, word in (("r", "rank"), ("lora_alpha", "alpha")) if key in config]
    return CARD.format(
        front_matter=front_matter(source.base_name, what, licence, datasets={}),
        name=name,
        kind=KINDS[what],
        shape=f" ({', '.join(sizes)})" if sizes else "",
        recipe=_WITH_RECIPE if (source.folder / RECIPE_ON_HUB).is_file() else _WITHOUT_RECIPE,
        use=how_to_use(name, what, place, tiny),
        licence=licence.words,
    )
