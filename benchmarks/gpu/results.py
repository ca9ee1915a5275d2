"""Results on disk: one JSON file of every measurement, and the tables that people read.

    python -m benchmarks.gpu.results RESULTS.json [MORE.json ...] --to FOLDER

puts together what several commands measured on the same machine, a later file's figures winning.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apo_lora.run.files import write_atomically, write_json
from benchmarks.gpu.aims import ratios

RESULTS, TABLE = "results.json", "results.md"
GiB = 2**30
PHASES = ("generate", "score", "train")
DASH = "-"

Measured = dict[str, Any]
"""One measurement: how it ended (`status`, `seconds_in_all`, `date`, `setting`), and what its child recorded."""
Results = dict[str, Measured]
"""By the measurement's name."""


def read(folder: Path) -> Results:
    path = folder / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, results: Results) -> None:
    write_json(folder / RESULTS, results)
    write_atomically(folder / TABLE, table(results))


def failed_checks(measured: Measured) -> list[dict[str, Any]]:
    return [check for check in measured.get("checks", ()) if not check["ok"]]


# --- tables ----------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    parts = (
        machines(results),
        recipes_table(results),
        peers_table(results),
        sampling_table(results),
        aims_table(results),
        checks_table(results),
        endings(results),
    )
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def machines(results: Results) -> Iterator[str]:
    """Every distinct machine, software and setting among the results: normally one."""
    yield (
        "# Measured on a GPU"
        if any((m.get("environment") or {}).get("gpu") for m in results.values())
        else ("# A rehearsal without a GPU: none of these figures is a result")
    )
    yield ""
    seen = {}
    for measured in results.values():
        if environment := measured.get("environment"):
            seen.setdefault(describe(environment, measured["setting"]), set()).add(measured["date"][:10])
    for machine, dates in seen.items():
        yield f"- {', '.join(sorted(dates))}: {machine}"


def describe(environment: dict[str, Any], setting: dict[str, Any]) -> str:
    gpu = environment["gpu"]
    device = f"{gpu['name']}, {gpu['memory_bytes'] / GiB:.0f} GiB, CUDA {gpu['cuda']}" if gpu else "CPU"
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return (
        f"{device}; Python {environment['python']}; {packages}; random weights of the {setting['size']} shape, "
        f"{setting['steps']} timed steps, code {setting['code']}"
    )


def recipes_table(results: Results) -> Iterator[str]:
    rows = {n.removeprefix("recipes/"): m for n, m in results.items() if n.startswith("recipes/") and "seconds" in m}
    if not rows:
        return
    yield "## Recipes on cards of their size"
    yield ""
    yield "Peak of torch's allocator in GiB, in brackets its ratio to the planned one; median seconds of a step."
    yield ""
    yield _row("recipe", "card", *(f"{p} GiB" for p in PHASES), *(f"{p} s" for p in PHASES), "tokens/s", "as it stands")
    yield _rule(10)
    for name, measured in rows.items():
        peaks = (_peak(measured["peak_bytes"][p], (measured.get("memory") or {}).get(p)) for p in PHASES)
        seconds = (f"{measured['seconds'][p]:.1f}" for p in PHASES)
        fits = next((c["ok"] for c in measured["checks"] if "holds the recipe" in c["name"]), None)
        yield _row(
            f"`{name}`", f"{measured['card_gib']} GiB", *peaks, *seconds, f"{measured['tokens_per_second']:.0f}",
            {True: "yes", False: "no", None: DASH}[fits],
        )  # fmt: skip


def peers_table(results: Results) -> Iterator[str]:
    rows = {n.removeprefix("peers/"): m for n, m in results.items() if n.startswith("peers/") and "seconds" in m}
    if not rows:
        return
    ours = {m["rows_at_once"]: m for m in rows.values() if m["engine"] == "ours"}
    yield "## Peers on the same work"
    yield ""
    yield (
        "Peak of torch's allocator in GiB and median seconds of a step; in brackets the ratio to ours with as many "
        "rows of the group at once."
    )
    yield ""
    yield _row(
        "peer", "rows", "peak GiB", *(f"{p} GiB" for p in PHASES), *(f"{p} s" for p in PHASES), "step s", "tok/s"
    )
    yield _rule(11)
    for name, measured in rows.items():
        our = ours.get(measured["rows_at_once"], {})
        peaks = (
            _peak(measured["peak_bytes"][p], _ratio(measured["peak_bytes"][p], our.get("peak_bytes", {}).get(p)))
            for p in PHASES
        )
        seconds = (
            _figure(measured["seconds"][p], _ratio(measured["seconds"][p], our.get("seconds", {}).get(p)))
            for p in PHASES
        )
        whole, step, speed = "peak_bytes_of_step", "seconds_per_step", "tokens_per_second"
        yield _row(
            name, measured["rows_at_once"], _peak(measured[whole], _ratio(measured[whole], our.get(whole))), *peaks,
            *seconds, _figure(measured[step], _ratio(measured[step], our.get(step))),
            _figure(measured[speed], _ratio(measured[speed], our.get(speed)), "{:.0f}"),
        )  # fmt: skip
    counts = {(m["tokens"]["prompt"], m["tokens"]["completion"]) for m in rows.values()}
    yield ""
    yield (
        f"Everybody read {min(counts)[0]:,} and wrote {min(counts)[1]:,} tokens a step."
        if len(counts) == 1
        else f"**Not comparable**: tokens read and written in a step differ: {sorted(counts)}."
    )


