"""The licence of a base, which holds for everything made of it: an adapter, a merged model, a GGUF."""

from typing import NamedTuple

_QWEN_3B = "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE"

# Who publishes these weights unchanged; another owner's model of that name may stand under further terms.
_PUBLISHERS = ("qwen", "unsloth")


class Licence(NamedTuple):
    front_matter: dict[str, str]
    """The keys of a Hub card."""
    words: str
    """The same for a reader."""


_KNOWN = {
    "qwen2.5-vl-3b": Licence(
        {"license": "other", "license_name": "qwen-research", "license_link": _QWEN_3B},
        f"The base is under the [Qwen Research Licence]({_QWEN_3B}): not for commercial use. It holds for this too.",
    ),
    "qwen2.5-vl-7b": Licence({"license": "apache-2.0"}, "The base is under the Apache-2.0 licence, and so is this."),
}
_OWN = Licence(
    {"license": "apache-2.0"}, "The base comes with apo-lora under the Apache-2.0 licence, and this is under the same."
)
_UNKNOWN = Licence(
    {"license": "unknown"},
    "**apo-lora does not know the licence of this base.** It holds for this too: look it up before you share it.",
)


def licence_of(base: str) -> Licence:
    """`base`: `tiny`, a Hugging Face id or a folder. What is not in the table is unknown, and its words say so."""
    if base == "tiny":
        return _OWN
    owner, _, name = base.lower().rpartition("/")
    if owner not in _PUBLISHERS:
        return _UNKNOWN
    return next((licence for known, licence in _KNOWN.items() if name.startswith(known)), _UNKNOWN)
