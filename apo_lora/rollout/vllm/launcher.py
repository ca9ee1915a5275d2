"""Run by the Python of vLLM's own environment: its API server, which ends with the trainer and answers only to its key.

Imports nothing of apo-lora. The arguments are those of vLLM's server.
"""

import hmac
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

PARENT, FOLDER = "APO_LORA_PARENT", "APO_LORA_FOLDER"
"""Environment variables with the process that the server belongs to, and with the folder that both use meanwhile."""


def follow(parent: int, folder: str) -> None:
    """Ends the server and its workers as soon as the parent is gone, also by SIGKILL: this process then has another."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)  # adapters and log: nobody is left who would
    os.killpg(os.getpgrp(), signal.SIGKILL)


async def only_with_key(request: Any, call_next: Any) -> Any:
    """vLLM asks for its key only below /v1, but loads adapters at other addresses too."""
    from starlette.responses import Response

    expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
    given = request.headers.get("authorization", "").encode()
    if request.url.path != "/health" and not hmac.compare_digest(given, expected):
        return Response(status_code=401)
    return await call_next(request)


if __name__ == "__main__":
    threading.Thread(target=follow, args=(int(os.environ[PARENT]), os.environ[FOLDER]), daemon=True).start()
    sys.argv += ["--middleware", "__main__.only_with_key"]
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
