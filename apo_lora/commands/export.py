"""export an adapter for deployment (merged, GGUF or the Hub) and check the result"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from apo_lora.commands.arguments import add_path
from apo_lora.export import ONTO, QUANTIZATIONS, TARGETS


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_path(parser, "source", "RUN_OR_ADAPTER", "a run directory, or a folder with an adapter")
    targets = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())
    add("--to", required=True, choices=TARGETS, help=targets)
    add_path(parser, "--out", "DIR", "new folder to write to (default: beside the adapter)")
    onto = "; ".join(f"{name}: {what}" for name, what in ONTO.items())
    add("--onto", choices=ONTO, help=f"weights to merge into ({onto}; default: trained, where that is known)")
    quantization = f"quantization of the GGUF text model (default: {QUANTIZATIONS[0]})"
    add("--quantization", choices=QUANTIZATIONS, default=QUANTIZATIONS[0], help=quantization)
    where = "a llama.cpp folder, for GGUF (default: llama.cpp's programs on the PATH)"
    add_path(parser, "--llama-cpp", "DIR", where)
    add("--repo", metavar="ORG/NAME", help="repository on the Hub, for --to hub")
    what = "what to push to the Hub (default: adapter)"
    add("--what", choices=("adapter", "merged", "gguf"), default="adapter", help=what)
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", default=True, help="make the Hub repository private (default)")
    seen.add_argument("--public", dest="private", action="store_false", help="make the Hub repository public")


def run(
    source: str, to: str, out: str | None, onto: str | None, repo: str | None, what: str, private: bool, **gguf: Any
) -> int:
    """`gguf`: quantization and llama_cpp."""
    from apo_lora.export import targets
    from apo_lora.run.adapter import find_adapter

    adapter = find_adapter(source)
    folder = Path(out) if out else None
    if to == "hub":
        targets.export_to_hub(adapter, repo=repo, what=what, private=private, out=folder, onto=onto, **gguf)
    elif to == "merged":
        targets.export_merged(adapter, folder, onto=onto)
    elif to == "base-gguf":
        targets.export_base_gguf(adapter, folder, **gguf)
    else:
        targets.export_gguf(adapter, folder, onto=onto, **gguf)
    return 0
