"""`python -m apo_lora.cli`, as scripts of earlier versions call it, is `apo-lora`."""

import sys

from apo_lora.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
