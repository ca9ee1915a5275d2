"""export an adapter for deployment (merged, GGUF or the Hub) and check the result"""

from argparse import ArgumentParser
from pathlib import Path

from apo_lora.export import ONTO, QUANTIZATIONS, TARGETS
from apo_lora.machine.paths import at_home


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="RUN_OR_ADAPTER", type=at_home, help="a run directory, or a folder with an adapter")
    targets = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())
    add("--to", required=True, choices=TARGETS, help=targets)
    add(
        "--out",
        metavar="DIR",
        type=lambda text: Path(at_home(text)),
        help="new folder to write to (default: beside the adapter)",
    )
    onto = "; ".join(f"{name}: {what}" for name, what in ONTO.items())
    add("--onto", choices=ONTO, help=f"weights to merge into ({onto}; default: trained)")
    quantization = f"quantization of the GGUF text model (default: {QUANTIZATIONS[0]})"
    add("--quantization", choices=QUANTIZATIONS, default=QUANTIZATIONS[0], help=quantization)
    where = "a llama.cpp folder, for GGUF (default: llama.cpp's programs on the PATH)"
    add("--llama-cpp", metavar="DIR", type=at_home, help=where)
    add("--repo", metavar="ORG/NAME", help="repository on the Hub, for --to hub")
    add(
        "--what",
        choices=("adapter", "merged", "gguf"),
        default="adapter",
        help="what to push to the Hub (default: adapter)",
    )
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", default=True, help="make the Hub repository private (default)")
    seen.add_argument("--public", dest="private", action="store_false", help="make the Hub repository public")


def run(
    source: str,
    to: str,
    out: Path | None,
    onto: str | None,
    quantization: str,
    llama_cpp: str | None,
    repo: str | None,
    what: str,
    private: bool,
) -> int:
    from apo_lora.export import targets
    from apo_lora.run.adapter import find_adapter

    adapter = find_adapter(source)
    gguf = {"quantization": quantization, "llama_cpp": llama_cpp}
    if to == "hub":
        targets.export_to_hub(adapter, repo=repo, what=what, private=private, out=out, onto=onto, **gguf)
    elif to == "merged":
        targets.export_merged(adapter, out, onto=onto)
    elif to == "base-gguf":
        targets.export_base_gguf(adapter, out, **gguf)
    else:
        targets.export_gguf(adapter, out, onto=onto, **gguf)
    return 0
