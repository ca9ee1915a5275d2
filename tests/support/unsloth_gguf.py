"""export_unsloth's own program on a host without a GPU: MERGED QUANTIZATION are given."""

import sys

from unsloth_on_cpu import start

start()

from apo_lora.export.by_unsloth import main  # noqa: E402

main(*sys.argv[1:])
