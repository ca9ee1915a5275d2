"""Prompts into tensors, tensors into completions: sampling outside the trainer, for evaluation and preflight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from apo_lora.data.examples import Example
from apo_lora.family.lookup import closest_family
from apo_lora.machine.compat import kept_checkpointing, kept_compiler_stance
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe

# Greedy; None removes options that generate() would warn about.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class Sampled(NamedTuple):
    ids: list[list[int]]
    """Token ids of every row, end token included."""
    logps: list[list[float]]
    """Of each token, as it was sampled."""
    step: int | None
    """Optimizer steps that the adapter it was sampled with had seen; None is the base."""


class Sampler(Protocol):
    """Samples a rollout for APOTrainer, instead of the model's own generate()."""

    ahead: int
    """Rollouts that are begun before they are asked for: 0, or 1."""

    def begin(self, model: nn.Module, step: int, items: Sequence[Mapping[str, Any]], groups: Sequence[int]) -> None:
        """Begins the rollout that is asked for next, with the adapter of this moment, and returns at once."""

    def __call__(
        self,
        model: nn.Module,
        step: int,
        items: Sequence[Mapping[str, Any]],
        prompt_ids: Sequence[Sequence[int]],
        groups: Sequence[int],
    ) -> Sampled:
        """One completion per row, with the adapter that `model` has before step `step` + 1, or as it was begun.

        `items` are the data set's, with messages in `prompt` and PIL images in `images`; `prompt_ids` is what the
        trainer reads in them; rows with the same group have the same prompt.
        """


class Completion(NamedTuple):
    text: str
    length: int
    """Tokens, the end token included."""
    truncated: bool


def prompt_inputs(policy: Policy, examples: Sequence[Example], recipe: Recipe) -> dict[str, Tensor]:
    """What the processor makes of the examples' prompts, padded on the left, on the model's device."""
    texts = [
        policy.processor.apply_chat_template(e.messages(recipe.data), add_generation_prompt=True, tokenize=False)
        for e in examples
    ]
    images = [[image.open() for image in e.images] for e in examples]
    return policy.processor(
        text=texts, images=images if any(images) else None, padding=True, padding_side="left", return_tensors="pt"
    ).to(policy.model.device)


def generation_options(policy: Policy, recipe: Recipe) -> dict[str, Any]:
    """The recipe's way of sampling; vision tokens, which would break the next forward pass, are never sampled."""
    return {
        "do_sample": True,
        "temperature": recipe.grpo.temperature,
        "top_p": recipe.grpo.top_p,
        "top_k": recipe.grpo.top_k,
        "max_new_tokens": recipe.grpo.max_completion_length,
        "suppress_tokens": policy.never_sampled,
    }


@torch.no_grad()
def sample(policy: Policy, examples: Sequence[Example], recipe: Recipe, **changes: Any) -> list[Completion]:
    """One completion per example. `changes` are to the options of generate(), such as a streamer for one example."""
    inputs = prompt_inputs(policy, examples, recipe)
    with generating(policy.model):
        output = policy.model.generate(**inputs, **generation_options(policy, recipe) | changes)
    ends = policy.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    completions = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [until_end(ids, ends, policy.processor) for ids in completions]


def until_end(ids: list[int], ends: list[int], processor: Any) -> Completion:
    """Of the sampled ids, what comes before the first end token, and that one."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return Completion(processor.decode(ids[:length], skip_special_tokens=True), length, ids[length - 1] not in ends)


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, which also switches gradient checkpointing off and dropout with it."""
    was_training = model.training
    model.eval()
    try:
        with kept_checkpointing(model), kept_compiler_stance():
            yield
    finally:
        model.train(was_training)


@contextmanager
def converted_adapters(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Inside, the LoRA weights are copies in the dtype of the arguments' autocast; without one, themselves.

    Autocast and Unsloth's layers convert each weight wherever it is used: while sampling, for every token anew. What is
    computed is the same.
    """
    layers = [layer for name, layer in model.named_modules() if ".lora_" in name and isinstance(layer, nn.Linear)]
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    kept = [layer.weight for layer in layers]
    try:
        for layer in layers if dtype else []:
            layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


class Forward(NamedTuple):
    """One forward pass of the language model."""

    length: int
    """Tokens that went in."""
    cached: bool
    checkpointing: bool


@contextmanager
def watched_forwards(model: nn.Module) -> Iterator[list[Forward]]:
    """Every forward pass of the language model inside, in order."""
    forwards: list[Forward] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        forwards.append(
            Forward(
                length=next(kwargs[key] for key in ("inputs_embeds", "input_ids") if kwargs.get(key) is not None).shape[
                    1
                ],
                cached=kwargs.get("past_key_values") is not None,
                checkpointing=module.training and getattr(module, "gradient_checkpointing", False),
            )
        )

    family = closest_family(model)
    handle = family.language_of(family.inner_of(model)).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield forwards
    finally:
        handle.remove()


def generation_fault(forwards: Sequence[Forward]) -> str | None:
    """What makes generation needlessly slow, or None: after the prompt, every pass must see one token and a cache.

    Completions that all end with their first token are sampled in one pass, with a cache as well.
    """
    generation = [forward for forward in forwards if forward.cached]
    if not generation or any(forward.length != 1 for forward in generation[1:]):
        return "the key-value cache is off"
    if any(forward.checkpointing for forward in generation):
        return "gradient checkpointing is on"
    return None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, adapters sample and score as they will be used, also while the model is in training mode."""
    active = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()
