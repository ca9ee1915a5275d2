"""The whole suite in one command, or a part of it:

    python -m benchmarks.gpu --out DIR [--only smoke,recipes,peers] [--budget SECONDS]

Each measurement runs in a process of its own, one after the other. After each, DIR holds everything found so far:
results.json, results.md, log.txt. What is in the scratch folder from an earlier command, of the same code and setting,
is not measured again, so on a machine that ends commands after some minutes the same command goes on where it was.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu import results as results_files
from benchmarks.gpu.measurements import PROJECT, Measurement, Setting, selected
from benchmarks.gpu.results import Measured, Results, failed_checks

CHILD = (sys.executable, "-m", "benchmarks.gpu.child")
OFFLINE = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}  # else each load waits for a network

LOG_BYTES = 60_000
"""Of each measurement's output, the end that is kept."""
TOO_SHORT = 45
"""Seconds in which no measurement gets anywhere: importing and loading take longer."""


def main(arguments: Sequence[str] | None = None, child: Sequence[str] = CHILD) -> int:
    """0 if everything selected was measured, or skipped with its reason, and every check was ok."""
    options = parse(arguments)
    setting = Setting(options.size, options.scratch.absolute(), options.steps)
    setting.folder.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.budget
    # Of other code or another setting, earlier figures mean something else.
    earlier = {} if options.again else results_files.read(setting.folder)
    results = {name: found for name, found in earlier.items() if found["setting"] == setting.fingerprint()}
    wanted = selected(options.only)
    if not setting.model.is_dir():
        wanted = [*selected("model"), *(m for m in wanted if m.name != "model")]
    for measurement in wanted:
        if is_done(results.get(measurement.name)) and (measurement.name != "model" or setting.model.is_dir()):
            continue
        seconds = min(measurement.seconds, ends - time.monotonic())
        if seconds < TOO_SHORT:
            print(f"{measurement.name}: no time left; the same command again goes on here", flush=True)
            continue
        print(f"{measurement.name} ...", end=" ", flush=True)
        results[measurement.name] = measure(measurement, setting, seconds, child, options.out / "log.txt")
        print(described(results[measurement.name]), flush=True)
        for folder in (setting.folder, options.out):
            results_files.write(folder, results)
        if not setting.model.is_dir():
            print("nothing else can be measured without the model", flush=True)
            break
    results_files.write(options.out, results)
    print(options.out / results_files.TABLE)
    return exit_status(results, wanted)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--only", default="", help="beginnings of names, comma-separated, such as smoke,recipes/gpu")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for the whole command")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps, after one that warms up")
    parser.add_argument("--size", choices=("3b", "tiny"), default="3b", help="shape of the random model")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "apo-lora-gpu",
        help="folder for the model, runs and earlier results",
    )
    parser.add_argument("--again", action="store_true", help="measure also what the scratch folder has a result of")
    return parser.parse_args(arguments)


def is_done(measured: Measured | None) -> bool:
    """What was skipped may be possible the next time."""
    return bool(measured) and measured["status"] == "finished" and "skipped" not in measured


def measure(measurement: Measurement, setting: Setting, seconds: float, child: Sequence[str], log: Path) -> Measured:
    """Runs it in a child process for at most so many seconds. Whatever it recorded until its end counts."""
    record = setting.folder / "records" / f"{measurement.name.replace('/', '-')}.json"
    record.unlink(missing_ok=True)
    command = [
        *child, measurement.name, "--size", setting.size, "--folder", str(setting.folder),
        "--steps", str(setting.steps), "--record", str(record),
    ]  # fmt: skip
    search = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**OFFLINE, **os.environ, "PYTHONPATH": search, **measurement.environment}
    output = setting.folder / "output.txt"
    started = time.monotonic()
    with output.open("wb") as file:
        # A session of its own, so that its worker processes end with it. Unsloth writes into the working directory.
        process = subprocess.Popen(
            command, cwd=setting.folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = "finished" if process.wait(seconds) == 0 else f"failed with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} seconds"
        finally:
            stop(process)
    text = output.read_bytes()[-LOG_BYTES:].decode(errors="replace")
    with log.open("a") as file:
        file.write(f"\n===== {measurement.name}: {status} =====\n{text}")
    recorded = json.loads(record.read_text()) if record.exists() else {}
    return {
        "status": status,
        "seconds_in_all": time.monotonic() - started,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": setting.fingerprint(),
        **({} if status == "finished" else {"last_words": text.splitlines()[-15:]}),
        **recorded,
    }


def stop(process: subprocess.Popen) -> None:
    """The child, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def described(measured: Measured) -> str:
    if "skipped" in measured:
        return f"skipped: {measured['skipped']}"
    failed = failed_checks(measured)
    checks = f", {len(failed)} of {len(measured.get('checks', ()))} checks failed" if failed else ""
    return f"{measured['status']} ({measured['seconds_in_all']:.0f} s{checks})"


def exit_status(results: Results, wanted: Sequence[Measurement]) -> int:
    found = [results.get(measurement.name) for measurement in wanted]
    return int(not all(m and m["status"] == "finished" and not failed_checks(m) for m in found))


if __name__ == "__main__":
    sys.exit(main())
