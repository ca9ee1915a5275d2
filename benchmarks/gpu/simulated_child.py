"""Counts of benchmarks.gpu.simulated that one process on the null GPU can make: imports once, then a fork for each.

Of each completion only the first tokens are sampled: that changes neither the peak, since Unsloth's cache has its full
length from the start, nor what one token costs. Nothing is computed but small tensors, so there are no seconds.
"""

import argparse
import gc
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from apo_lora.machine.process import prepare_process
from benchmarks.gpu.measurements import Setting
from benchmarks.gpu.record import Record
from benchmarks.gpu.simulated import COUNTS, GPUS, Count

TOKENS = 3
"""The first comes of the pass that reads the prompts; the last one is counted."""


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


def watch(phases: Phases, count: Count) -> None:
    """Closes a phase at every border; cuts completions short, and scoring and training to `count.passes` passes; of
    preflight only the memory part is done, since the others judge values."""
    import torch
    import trl
    from transformers import GenerationMixin, Trainer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from apo_lora.policy import scoring
    from apo_lora.preflight import checks
    from apo_lora.run import plots
    from benchmarks.gpu.phase_clock import PhaseClock

    border, unfinished = PhaseClock._border, GenerationMixin._has_unfinished_sequences
    owner = next(cls for cls in trl.GRPOTrainer.__mro__ if "_generate_single_turn" in vars(cls))
    turn, tokens = owner._generate_single_turn, 0
    step_owner = next(cls for cls in trl.GRPOTrainer.__mro__ if "training_step" in vars(cls))
    one_pass, num_passes = step_owner.training_step, 0
    score_rows, num_scored, passes = scoring._score_rows, 0, count.passes

    def memory_part(policy: Any, examples: Any, recipe: Any, servers: Any = None) -> tuple[list, Any]:
        phases.close("outside")
        memory, fitted = checks.fit_largest(policy, examples, recipe)
        phases.close("preflight")
        return [memory], fitted

    def score_the_first(model: Any, batch: Any, *arguments: Any) -> Any:
        nonlocal num_scored
        num_scored += not torch.is_grad_enabled()
        if passes and num_scored > passes and not torch.is_grad_enabled():
            batch = {**batch, "completion_mask": torch.zeros_like(batch["completion_mask"])}  # nothing to compute
        return score_rows(model, batch, *arguments)

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
        nonlocal tokens, num_scored
        tokens = num_scored = 0
        ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if count.stock_attention:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = getattr(ours, "__wrapped__", ours)
        ids, logps = turn(trainer, *arguments, **options)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ours
        return [row + [0] * (trainer.max_completion_length - len(row)) for row in map(list, ids)], logps

    PhaseClock._border, GenerationMixin._has_unfinished_sequences = closing, a_few
    Trainer._save_checkpoint = plots.png = lambda *_: b""  # no work of the GPU's
    owner._generate_single_turn, step_owner.training_step = filled_up, only_the_first
    checks.preflight, scoring._score_rows = memory_part, score_the_first


def measure(count: Count, setting: Setting, file: Path) -> None:
    """In a fork, where torch would refuse a real GPU: a fork cannot use its context. The null GPU has none."""
    import torch
    from bitsandbytes.backends.cuda import ops

    from benchmarks.gpu import child
    from benchmarks.gpu.random_model import make
    from tools.null_gpu.counting import Counting

    torch.cuda._is_in_bad_fork = lambda: False
    gpu = GPUS[count.gpu]
    chosen_by = (int(gpu["NULLGPU_SMS"]), *divmod(int(gpu["NULLGPU_CC"]), 10))
    ops._gpu_dispatch_props = lambda device: chosen_by
    os.environ.update(count.measurement.environment)
    if not setting.model.is_dir():
        make(setting.size, setting.model, sparse=True)
    counting, record = Counting(), Record(file)
    phases = Phases(counting)
    watch(phases, count)
    arguments = {**count.measurement.arguments, "overrides": count.overrides}
    with counting:
        child.run(replace(count.measurement, arguments=arguments), setting, record)
    record.put(phases=phases.summary(), date=time.strftime("%Y-%m-%d"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[count.name for count in COUNTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--passes", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    counts = [count for count in COUNTS if count.name in options.names]
    os.environ.update(GPUS["t4" if counts[0].gpu == "t4" else "rtx4090"])
    os.environ.update(NULLGPU_LARGEST_COPY=str(2**20))  # nobody looks at weights and pictures
    prepare_process()
    if counts[0].measurement.unsloth:
        import unsloth  # noqa: F401  before trl: it rewrites the trainers
    from benchmarks.gpu import peers, recipes  # noqa: F401

    gc.collect()
    gc.freeze()  # what a fork collects is its own
    failed = 0
    for count in counts:
        count = replace(count, passes=options.passes or count.passes)
        setting = Setting(count.size, options.scratch, (options.steps or count.steps) - 1)
        arguments = (count, setting, options.out / f"{count.name}.json")
        fork = multiprocessing.get_context("fork").Process(target=measure, args=arguments)
        fork.start()
        fork.join()
        print(f"{count.name}: {'failed' if fork.exitcode else 'counted'}", flush=True)
        failed += bool(fork.exitcode)
    return failed


if __name__ == "__main__":
    sys.exit(main())
