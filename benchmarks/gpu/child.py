"""One measurement in a process of its own: the parent starts it, and whatever happens here stays here.

python -m benchmarks.gpu.child NAME --size 3b --folder SCRATCH --steps 2 --record FILE
"""

import argparse
import importlib
import sys
from pathlib import Path

from apo_lora.machine.process import prepare_process
from benchmarks.gpu.measurements import MEASUREMENTS, Measurement, Setting
from benchmarks.gpu.record import Record


def main(arguments: list[str]) -> None:
    measurement, setting, record = parse(arguments)
    prepare_process()
    if measurement.unsloth:
        import unsloth  # noqa: F401  before trl: it rewrites the trainers
    run(measurement, setting, record)


def parse(arguments: list[str]) -> tuple[Measurement, Setting, Record]:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=[m.name for m in MEASUREMENTS])
    parser.add_argument("--size", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args(arguments)
    measurement = next(m for m in MEASUREMENTS if m.name == options.name)
    return measurement, Setting(options.size, options.folder, options.steps), Record(options.record)


def run(measurement: Measurement, setting: Setting, record: Record) -> None:
    from apo_lora.machine.versions import environment

    record.put(environment=environment(), switches=dict(measurement.environment))
    module, _, function = measurement.function.partition(":")
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(record, setting, **measurement.arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
