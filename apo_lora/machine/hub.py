"""The Hugging Face Hub: a client whose errors are one line each."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from apo_lora.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKENS = "https://huggingface.co/settings/tokens"


@contextmanager
def hub_api(repo: str) -> Iterator["HfApi"]:
    """A client of the Hub. Errors that it raises inside become a one-line HubError that says what to do.

    The token is huggingface_hub's: HF_TOKEN, or the one that `hf auth login` stored.
    """
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars, logging

    if not sys.stderr.isatty():
        disable_progress_bars()
    logging.set_verbosity_error()  # its warnings on the way show upload addresses, which are signed
    if not (token := get_token()):
        raise HubError(f"{repo}: no Hub token found; create one with write access at {TOKENS} and set HF_TOKEN to it")
    try:
        yield HfApi(token=token)
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: of hf_xet, and round a PUT's
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise HubError(f"{repo}: {_explanation(cause, repo.split('/')[0])}") from error


def _explanation(error: BaseException, namespace: str) -> str:
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the Hub rejected the token (401); create a new one with write access at {TOKENS}"
    if status == 403:
        return (
            f"the token has no write access (403); give it write access to {namespace} at {TOKENS}, "
            "or push to a repository of your own"
        )
    if status == 404:
        return f"the Hub has no {namespace} that this token can write to (404); check --repo"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    if isinstance(error, httpx.ConnectError):
        return f"{constants.ENDPOINT} cannot be reached; check the network and push again"
    if str(error).startswith("Invalid metadata in README.md"):
        return "the Hub rejected the model card: " + " ".join(str(error).split())
    first_line = next(iter(str(error).strip().splitlines()), "")
    # Only the status of a response: its text holds the upload address, which is signed.
    reason = f"the Hub returned status {status}" if status else f"{type(error).__name__}: {first_line}"
    return f"the push failed ({reason}); push again: large files that were uploaded are not sent again"
