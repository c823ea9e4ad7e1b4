"""A client of an OpenAI-compatible HTTP endpoint, with retries: `POST BASE/chat/completions`.

The key comes from an environment variable and is used only in the header of requests. `replies.py` reads the bodies.
"""

from __future__ import annotations

import email.utils
import ipaddress
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from hift_ds.evaluation.mt_bench.replies import Reply, Unread, bound, read
from hift_ds.launch.errors import UserError

Message = dict[str, str]  # role and content

LONGEST_REPLY = 1 << 24  # bytes
LONGEST_WAIT = 60.0  # seconds between attempts, unless the endpoint asks for more
LONGEST_OBEYED = 600.0  # seconds that an endpoint may ask for; a longer wait ends the request
AGAIN = frozenset({408, 409, 425, 429})  # retry after these statuses, and after 500 to 599


class Unanswered(Exception):
    """All attempts of a request failed; it may succeed later."""


class _Again(Exception):
    """An attempt failed in a way that another attempt may fix."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the endpoint asks for


def key_from_environment(base_url: str, variable: str) -> str | None:
    """Return the key for an endpoint; None if the endpoint is on this machine and no key is set.

    Raises:
        UserError: there is no key, or it is not valid in a header. The message does not contain the key.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        if is_loopback(base_url):
            return None
        raise UserError(f"no key for {base_url}: set the environment variable {variable} (--key-env names another)")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} is not a key: it has spaces or unprintable characters")
    return key


def is_loopback(base_url: str) -> bool:
    """Whether a URL's host is this machine."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_base_url(base_url: str) -> str:
    """Return the URL without a trailing slash.

    Raises:
        UserError: it is not http or https, or contains a password, a query or a fragment.
    """
    expected = "expected something like https://api.openai.com/v1 or http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(base_url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        raise UserError(f"the judge's URL is malformed: {expected}") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(  # without the URL, which may contain a secret
            "the judge's URL contains a user name, a password, a query or a fragment; remove it, and set the key in "
            "an environment variable"
        )
    if wrong:
        raise UserError(f"the judge's URL {base_url!r}: {expected}")
    return base_url.rstrip("/")


class _Bearer(requests.auth.AuthBase):
    """Passed as `auth`, so that requests does not use a password from .netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


