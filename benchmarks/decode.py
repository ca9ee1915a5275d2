"""Seconds of one sampled token with keys and values repeated for every query head, as transformers has it, over ours.

    python -m benchmarks.decode --out decode.json          (a few minutes on two CPU cores)

A random model of the real architecture with 31 M parameters, four query heads to a key head, on the CPU in float32,
through transformers' generate(). Both kinds take turns within one process, so that a busy machine slows both; the ratio
is that of the median seconds of a token after the first.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from apo_lora.machine.process import prepare_process

prepare_process()

import torch  # noqa: E402
from transformers import StoppingCriteria, StoppingCriteriaList  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from apo_lora.machine.versions import environment  # noqa: E402
from apo_lora.policy.loading import load_policy  # noqa: E402
from apo_lora.recipe.schema import DataSection, LoraSection, ModelSection  # noqa: E402
from apo_lora.run.files import write_json  # noqa: E402
from benchmarks.gpu.random_model import make  # noqa: E402

WORK = (("static", 8, 512), ("static", 32, 512), ("static", 8, 2048), ("dynamic", 8, 512), ("dynamic", 8, 2048))
"""Cache, rows, and tokens in the cache at the end."""


class Clock(StoppingCriteria):
    """Asked after every token."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@torch.no_grad()
def seconds_per_token(model: Any, rows: int, length: int, tokens: int, cache: str) -> list[float]:
    ids = torch.randint(10, 200, (rows, length - tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # prompts of different lengths: there is a mask
    clock = Clock()
    model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens,
        cache_implementation=cache, stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    return clock.seconds()


def compare(model: Any, rows: int, length: int, tokens: int, repeats: int, cache: str) -> dict[str, Any]:
    ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    kinds, seconds = {"repeated": ours.__wrapped__, "ours": ours}, {"repeated": [], "ours": []}
    for _ in range(repeats):
        for kind, attention in kinds.items():
            ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
            seconds[kind] += seconds_per_token(model, rows, length, tokens, cache)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    ratio = medians["repeated"] / medians["ours"]
    print(f"{rows} rows, {cache} cache of {length:,}: {ratio:.2f} times faster", flush=True)
    return {"rows": rows, "cache": cache, "length": length, "seconds_per_token": medians, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        make("31m", Path(place) / "31m")
        section = ModelSection(name=f"{place}/31m", engine="transformers", dtype="float32")
        policy = load_policy(section, LoraSection(), DataSection(train="boards"), seed=0)
        found = [
            compare(policy.model.eval(), rows, length, options.tokens, options.repeats, cache)
            for cache, rows, length in WORK
        ]
        write_json(options.out, {"environment": environment(), "decode": found})


if __name__ == "__main__":
    main()
