"""What is said to a vLLM server over HTTP: JSON there and back, every failure one ServerFault. No torch."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead
from typing import Any

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of these machines


class ServerFault(Exception):
    """A server that did not do what it was asked; the message says what happened, in a few words."""


@dataclass(frozen=True)
class Endpoint:
    url: str
    key: str = field(repr=False)
    seconds: float
    """Longest wait for one answer."""

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a GET, or to a POST of `body`; text where it is not JSON. Raises ServerFault."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with _DIRECT.open(request, timeout=self.seconds) as response:
                text = response.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            raise ServerFault(f"it answered {error.code} to {path}{_message(error)}") from None
        except TimeoutError:
            raise ServerFault(f"no answer to {path} within {self.seconds:g} seconds (server_seconds)") from None
        except OSError as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise ServerFault(f"no connection within {self.seconds:g} seconds") from None
            raise ServerFault(f"the connection was lost ({getattr(error, 'reason', error)})") from None
        except IncompleteRead as error:
            raise ServerFault(f"the connection was lost in the middle of an answer ({error})") from None
        except (HTTPException, ValueError) as error:  # an answer that is not HTTP
            raise ServerFault(f"its answer to {path} is broken ({error})") from None
        try:
            return json.loads(text)
        except ValueError:
            return text


def _message(error: urllib.error.HTTPError) -> str:
    try:
        said = json.load(error)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f": {' '.join(str(said).split())[:200]}"