@dataclass(eq=False)
class Endpoint:
    """An endpoint and its limits. Safe for use in several threads.

    Args:
        tries: the maximum number of attempts for one reply.
        timeout: seconds to wait for one reply.
        backoff: mean seconds before the second attempt; doubles before each further one.
        extra: additional fields in the body of each request; None removes a field.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    tries: int = 6
    timeout: float = 120.0
    backoff: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base_url = checked_base_url(self.base_url)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0  # time.monotonic(): all threads obey a wait that the endpoint asks for
        self._threads = threading.local()

    def ask(
        self,
        messages: Sequence[Message],
        temperature: float,
        max_tokens: int,
        *,
        paid: Callable[[Unread], None] = lambda unread: None,
    ) -> Reply:
        """Return the reply to a conversation.

        Args:
            paid: called before the next attempt, or before this method raises, with each attempt that may cost tokens
                and gave no reply. It may call `stop`.

        Raises:
            Unanswered: every attempt failed (status 429 or 5xx, timeout, a body that is no chat completion), or `stop`
                was called.
            UserError: the endpoint refuses the request, e.g. an unknown model or a wrong key.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": temperature, "max_tokens": max_tokens}
        body.update(self.extra)
        body = {name: value for name, value in body.items() if value is not None}
        reasons = []
        for number in range(1, self.tries + 1):
            self._wait_until(self._not_before)
            if self._stopped.is_set():
                break
            try:
                return self._send(body, max_tokens, paid)
            except _Again as problem:
                reasons.append(str(problem))
                if problem.wait is not None and problem.wait > LONGEST_OBEYED:
                    break
                if problem.wait is not None:
                    with self._lock:
                        self._not_before = max(self._not_before, time.monotonic() + problem.wait)
                if number < self.tries:
                    # Jitter, so that threads do not retry at the same time; never earlier than the endpoint asks for.
                    pause = min(self.backoff * 2 ** (number - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5)
                    self._wait_until(time.monotonic() + pause)
        raise Unanswered(
            f"{len(reasons)} attempt{'s' * (len(reasons) > 1)}, the last: {reasons[-1]}"
            if reasons
            else "stopped before the first attempt"
        )

    def stop(self) -> None:
        """Send no more requests; waiting ones give up."""
        self._stopped.set()

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0 and not self._stopped.wait(left):
            pass

    def _session(self) -> requests.Session:
        if not hasattr(self._threads, "session"):
            self._threads.session = requests.Session()
            # Requests to this machine must not go through a proxy.
            self._threads.session.trust_env = not is_loopback(self.base_url)
        session: requests.Session = self._threads.session
        return session

    def _send(self, body: Mapping[str, Any], max_tokens: int, paid: Callable[[Unread], None]) -> Reply:
        deadline = time.monotonic() + self.timeout
        most = bound(body, max_tokens)
        content = bytearray()
        status = 0
        try:
            with self._session().post(
                f"{self.base_url}/chat/completions",
                json=body,
                auth=_Bearer(self.key),
                timeout=self.timeout,
                allow_redirects=False,  # the key is only for this host
                stream=True,
            ) as response:
                status = response.status_code
                # Read in small chunks, because the time limit is for the whole reply.
                for part in response.iter_content(64):
                    content += part
                    if time.monotonic() > deadline:
                        raise _Again(f"no whole reply in {self.timeout:g} s")
                    if len(content) > LONGEST_REPLY:
                        raise _Again(f"a reply of more than {LONGEST_REPLY} bytes")
        except _Again as problem:
            if _is_success(status):
                paid(Unread(str(problem), *most, estimated=True))
            raise
        except requests.RequestException as error:
            late = isinstance(error, requests.Timeout)
            # The error's text may contain a proxy's password.
            reason = f"no reply in {self.timeout:g} s" if late else f"the connection failed ({type(error).__name__})"
            # An endpoint that was too slow has had the request, and may charge for it.
            if _is_success(status) or isinstance(error, requests.ReadTimeout):
                paid(Unread(reason, *most, estimated=True))
            raise _Again(reason) from None
        found = read(bytes(content), most, self.redacted)
        if not _is_success(status):
            if not found.estimated:  # an error that reports tokens
                paid(Unread(f"HTTP {status}", found.prompt_tokens, found.completion_tokens))
            self._refused(response, bytes(content))
        if isinstance(found, Unread):
            paid(found)
            raise _Again(found.reason)
        return found

    def _refused(self, response: requests.Response, content: bytes) -> None:
        status = response.status_code
        excerpt = self.redacted(" ".join(content.decode("utf-8", "replace").split()))[:300]
        message = f"HTTP {status} from {self.base_url}: {excerpt or 'no text'}"
        if status in AGAIN or status >= 500:
            raise _Again(message, seconds_to_wait(response.headers.get("Retry-After")))
        if status == 400:  # may concern only this question: too long for the judge, or a content filter
            raise Unanswered(message)
        raise UserError(message)

    def redacted(self, text: str) -> str:
        """Return a text from the endpoint without the key, which the endpoint may send back."""
        # A short key is a placeholder ("EMPTY"), which may occur in a judge's text.
        return text.replace(self.key, "[key]") if self.key and len(self.key) >= 8 else text


def seconds_to_wait(header: str | None) -> float | None:
    """Parse `Retry-After` (seconds or a date, RFC 9110 section 10.2.3); None if missing or invalid."""
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _is_success(status: int) -> bool:
    return 200 <= status < 300
