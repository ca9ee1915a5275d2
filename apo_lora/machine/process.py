"""How this process behaves, decided before the heavy libraries load: quiet, and patient beside other processes."""

import logging
import os
import sys
import warnings

# Logged at import: by torchao about a torch newer than ours, by bitsandbytes about an optional kernel.
_CHATTY_LOGGERS = ("torchao", "bitsandbytes.backends.cpu.ops")


# What torchrun and accelerate give each of a run's processes. Notebooks, clusters and earlier runs leave some behind.
_LAUNCHED_WITH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def accept_every_sign() -> None:
    """Text that the screen's encoding lacks is written as escapes (\\u03c0), not an error after an hour of work."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def forget_other_launches() -> None:
    """Drops launcher variables that start no group of processes: alone they would silence this process as rank 3, or
    make it wait for others."""
    given = {name: os.environ[name] for name in _LAUNCHED_WITH if os.environ.get(name)}
    is_group = len(given) == len(_LAUNCHED_WITH) and given["WORLD_SIZE"].isdecimal() and int(given["WORLD_SIZE"]) > 1
    if is_group or not given:
        return
    if len(given) < len(_LAUNCHED_WITH):
        print(f"Ignored in the environment: {', '.join(given)}; no launcher started this process.", file=sys.stderr)
    for name in (*_LAUNCHED_WITH, "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        os.environ.pop(name, None)


def prepare_process() -> None:
    """Call before torch is imported. Hides upstream notices that a user cannot act on; errors still show."""
    forget_other_launches()
    # Threads that wait by spinning make a small model seven times slower on a machine that does something else as
    # well (measured on 2 busy cores: 95 s against 13 s for three steps).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _show_downloads()
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|trl|peft|accelerate)\b")


def _show_downloads() -> None:
    """The Hub's progress bars also where there is no terminal, as in a notebook's cell: gigabytes take minutes.

    Its switch for that is a variable from which tqdm, when it is imported, takes the place of every bar; so it is set
    after that.
    """
    os.environ.pop("TQDM_POSITION", None)
    import tqdm  # noqa: F401

    os.environ["TQDM_POSITION"] = "-1"
