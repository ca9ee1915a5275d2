"""`apo-lora eval` under Unsloth on a host without a GPU: its arguments are given."""

import sys

from unsloth_on_cpu import start

start()

from apo_lora.commands.main import main  # noqa: E402

sys.exit(main(["eval", *sys.argv[1:]]))
