"""The Hugging Face Hub's errors in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from apo_lora.errors import HubError

TOKENS = "https://huggingface.co/settings/tokens"


@contextmanager
def one_line_errors(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line that says what to do."""
    import httpx

    try:
        yield
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: of hf_xet, and round a PUT's
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise HubError(f"{repo}: {_words(cause, repo.split('/')[0])}") from error


def _words(error: BaseException, namespace: str) -> str:
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the Hub does not accept the token (401); make a new one with write access at {TOKENS}"
    if status == 403:
        return (
            f"the token may not write there (403); give it write access to {namespace} at {TOKENS}, "
            "or push to a name of your own"
        )
    if status == 404:
        return f"the Hub knows no {namespace} that this token can write to (404); check --repo"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be sent; unset it"
    if isinstance(error, httpx.ConnectError):
        return f"{constants.ENDPOINT} cannot be reached; check the network and push again"
    if str(error).startswith("Invalid metadata in README.md"):
        return "the Hub does not accept the card: " + " ".join(str(error).split())
    first_line = next(iter(str(error).strip().splitlines()), "")
    # Of an answer its number alone: the words around it hold the address, which is signed.
    reason = f"the Hub answered {status}" if status else f"{type(error).__name__}: {first_line}"
    return f"the push broke off ({reason}); push again: large files that arrived are not sent again"
