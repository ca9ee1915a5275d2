"""make the environment that vLLM runs in (rollout.engine=vllm): once, 6 GB, a few minutes"""

from argparse import ArgumentParser

WHEN_STOPPED = "Stopped. Run the same command again; it starts over."


def add_arguments(parser: ArgumentParser) -> None:
    """It takes none."""


def run() -> int:
    from apo_lora.machine.vllm_environment import build, folder, set_up

    print(f"Making vLLM's environment ({build()} build) in {folder()} ...", flush=True)
    print(f"Ready: {set_up()}. Sample with rollout.engine=vllm.")
    return 0
