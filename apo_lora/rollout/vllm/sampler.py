"""A rollout from vLLM: the adapter of the step is loaded, each prompt is sent once, tokens come back as sampled.

The server reads the prompts itself, with its own processor: what it read is compared token by token with what the
trainer read, and a difference ends the run.
"""

import base64
import io
import itertools
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from apo_lora.errors import TrainingStopped
from apo_lora.policy.loading import Policy
from apo_lora.recipe.schema import Recipe
from apo_lora.rollout.sampling import Sampled
from apo_lora.rollout.vllm.client import Endpoint, ServerFault
from apo_lora.rollout.vllm.server import Servers

NEVER = -100.0
"""The lowest bias of a token that vLLM admits; next to it a token's probability is about 1e-44."""


CONTINUE = "The checkpoints are kept; continue with --resume auto, or with rollout.engine=transformers in a new run"
ASK_AGAIN = "Give the same command again, or use --engine transformers"


@dataclass(frozen=True)
class Group:
    """Rows of a rollout with the same prompt."""

    rows: range
    item: Mapping[str, Any]
    seed: int
    changes: Mapping[str, Any]
    """Of the way in which its completions are sampled."""


@dataclass(frozen=True)
class Order:
    """A rollout to be sampled."""

    step: int | None
    adapter: Path | None
    """Folder of the adapter as it was then; both are None for the base."""
    indices: list[int | None]
    """Of the rows' items in the data set."""
    groups: list[Group]


Completion = tuple[list[int], list[float]]
"""Token ids and their log-probs."""


class VllmSampler:
    """A rollout.sampling.Sampler: completions and their log-probs from vLLM, for one process of the run."""

    def __init__(self, servers: Servers, policy: Policy, recipe: Recipe, then: str = CONTINUE):
        """`then`: what can be done where the server fails again after a restart."""
        self.servers, self.processor, self.then = servers, policy.processor, then
        self.ahead = recipe.rollout.ahead
        self.never_sampled = set(policy.never_sampled)
        ends = policy.model.generation_config.eos_token_id
        grpo = recipe.grpo
        self.options = {
            "temperature": grpo.temperature,
            "top_p": grpo.top_p,
            "top_k": grpo.top_k,
            "max_tokens": grpo.max_completion_length,
            "stop_token_ids": ends if isinstance(ends, list) else [ends],
            "logit_bias": {str(token): NEVER for token in sorted(self.never_sampled)},
            "logprobs": True,
            "return_token_ids": True,
        }
        self.begun: tuple[Order, Future] | None = None
        self._rename()

    def _rename(self) -> None:
        """A server may still know adapters of another run, or of this one before a fault: no name is used again."""
        self.run = secrets.token_hex(4)

    def begin(self, model: nn.Module, step: int, items: Sequence[Mapping[str, Any]], groups: Sequence[int]) -> None:
        """See rollout.sampling.Sampler. A fault is raised, and answered, where the rollout is asked for."""
        order = self._order(model, step, items, groups, {})
        self.begun = order, in_background(self._sample, order)

    def __call__(
        self,
        model: nn.Module,
        step: int | None,
        items: Sequence[Mapping[str, Any]],
        prompt_ids: Sequence[Sequence[int]],
        groups: Sequence[int],
        **changes: Any,
    ) -> Sampled:
        """See rollout.sampling.Sampler; without a step, the base samples. `changes` are to how.

        Raises TrainingStopped where a server fails twice, or reads other prompts.
        """
        order, answers = self._begun_of(items) or (self._order(model, step, items, groups, changes), None)
        try:
            found = answers.result() if answers else self._sample(order)
        except ServerFault as fault:
            tqdm.write(f"vLLM: {fault}; it is restarted, and the rollout repeated")
            for line in self.servers.last_words():
                tqdm.write(f"  {line}")
            found = self._after_restart(order)
        for group, (read, _) in zip(order.groups, found, strict=True):
            require_same_prompt(read, prompt_ids[group.rows[0]], group.rows[0])
        completions = [completion for _, own in found for completion in own]
        return Sampled([ids for ids, _ in completions], [logps for _, logps in completions], order.step)

    def _begun_of(self, items: Sequence[Mapping[str, Any]]) -> tuple[Order, Future] | None:
        """What was begun, where it is of these items."""
        begun, self.begun = self.begun, None
        if begun is None or begun[0].indices == _indices(items):
            return begun
        wait([begun[1]])  # its adapter would be unloaded under it
        return None

    def _order(
        self,
        model: nn.Module,
        step: int | None,
        items: Sequence[Mapping[str, Any]],
        groups: Sequence[int],
        changes: Mapping[str, Any],
    ) -> Order:
        """With the model's adapter of this moment, which is written down: the model may train on meanwhile."""
        parts = [[row for row, _ in part] for _, part in itertools.groupby(enumerate(groups), key=lambda item: item[1])]
        # Drawn as generate() would: a resumed run draws the same, and so does the second try after a fault.
        seeds = torch.randint(2**31, (len(parts),)).tolist()
        own = [
            Group(range(rows[0], rows[-1] + 1), items[rows[0]], seed, changes)
            for rows, seed in zip(parts, seeds, strict=True)
        ]
        folder = None if step is None else self.servers.adapters / self._name(step)
        if folder and not folder.exists():  # a step's adapter is the same for all of its rollouts
            model.save_pretrained(folder)
        return Order(step, folder, _indices(items), own)

    def _name(self, step: int) -> str:
        return f"{self.run}-step-{step}"

    def _after_restart(self, order: Order) -> list[tuple[list[int], list[Completion]]]:
        try:
            self.servers.restart()
            self.servers.adapter = None
            self._rename()
            return self._sample(order)
        except ServerFault as fault:
            said = f"vLLM failed again after a restart: {fault}. {self.then}"
            raise TrainingStopped(said, *self.servers.last_words()) from None

    def _sample(self, order: Order) -> list[tuple[list[int], list[Completion]]]:
        """Of each group, the prompt that the server read, and completions. Raises ServerFault."""
        name = self.servers.base_name if order.adapter is None else self._name(order.step)
        if order.adapter and self.servers.adapter != name:
            self.servers.load(order.adapter, name)
        shared_out = zip(itertools.cycle(self.servers.endpoints), order.groups, strict=False)
        answers = [in_background(self._ask, endpoint, name, group) for endpoint, group in shared_out]
        return [answer.result() for answer in answers]

    def _ask(self, endpoint: Endpoint, name: str, group: Group) -> tuple[list[int], list[Completion]]:
        body = {"model": name, "messages": as_request(group.item), "n": len(group.rows), "seed": group.seed}
        body |= self.options_of(group)
        if image_processor := getattr(self.processor, "image_processor", None):
            # At every request: preflight may have lowered data.max_pixels after the server's start.
            body["mm_processor_kwargs"] = {"size": dict(image_processor.size)}
        answer = endpoint.ask("/v1/chat/completions", body)
        try:
            if answer["model"] != name:
                raise ServerFault(f"it answered for {answer['model']}, not for the adapter {name}")
            read = answer["prompt_token_ids"]
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            completions = [(choice["token_ids"], _logps(choice)) for choice in choices]
        except (KeyError, TypeError) as error:
            raise ServerFault(f"its answer is not understood ({type(error).__name__}: {error})") from None
        if len(completions) != len(group.rows) or any(len(ids) != len(logps) or not ids for ids, logps in completions):
            raise ServerFault(f"its answer is incomplete: {len(completions)} of {len(group.rows)} completions")
        if any(not self.never_sampled.isdisjoint(ids) for ids, _ in completions):
            raise ServerFault("it sampled a vision token, which it was told to hold back")
        return read, completions

    def options_of(self, group: Group) -> dict[str, Any]:
        """How its completions are sampled."""
        return {**self.options, **group.changes}


