"""Thousands of steps of a tiny run, watched from outside: memory, open files, threads, and what the logs grow by.

    python -m tests.faults.endurance --steps 2000

Exits with 1 where resident memory grows by 1 KB a step or more after the warm-up, or open files or threads grow at all.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.forks import Forked

SAMPLE_SECONDS = 0.5
WARM_UP = 0.25
"""Of the steps: allocators and caches fill up."""
MOST_KB_PER_STEP = 1.0


@dataclass(frozen=True)
class Sample:
    step: int
    resident_kb: int
    anonymous_kb: int
    """Resident less what belongs to files: libraries are mapped in as they are used."""
    open_files: int
    threads: int


@dataclass(frozen=True)
class Figures:
    steps: int
    seconds_per_step: float
    resident_mb: float
    resident_kb_per_step: float
    anonymous_kb_per_step: float
    open_files: tuple[int, int]
    """Fewest and most after the warm-up, as of the threads."""
    threads: tuple[int, int]
    metrics_bytes_per_step: float
    completions_bytes_per_completion: float
    checkpoint_bytes: tuple[int, int]
    """The first one that is still there, and the last."""

    def problems(self, most_kb_per_step: float) -> list[str]:
        found = []
        if self.resident_kb_per_step >= most_kb_per_step:
            found.append(f"resident memory grows by {self.resident_kb_per_step:.2f} KB a step")
        if self.open_files[1] - self.open_files[0] > 4:  # those of the write under way
            found.append(f"open files: {self.open_files}")
        if self.threads[1] - self.threads[0] > 2:
            found.append(f"threads: {self.threads}")
        return found


def arguments(run: Path, steps: int) -> list[str]:
    reward = Path(__file__).with_name("rewards.py")
    return [
        "-m", "apo_lora.train", "--recipe", "tiny_cpu",
        "grpo.prompts_per_step=1", "grpo.num_generations=2", "grpo.completions_per_pass=2",
        "grpo.max_completion_length=8", f"rewards.functions=[accuracy,'{reward}:by_text']",
        f"train.max_steps={steps}", f"train.save_steps={max(1, steps // 20)}", "train.keep_checkpoints=20",
        "train.learning_rate=1e-5", "train.evaluate=false", "train.preflight=false", "data.limit=8",
        f"output.dir={run}",
    ]  # fmt: skip


def watch(folder: Path, steps: int, show_progress: bool = True) -> tuple[list[Sample], float]:
    """Runs it. Returns samples of its steps, and seconds per step."""
    from tqdm import tqdm

    run = folder / "run"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    samples: list[Sample] = []
    with tqdm(total=steps, unit="step", disable=not show_progress) as bar:
        process = Forked(arguments(run, steps), env=environment)
        started = None
        while process.poll() is None:
            time.sleep(SAMPLE_SECONDS)
            step = _lines(run / "metrics.jsonl")
            if step and started is None:
                started = (time.monotonic(), step)
            if step > bar.n and (sample := _sample(process.pid, step)):
                samples.append(sample)
                bar.update(step - bar.n)
    if process.returncode or _lines(run / "metrics.jsonl") != steps:
        raise SystemExit(f"the run broke off:\n{process.communicate()[1][-3000:]}")
    return samples, (time.monotonic() - started[0]) / (steps - started[1])


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _sample(pid: int, step: int) -> Sample | None:
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        kb = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssAnon")}
        return Sample(step, kb["VmRSS"], kb["RssAnon"], len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]))
    except (FileNotFoundError, ProcessLookupError, KeyError):  # it has just ended
        return None


def slope(points: list[tuple[int, int]]) -> float:
    """Of the least-squares line through (x, y)."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def figures(folder: Path, steps: int, samples: list[Sample], seconds_per_step: float) -> Figures:
    from apo_lora.run.directory import RunDir

    run = RunDir(folder / "run")
    late = [sample for sample in samples if WARM_UP * steps < sample.step < steps]  # after the last step come the plots
    checkpoints = [sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in run.valid_checkpoints()]
    return Figures(
        steps,
        seconds_per_step,
        late[-1].resident_kb / 1024,
        slope([(s.step, s.resident_kb) for s in late]),
        slope([(s.step, s.anonymous_kb) for s in late]),
        (min(s.open_files for s in late), max(s.open_files for s in late)),
        (min(s.threads for s in late), max(s.threads for s in late)),
        run.metrics.stat().st_size / steps,
        run.completions.stat().st_size / _lines(run.completions),
        (checkpoints[0], checkpoints[-1]),
    )


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--most-kb-per-step", type=float, default=MOST_KB_PER_STEP)
    parser.add_argument("--samples", metavar="FILE", type=Path, help="write every sample there, as JSON")
    options = parser.parse_args(given)
    folder = Path(tempfile.mkdtemp(prefix="endurance-"))
    try:
        samples, seconds_per_step = watch(folder, options.steps)
        found = figures(folder, options.steps, samples, seconds_per_step)
    finally:
        shutil.rmtree(folder)
    if options.samples:
        options.samples.write_text(json.dumps([asdict(sample) for sample in samples]))
    for name, value in asdict(found).items():
        print(f"{name:<34} {value if isinstance(value, tuple | list | int) else format(value, '.3f')}")
    problems = found.problems(options.most_kb_per_step)
    print("\n".join(problems) or "flat")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
