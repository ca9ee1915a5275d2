"""One measurement of the suite on the null GPU: operations, launches, bytes and the allocator's peaks by phase.

    python -m tools.null_gpu -m benchmarks.gpu.simulated recipes/single_gpu --out FILE --scratch FOLDER

The exact 3B in 4-bit, the recipe's card, trainer and rollout, with prompts and completions of full length. Of each
completion only the first tokens are sampled: that changes neither the peak, since Unsloth's cache has its full length
from the start, nor what one token costs. Nothing is computed but small tensors, so there are no seconds.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from apo_lora.machine.process import prepare_process
from benchmarks.gpu.measurements import MEASUREMENTS, Measurement, Setting
from benchmarks.gpu.record import Record

TOKENS = 4
"""The first comes of the pass that reads the prompts; the last one is counted."""

CAPABILITY = {"colab_t4": "75", "gpu_8gb": "86"}
"""By recipe; all other measurements are for an RTX 4090, the null GPU's default."""


class Phases:
    """Work and peak by phase: those of PhaseClock, and of sampling `prefill` and `token`, its last."""

    def __init__(self, counting: Any):
        self.counting = counting
        self.found: dict[str, dict[str, Any]] = {}

    def close(self, phase: str) -> None:
        """What passed since the last call belongs to `phase`."""
        import torch

        work, peak = self.counting.take(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        before = self.found.get(phase, {"peak_bytes": 0, "work": {}})
        if phase != "token":
            for name, done in before["work"].items():
                work[name] = done.plus(work[name]) if name in work else done
        self.found[phase] = {"peak_bytes": max(before["peak_bytes"], peak), "work": work}

    def peak(self, phase: str) -> int:
        parts = ("prefill", "token", phase) if phase == "generate" else (phase,)
        return max(self.found[part]["peak_bytes"] for part in parts if part in self.found)

    def summary(self) -> dict[str, Any]:
        """Totals, and the ten operations that move the most bytes."""
        return {
            phase: {"peak_bytes": found["peak_bytes"], **totals(found["work"])} for phase, found in self.found.items()
        }


def totals(work: dict[str, Any]) -> dict[str, Any]:
    largest = sorted(work.items(), key=lambda found: -found[1].bytes)[:10]
    return {
        **{kind: sum(getattr(done, kind) for done in work.values()) for kind in ("operations", "launches", "bytes")},
        "movers": {name: {"operations": done.operations, "bytes": done.bytes} for name, done in largest},
    }


def watch(phases: Phases, stock_attention: bool, passes: int | None) -> None:
    """Closes a phase at every border, and cuts completions short, and steps if `passes` says after how many passes."""
    import torch
    import trl
    from transformers import GenerationMixin
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from benchmarks.gpu.phase_clock import PhaseClock

    border, unfinished = PhaseClock._border, GenerationMixin._has_unfinished_sequences
    owner = next(cls for cls in trl.GRPOTrainer.__mro__ if "_generate_single_turn" in vars(cls))
    turn, tokens = owner._generate_single_turn, 0
    step_owner = next(cls for cls in trl.GRPOTrainer.__mro__ if "training_step" in vars(cls))
    one_pass, num_passes = step_owner.training_step, 0

    def only_the_first(trainer: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal num_passes
        num_passes += 1
        place = (num_passes - 1) % trainer.args.gradient_accumulation_steps
        if passes and place >= passes:
            trainer._step += 1
            return torch.zeros((), device="cuda")
        return one_pass(trainer, *arguments, **options)

    def closing(clock: PhaseClock) -> None:
        phase = clock.open_phases[-1] if clock.open_phases else "outside"
        phases.close(phase)
        border(clock)
        if clock.open_phases:  # what it has read itself is a peak that was reset
            clock.steps[-1]["peak_bytes"][phase] = phases.peak(phase)

    def a_few(model: Any, *arguments: Any, **options: Any) -> bool:
        nonlocal tokens
        tokens += 1
        phases.close("prefill" if tokens == 1 else "token")
        return unfinished(model, *arguments, **options) and tokens < TOKENS

    def filled_up(trainer: Any, *arguments: Any, **options: Any) -> tuple[list[list[int]], Any]:
        nonlocal tokens
        tokens = 0
        ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if stock_attention:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = getattr(ours, "__wrapped__", ours)
        ids, logps = turn(trainer, *arguments, **options)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ours
        return [row + [0] * (trainer.max_completion_length - len(row)) for row in map(list, ids)], logps

    PhaseClock._border, GenerationMixin._has_unfinished_sequences = closing, a_few
    owner._generate_single_turn, step_owner.training_step = filled_up, only_the_first


def measure(
    measurement: Measurement, setting: Setting, record: Record, stock_attention: bool, passes: int | None
) -> None:
    os.environ.update(measurement.environment)
    os.environ.setdefault("NULLGPU_CC", CAPABILITY.get(measurement.arguments.get("name", ""), "89"))
    os.environ.setdefault("NULLGPU_LARGEST_COPY", str(2**20))  # nobody looks at weights and pictures
    prepare_process()
    if measurement.unsloth:
        import unsloth  # noqa: F401  before trl: it rewrites the trainers
    from benchmarks.gpu import child
    from benchmarks.gpu.random_model import make
    from tools.null_gpu.counting import Counting

    if not setting.model.is_dir():
        make(setting.size, setting.model, sparse=True)
    counting = Counting()
    phases = Phases(counting)
    watch(phases, stock_attention, passes)
    with counting:
        child.run(measurement, setting, record)
    record.put(phases=phases.summary(), date=time.strftime("%Y-%m-%d"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[m.name for m in MEASUREMENTS if m.name.startswith(("recipes", "peers"))])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the model and the run")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps (default: 1)")
    parser.add_argument("--passes", type=int, help="of a step, all alike, that are done (default: all)")
    parser.add_argument("--stock-attention", action="store_true", help="sample as transformers and Unsloth do")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    options = parser.parse_intermixed_args()
    measurement = next(m for m in MEASUREMENTS if m.name == options.name)
    arguments = {**measurement.arguments, "overrides": ["train.preflight=false", *options.overrides]}
    by_unsloth = measurement.unsloth and "model.engine=transformers" not in options.overrides
    measurement = replace(measurement, arguments=arguments, unsloth=by_unsloth)
    setting = Setting("3b", options.scratch.absolute(), options.steps - 1)
    measure(measurement, setting, Record(options.out.absolute()), options.stock_attention, options.passes)


if __name__ == "__main__":
    main()