def in_background(function: Callable[..., Any], *arguments: Any) -> Future:
    """Its result, or what it raises. In a daemon thread: the end of the process does not wait for a server's answer."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def require_same_prompt(read: Sequence[int], expected: Sequence[int], row: int) -> None:
    """Raises TrainingStopped where the server's prompt is not the trainer's."""
    if list(read) == list(expected):
        return
    pairs = enumerate(zip(read, expected, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(read), len(expected)))
    raise TrainingStopped(
        f"vLLM read {len(read)} tokens in the prompt of completion {row} of this rollout, and the trainer "
        f"{len(expected)}; they differ from token {place} on, so it would sample for another prompt. Check "
        "that the servers have the model's own chat template and processor, or use rollout.engine=transformers"
    )


def _indices(items: Sequence[Mapping[str, Any]]) -> list[int | None]:
    return [item.get("index") for item in items]


def sampler_of(servers: Servers | None, policy: Policy, recipe: Recipe) -> VllmSampler | None:
    """None where the model's own generate() samples."""
    return VllmSampler(servers, policy, recipe) if servers else None


def as_request(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An item's messages as the API takes them: the pixels of its images losslessly, as PNG in a data URL."""
    images = iter(item.get("images") or ())

    def content_of(message: Mapping[str, Any]) -> Any:
        if isinstance(message["content"], str):
            return message["content"]
        return [
            {"type": "image_url", "image_url": {"url": _data_url(next(images))}} if part["type"] == "image" else part
            for part in message["content"]
        ]

    return [{**message, "content": content_of(message)} for message in item["prompt"]]


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _logps(choice: Mapping[str, Any]) -> list[float]:
    """NaN where the server has none."""
    logps = [token["logprob"] for token in choice["logprobs"]["content"]]
    return [float("nan") if logp is None else logp for logp in logps]
