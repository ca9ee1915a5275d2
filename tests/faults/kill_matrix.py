"""Kills a tiny run at seeded moments, resumes it, and compares what it ends as with the uninterrupted run.

    python -m tests.faults.kill_matrix --kills 100 --seed 0

Five of six moments are write points: an operation on a file of each kind in turn, at its beginning or up to 5 ms into
it. The others are random times. Every fourth run is killed again while it resumes. On top of the SIGKILLs come a fifth
as many SIGTERMs and SIGINTs. Exits with 1 on any difference.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .tiny_runs import STEPS, Ended, arguments, differences, import_as, prepare, run, threads
from .write_points import KINDS, Point

LONGEST_DELAY_MS = 5.0


@dataclass(frozen=True)
class Moment:
    """Where a run is killed: at a write point, or after a time."""

    point: Point | None
    seconds: float | None


@dataclass(frozen=True)
class Case:
    number: signal.Signals
    moments: tuple[Moment, ...]
    """Of the run, and perhaps of its resumption."""


def cases(kills: int, seed: int, reference: Ended) -> Iterator[Case]:
    counts = Counter(kind for kind, _, _ in reference.operations)
    kinds = [kind for kind in KINDS if kind in counts]
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * (kills // 5) + [signal.SIGINT] * (kills // 5)
    for place, number in enumerate(signals):
        rng = random.Random(f"{seed} {place}")

        def moment(at_write: bool, kind: str, rng: random.Random = rng) -> Moment:
            if not at_write:
                return Moment(None, rng.uniform(0, reference.seconds))
            delay = rng.choice([0.0, rng.uniform(0, LONGEST_DELAY_MS)])
            return Moment(Point(kind, rng.randint(1, counts[kind]), delay), None)

        moments = [moment(place % 6 < 5, kinds[(place // 6 * 5 + place % 6) % len(kinds)])]
        if place % 4 == 3:
            moments.append(moment(rng.random() < 0.5, rng.choice(kinds)))
        yield Case(number, tuple(moments))


def play(case: Case, folder: Path, reference: Path) -> dict:
    """One case to its end. Returns its row."""
    reached, codes, met = [], [], 0
    for moment in case.moments:
        ended = run(folder, number=case.number, at_seconds=moment.seconds, at_point=moment.point)
        codes.append(ended.code)
        met += ended.sent and ended.code != 0
        if ended.reached:
            reached.append({**ended.reached, "inside": moment.point.delay_ms > 0})
    problems = [f"exit code {code}" for code in codes if code not in expected_codes(case.number)]
    ended = run(folder)
    if ended.code:
        problems.append(f"the resumed run ended with {ended.code}: {ended.output[-1500:]}")
    problems += differences(folder, reference)
    return {"signal": case.number.name, "met": met, "reached": reached, "problems": problems, "codes": codes}


def expected_codes(number: signal.Signals) -> set[int]:
    """By the signal itself, by the orderly stop, or none because the run had ended before."""
    return {-number, 128 + number, 0}


# --- all of them, on several cores -----------------------------------------------------------------------------------


def play_all(wanted: list[Case], folder: Path, jobs: int) -> Iterator[dict]:
    """Rows as they come. Each of the jobs is a fork that plays its share, one case at a time."""
    reader, writer = os.pipe()
    children = []
    for job in range(jobs):
        child = os.fork()
        if not child:
            os.close(reader)
            code = 0
            try:
                for place in range(job, len(wanted), jobs):
                    case_folder = folder / f"case-{place}"
                    try:
                        row = play(wanted[place], case_folder, folder / "reference")
                    except AssertionError as error:
                        row = {"signal": wanted[place].number.name, "met": 0, "reached": [], "problems": [str(error)]}
                    if not row["problems"]:
                        shutil.rmtree(case_folder)
                    (folder / f"row-{place}.json").write_text(json.dumps({"case": place, **row}))
                    os.write(writer, f"{place}\n".encode())
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 70
            finally:
                os._exit(code)
        children.append(child)
    os.close(writer)
    buffer = b""
    while True:
        select.select([reader], [], [])
        part = os.read(reader, 4096)
        if not part:
            break
        buffer += part
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            yield json.loads((folder / f"row-{int(line)}.json").read_text())
    for child in children:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "a job of the matrix broke off"


def table(rows: list[dict], kinds: list[str]) -> list[str]:
    at = Counter((place["kind"], place["inside"]) for row in rows for place in row["reached"])
    lines = [f"{'killed at a write of':<24} {'before it':>10} {'inside it':>10}"]
    lines += [f"{kind:<24} {at[kind, False]:>10} {at[kind, True]:>10}" for kind in kinds]
    for name in ("SIGKILL", "SIGTERM", "SIGINT"):
        own = [row for row in rows if row["signal"] == name]
        if own:
            lines.append(
                f"{name}: {len(own)} runs, {sum(row['met'] for row in own)} times met while running, "
                f"{sum(bool(row['problems']) for row in own)} with a difference"
            )
    return lines


def reference_run(folder: Path) -> Ended:
    """The uninterrupted run, played in a fork; afterwards this process has imported all that a run imports."""
    ended = run(folder / "reference")
    assert ended.code == 0, ended.output[-3000:]
    import_as(ended.modules)
    assert not threads(), f"threads {threads()} would not survive a fork"
    timed = run(folder / "timed")  # with all imports done, as the others will be
    assert timed.code == 0 and not differences(folder / "timed", folder / "reference"), (
        differences(folder / "timed", folder / "reference") or timed.output[-3000:]
    )
    return timed


def shorter_run_differs(folder: Path) -> bool:
    """The witness that a difference would be seen: a run of one step fewer."""
    other = run(folder / "shorter", f"train.max_steps={STEPS - 1}")
    return other.code == 0 and "adapter/adapter_model.safetensors differs" in differences(
        folder / "shorter", folder / "reference"
    )


def plain_run_is_the_same(folder: Path) -> bool:
    """The command as a user starts it, without a fork."""
    import subprocess

    finished = subprocess.run(
        [sys.executable, "-m", "apo_lora.commands.main", *arguments(folder / "plain")], capture_output=True, text=True
    )
    return finished.returncode == 0 and not differences(folder / "plain", folder / "reference")


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="runs killed with SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only-forks", action="store_true", help="do not try the command without a fork as well")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="work there, and leave runs that differ")
    options = parser.parse_args(given)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    started = time.monotonic()
    print("Importing, and the uninterrupted run ...", flush=True)
    prepare()
    reference = reference_run(folder)
    assert shorter_run_differs(folder), "a shorter run does not differ: nothing would be seen"
    assert options.only_forks or plain_run_is_the_same(folder), "the command without a fork gives another run"
    wanted = list(cases(options.kills, options.seed, reference))
    print(f"{len(wanted)} runs of {reference.seconds:.1f} s, {len(reference.operations)} write points each", flush=True)

    from tqdm import tqdm

    rows = []
    with tqdm(total=len(wanted), desc="killed and resumed", unit="run", smoothing=0) as bar:
        for row in play_all(wanted, folder, options.jobs):
            rows.append(row)
            bar.update()
            for problem in row["problems"]:
                bar.write(f"case {row['case']} ({row['signal']}, {wanted[row['case']].moments}): {problem}")
    kinds = sorted({kind for kind, _, _ in reference.operations}, key=list(KINDS).index)
    print("\n".join(table(rows, kinds)))
    hit = {place["kind"] for row in rows for place in row["reached"]}
    planned = {case.moments[0].point.kind for case in wanted if case.moments[0].point}
    if missed := planned - hit:
        print(f"no kill hit a write of: {', '.join(sorted(missed))}")
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} runs end as the uninterrupted one; {time.monotonic() - started:.0f} s")
    if not options.keep:
        shutil.rmtree(folder)
    return 1 if bad or missed else 0


if __name__ == "__main__":
    sys.exit(main())
