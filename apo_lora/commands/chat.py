"""ask a run's base and tuned model a question and show both answers side by side"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from apo_lora.commands.arguments import add_path, count_of, load_named
from apo_lora.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_path(parser, "run", "RUN", "a run directory, or a folder with an adapter or GGUF files (see --recipe)")
    add("question", help="the question, in quotes")
    add_path(parser, "--image", "FILE", "image that the question is about")
    add("--sample", action="store_true", help="sample as in training instead of decoding greedily")
    limit = "maximum length of an answer (default: the recipe's limit)"
    add("--max-tokens", metavar="N", type=count_of("tokens"), help=limit)
    recipe = "recipe that says how to ask (default: the run's, or the one pushed with the adapter)"
    add_path(parser, "--recipe", "R", recipe)
    engine = "what generates the answers: the model itself, word by word, or a vLLM server (see apo-lora setup-vllm)"
    add("--engine", choices=("transformers", "vllm"), default="transformers", help=engine)
    add("--gguf", action="store_true", help="ask the run's exported GGUF files through llama.cpp")
    base = (
        "with --gguf: folder with the base model's GGUF files (default: those of `export --to base-gguf`; "
        "without them only the tuned model answers)"
    )
    add_path(parser, "--base-gguf", "DIR", base)
    llama_cpp = "with --gguf: a llama.cpp folder (default: llama-server on the PATH, or the package xllamacpp)"
    add_path(parser, "--llama-cpp", "DIR", llama_cpp)


def run(
    run: str,
    question: str,
    image: str | None,
    sample: bool,
    max_tokens: int | None,
    recipe: str | None,
    engine: str,
    gguf: bool,
    base_gguf: str | None,
    llama_cpp: str | None,
) -> int:
    how_to_ask = load_named(recipe)[1] if recipe else None
    options = {"image": image, "sampled": sample, "max_tokens": max_tokens}
    if gguf and engine != "transformers":
        raise UserError("chat: --gguf answers through llama.cpp; leave --engine or --gguf out")
    if gguf:
        from apo_lora.chat.gguf import chat_gguf, files_to_ask

        tuned, base, how_to_ask = files_to_ask(Path(run), base_gguf, how_to_ask)
        chat_gguf(tuned, base, how_to_ask, question, sys.stdout, llama_cpp=llama_cpp, **options)
        return 0
    if base_gguf or llama_cpp:
        raise UserError("chat: --base-gguf and --llama-cpp need --gguf; add it, or leave them out")
    from apo_lora.run.adapter import find_adapter

    source = find_adapter(run)  # before the heavy libraries
    from apo_lora.chat.chat import chat

    chat(source, question, sys.stdout, recipe=how_to_ask, engine=engine, **options)
    return 0
