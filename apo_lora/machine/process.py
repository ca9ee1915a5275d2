"""How this process behaves, decided before the heavy libraries load: quiet, and patient beside other processes."""

import logging
import os
import warnings

# Logged at import: by torchao about a torch newer than ours, by bitsandbytes about an optional kernel.
_CHATTY_LOGGERS = ("torchao", "bitsandbytes.backends.cpu.ops")


def prepare_process() -> None:
    """Call before torch is imported. Hides upstream notices that a user cannot act on; errors still show."""
    # Threads that wait by spinning make a small model seven times slower on a machine that does something else as
    # well (measured on 2 busy cores: 95 s against 13 s for three steps).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\b")
