"""The licence of a base, which holds for everything made of it."""

from typing import NamedTuple


class Licence(NamedTuple):
    front_matter: dict[str, str]
    """The keys of a Hub model card."""
    text: str
    """The same for a reader."""


_APACHE = {"license": "apache-2.0"}

APACHE = Licence(_APACHE, "The base is under the Apache-2.0 licence, and so is this model.")
OWN = Licence(
    _APACHE, "The base comes with apo-lora under the Apache-2.0 licence; this model is under the same licence."
)
UNKNOWN = Licence(
    {"license": "unknown"},
    "**apo-lora does not know the licence of this base.** It also applies to this model: look it up before sharing it.",
)