def sampling_table(results: Results) -> Iterator[str]:
    rows = {n.removeprefix("sampling/"): m for n, m in results.items() if n.startswith("sampling/")}
    measured, ragged = {n: m for n, m in rows.items() if "seconds" in m}, rows.get("ragged", {}).get("rollouts", ())
    if not measured and not ragged:
        return
    yield "## Sampling: generate() and vLLM"
    yield ""
    yield "Median seconds of a step; what is sampled ahead counts in `generate` only while the trainer waits for it."
    yield ""
    yield _row("sampled by", "step s", *(f"{p} s" for p in PHASES), "tok/s")
    yield _rule(6)
    for name, found in measured.items():
        seconds = (_figure(found["seconds"][p], None) for p in PHASES)
        speed = _figure(found["tokens_per_second"], None, "{:.0f}")
        yield _row(name, f"{found['seconds_per_step']:.2f}", *seconds, speed)
    if ragged:
        yield from ("", "Completions of ragged lengths, in tokens per second:", "")
        yield _row("completions", "tokens", "generate()", "vLLM")
        yield _rule(4)
    for row in ragged:
        rates = row["tokens_per_second"]
        yield _row(row["G"], f"{row['tokens']:,}", f"{rates['transformers']:.0f}", f"{rates['vllm']:.0f}")


def aims_table(results: Results) -> Iterator[str]:
    rows = list(ratios(results))
    if not rows:
        return
    yield "## Aims"
    yield ""
    yield "Ours over theirs, each side at its best setting for that figure."
    yield ""
    yield _row("of ours", "ratio", "aim", "")
    yield _rule(4)
    for aim, ratio in rows:
        yield _row(aim.words, f"{ratio:.2f}", f"at most {aim.at_most}", "met" if ratio <= aim.at_most else "**missed**")


def checks_table(results: Results) -> Iterator[str]:
    rows = [(name, check) for name, measured in results.items() for check in measured.get("checks", ())]
    if not rows:
        return
    yield "## Checks"
    yield ""
    yield _row("measurement", "check", "", "found")
    yield _rule(4)
    for name, check in rows:
        yield _row(name, check["name"], "ok" if check["ok"] else "**FAIL**", _words(check["found"]))


def endings(results: Results) -> Iterator[str]:
    yield "## How each measurement ended"
    yield ""
    yield _row("measurement", "ended", "seconds", "failed checks")
    yield _rule(4)
    for name, measured in results.items():
        ended = f"skipped: {measured['skipped']}" if "skipped" in measured else measured["status"]
        yield _row(name, ended, f"{measured['seconds_in_all']:.0f}", len(failed_checks(measured)))


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _ratio(value: float | None, ours: float | None) -> float | None:
    return value / ours if value and ours else None


def _figure(value: float | None, ratio: float | None, form: str = "{:.2f}") -> str:
    if value is None:
        return DASH
    return form.format(value) + ("" if ratio is None else f" ({ratio:.2f})")


def _peak(value: int | None, ratio: float | None) -> str:
    return _figure(value and value / GiB, ratio)


def _words(found: Any) -> str:
    if isinstance(found, float):
        return f"{found:.3g}"
    if isinstance(found, dict):
        return "; ".join(f"{key} {_words(value)}" for key, value in found.items())
    if isinstance(found, list):
        return ", ".join(_words(value) for value in found)
    return str(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    merged: Results = {}
    for path in options.files:
        merged.update(json.loads(path.read_text()))
    write(options.to, merged)
    print(options.to / TABLE)


if __name__ == "__main__":
    main()
