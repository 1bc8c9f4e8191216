"""What an error of the Hub or of the network means: whether to try again, and what to do."""

import json
import re

FIRST_WAIT = 1.0  # seconds; doubled after every attempt
# 409 and 412: somebody else changed the repository at the same time.
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
OFFLINE = "offline mode is on (HF_HUB_OFFLINE); unset it to push."


def http_error() -> type[Exception]:
    """Return the base of all errors of the HTTP library that this client uses (httpx, httpx2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def cause_of(error: BaseException) -> BaseException:
    """Return the HTTP error behind an error: the client wraps those of an upload in another."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, http_error()):
        cause = cause.__cause__
    return error if cause is None else cause


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer behind an error; None where there was no answer."""
    response = getattr(cause_of(error), "response", None)
    return None if response is None else int(response.status_code)


def is_passing(error: BaseException) -> bool:
    """Return whether to try again: the client reads some answers as JSON before their status."""
    status = status_of(error)
    if status is not None:
        return status in TRANSIENT
    return isinstance(cause_of(error), (http_error(), json.JSONDecodeError))


def wait_after(error: BaseException, attempt: int) -> float:
    """Return how long to wait, in seconds: as long as is asked, else twice as long each time."""
    asked = asked_wait(error)
    return FIRST_WAIT * 2 ** (attempt - 1) if asked is None else asked


def asked_wait(error: BaseException) -> float | None:
    """Return the seconds in the answer's Retry-After or, as the public Hub says it, RateLimit."""
    response = getattr(cause_of(error), "response", None)
    if response is None:
        return None
    said = re.fullmatch(r"\s*(\d{1,9})\s*", response.headers.get("Retry-After", ""), re.ASCII)
    if said is None and response.status_code == 429:
        said = re.search(r";\s*t=(\d{1,9})", response.headers.get("RateLimit", ""), re.ASCII)
    return None if said is None else float(said[1])


def sentence_of(error: Exception, repo_id: str, endpoint: str) -> str:
    """Say what happened and what to do, in one sentence."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status, cause = status_of(error), cause_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if status == 401:
        return (
            f"{endpoint} does not accept the token (401): it is mistyped or expired; run "
            "`hf auth login` again or set HF_TOKEN."
        )
    if status == 403:
        return (
            f"the token has no permission to write to {repo_id} (403): it needs the role 'write', "
            "and the user must be allowed to write there; or take another USER/NAME."
        )
    if status == 404:
        return f"{repo_id} is not there, or the token may not see it (404)."
    if status in (409, 412):
        return f"{repo_id} was being changed by somebody else ({status}); try again."
    if status == 429:
        wait = asked_wait(error)
        later = "later" if wait is None else f"in {wait:.0f} s"
        return f"{endpoint} limits the rate of requests (429); try again {later}."
    said = " ".join(str(getattr(cause, "server_message", None) or cause).split())[:300]
    if status is not None:
        return f"{endpoint} answers {status}: {said}"
    if isinstance(cause, http_error()):
        return f"{endpoint} cannot be reached ({type(cause).__name__}: {said})."
    return f"{type(cause).__name__}: {said}"
