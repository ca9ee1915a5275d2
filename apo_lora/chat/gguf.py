"""One question to exported GGUF files, through llama.cpp: the base's, where there are any, and the tuned ones."""

import base64
import io
import shutil
from pathlib import Path
from typing import Any, TextIO

from apo_lora.chat.chat import close, example_of
from apo_lora.chat.columns import Column, SideBySide
from apo_lora.chat.llama_server import Gguf, StreamedAnswer, find_gguf, find_server, serving, tokens_of
from apo_lora.data.examples import Example
from apo_lora.errors import ModelError
from apo_lora.export.gguf import BASE_GGUF
from apo_lora.export.image_limits import image_token_limits
from apo_lora.family.lookup import family_of_base
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import Completion
from apo_lora.run.adapter import RECIPE_ON_HUB, find_adapter, recipe_beside

GREEDY = {"temperature": 0.0}
# llama.cpp's own defaults would narrow the choice further.
_NO_OTHER_SAMPLERS = {"min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0, "presence_penalty": 0.0}


def chat_gguf(
    tuned: Gguf,
    base: Gguf | None,
    recipe: Recipe,
    question: str,
    out: TextIO,
    *,
    image: str | None = None,
    sampled: bool = False,
    max_tokens: int | None = None,
    llama_cpp: str | None = None,
) -> tuple[Completion | None, Completion]:
    """Writes the answers to `out` as they come, and returns them: (base or None, tuned). One model is in memory.

    Asked as the recipe asks. `llama_cpp`: a folder of llama.cpp. Raises DataError, ModelError in one line.
    """
    example = example_of(question, image)
    program = find_server(llama_cpp)
    limit = max_tokens or recipe.grpo.max_completion_length
    family = family_of_base(recipe.model.name)
    sampling = _as_in_training(recipe) if sampled else GREEDY
    request = {"messages": chat_messages(example, recipe), "max_tokens": limit, **sampling}
    context = recipe.data.max_prompt_tokens + limit

    def answer(gguf: Gguf, column: Column) -> Completion:
        with serving(gguf, program, context=context, image_tokens=image_token_limits(recipe.data, family)) as url:
            never = [[token, False] for token in tokens_of(url, "".join(family.vision_tokens))]
            stream = StreamedAnswer(url, logit_bias=never, **request)
            text = ""
            for piece in stream:
                text += piece
                column.put(piece)
        completion = Completion(text, stream.length, stream.truncated)
        close(column, completion)
        return completion

    screen = SideBySide(out, tuple(shutil.get_terminal_size()) if out.isatty() else None)
    of_base = answer(base, screen.first(f"base: {base.text.name}")) if base else None
    column = (screen.second if base else screen.first)(f"tuned: {tuned.text.name}")
    of_tuned = answer(tuned, column)
    screen.end(column)
    if base is None:
        out.write("\nNot compared with the base: use `apo-lora export ... --to base-gguf`, or give --base-gguf DIR.\n")
    return of_base, of_tuned


def chat_messages(example: Example, recipe: Recipe) -> list[dict[str, Any]]:
    """The recipe's messages in the form of OpenAI's API, images in them as PNG: the pixels that training sees."""
    images = iter(example.images)

    def part(content: dict[str, str]) -> dict[str, Any]:
        if content["type"] != "image":
            return content
        file = io.BytesIO()
        next(images).open().save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return [
        message | {"content": [part(content) for content in message["content"]]}
        for message in example.messages(recipe.data)
    ]


def _as_in_training(recipe: Recipe) -> dict[str, Any]:
    grpo = recipe.grpo
    return {"temperature": grpo.temperature, "top_p": grpo.top_p, "top_k": grpo.top_k, **_NO_OTHER_SAMPLERS}


def files_to_ask(path: Path, base_folder: str | None, recipe: Recipe | None) -> tuple[Gguf, Gguf | None, Recipe]:
    """(tuned, base or None, recipe) for a run, an adapter's folder, or a folder with GGUF files. Raises ModelError.

    `base_folder` and `recipe` are what the user named; else the base is the one of `apo-lora export --to base-gguf`,
    beside the tuned one, and the recipe that of the run or the one that export left in the folder.
    """
    if any(path.glob("*.gguf")):
        folder, known = path, recipe_beside(path)
    else:
        source = find_adapter(path)
        folder, known = source.folder.absolute().parent / "gguf", source.recipe
    tuned = find_gguf(folder)
    if (recipe := recipe or known) is None:
        raise ModelError(f"{path}: no recipe says how to ask it (no {RECIPE_ON_HUB}); give one with --recipe R")
    beside = Path(base_folder) if base_folder else folder.absolute().parent / BASE_GGUF
    return tuned, find_gguf(beside) if base_folder or beside.is_dir() else None, recipe
