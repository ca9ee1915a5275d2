"""A rollout from vLLM: the adapter of the step is loaded, each prompt is sent once, tokens come back as sampled.

The server reads the prompts itself, with its own processor: what it read is compared token by token with what the
trainer read, and a difference ends the run.
"""

import base64
import io
import itertools
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Group:
    """Rows of a rollout with the same prompt."""

    rows: range
    messages: list[dict[str, Any]]
    prompt_ids: Sequence[int]
    seed: int
    changes: Mapping[str, Any]
    """Of the way in which its completions are sampled."""


class VllmSampler:
    """A rollout.sampling.Sampler: completions and their log-probs from vLLM, for one process of the run."""

    def __init__(self, servers: Servers, policy: Policy, recipe: Recipe):
        self.servers, self.processor = servers, policy.processor
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
        self._forget()

    def _forget(self) -> None:
        """A server may still know adapters of another run, or of this one before a fault: no name is used again."""
        self.run, self.loaded = secrets.token_hex(4), None

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
        parts = [[row for row, _ in part] for _, part in itertools.groupby(enumerate(groups), key=lambda item: item[1])]
        # Drawn as generate() would: a resumed run draws the same, and so does the second try after a fault.
        seeds = torch.randint(2**31, (len(parts),)).tolist()
        jobs = [
            Group(range(rows[0], rows[-1] + 1), as_request(items[rows[0]]), prompt_ids[rows[0]], seed, changes)
            for rows, seed in zip(parts, seeds, strict=True)
        ]
        try:
            return self._sample(model, step, jobs)
        except ServerFault as fault:
            tqdm.write(f"vLLM: {fault}; it is restarted, and the rollout repeated")
            for line in self.servers.last_words():
                tqdm.write(f"  {line}")
        try:
            self.servers.restart()
            self._forget()
            return self._sample(model, step, jobs)
        except ServerFault as fault:
            raise TrainingStopped(
                f"vLLM failed again after a restart: {fault}. The checkpoints are kept; continue with --resume auto, "
                "or with rollout.engine=transformers in a new run",
                *self.servers.last_words(),
            ) from None

    def _sample(self, model: nn.Module, step: int | None, jobs: list[Group]) -> Sampled:
        name = self.servers.base_name if step is None else f"{self.run}-step-{step}"
        if step is not None and self.loaded != name:
            self._load(model, name)
        pool = ThreadPoolExecutor(len(jobs))
        try:
            shared_out = zip(itertools.cycle(self.servers.endpoints), jobs, strict=False)
            answers = list(pool.map(lambda pair: self._ask(pair[0], name, pair[1]), shared_out))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a second Ctrl-C does not wait for answers
        completions = [completion for answer in answers for completion in answer]
        return [ids for ids, _ in completions], [logps for _, logps in completions]

    def _load(self, model: nn.Module, name: str) -> None:
        """The model's adapter of this moment under this name; the one before is unloaded."""
        folder = self.servers.adapters / name
        model.save_pretrained(folder)
        for endpoint in self.servers.endpoints:
            endpoint.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            if self.loaded is not None:
                endpoint.ask("/v1/unload_lora_adapter", {"lora_name": self.loaded})
        for path in self.servers.adapters.iterdir():
            if path != folder:
                shutil.rmtree(path, ignore_errors=True)
        self.loaded = name

    def _ask(self, endpoint: Endpoint, name: str, job: Group) -> list[tuple[list[int], list[float]]]:
        body = {"model": name, "messages": job.messages, "n": len(job.rows), "seed": job.seed}
        body |= self.options_of(job)
        if image_processor := getattr(self.processor, "image_processor", None):
            # At every request: preflight may have lowered data.max_pixels after the server's start.
            body["mm_processor_kwargs"] = {"size": dict(image_processor.size)}
        answer = endpoint.ask("/v1/chat/completions", body)
        try:
            if answer["model"] != name:
                raise ServerFault(f"it answered for {answer['model']}, not for the adapter {name}")
            self._compare(answer["prompt_token_ids"], job)
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            completions = [(choice["token_ids"], _logps(choice)) for choice in choices]
        except (KeyError, TypeError) as error:
            raise ServerFault(f"its answer is not understood ({type(error).__name__}: {error})") from None
        if len(completions) != len(job.rows) or any(len(ids) != len(logps) or not ids for ids, logps in completions):
            raise ServerFault(f"its answer is incomplete: {len(completions)} of {len(job.rows)} completions")
        if any(not self.never_sampled.isdisjoint(ids) for ids, _ in completions):
            raise ServerFault("it sampled a vision token, which it was told to hold back")
        return completions

    def options_of(self, job: Group) -> dict[str, Any]:
        """How its completions are sampled."""
        return {**self.options, **job.changes}

    def _compare(self, read: Sequence[int], job: Group) -> None:
        """Raises TrainingStopped where the server's prompt is not the trainer's."""
        if list(read) == list(job.prompt_ids):
            return
        pairs = enumerate(zip(read, job.prompt_ids, strict=False))
        place = next((at for at, (one, other) in pairs if one != other), min(len(read), len(job.prompt_ids)))
        raise TrainingStopped(
            f"vLLM read {len(read)} tokens in the prompt of completion {job.rows[0]} of this rollout, and the trainer "
            f"{len(job.prompt_ids)}; they differ from token {place} on, so it would sample for another prompt. Check "
            "that the servers have the model's own chat template and processor, or use rollout.engine=transformers"
        )


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
