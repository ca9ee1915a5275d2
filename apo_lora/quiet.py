"""Upstream notices that a user can do nothing about, switched off before their libraries load. Errors still show."""

import logging
import os
import warnings

# Said at import: torchao of a torch that is newer than ours, bitsandbytes of an optional kernel.
_CHATTY_LOGGERS = ("torchao", "bitsandbytes.backends.cpu.ops")


def quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\b")
