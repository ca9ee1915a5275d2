"""`python -m apo_lora` is `apo-lora`."""

import sys

from apo_lora.commands.main import main

sys.exit(main())
