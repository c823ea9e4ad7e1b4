"""A chat model behind an OpenAI-compatible HTTP endpoint, asked with patience: `POST BASE/chat/completions`.

The key comes from an environment variable and goes into the request's header, nowhere else.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from hift_ds.launch.errors import UserError

Message = dict[str, str]  # role and content

LONGEST_REPLY = 1 << 24  # bytes
LONGEST_WAIT = 60.0  # seconds between two tries, where the endpoint does not ask for more
LONGEST_OBEYED = 600.0  # seconds an endpoint may ask for; a longer wait ends the request
AGAIN = frozenset({408, 409, 425, 429})  # and 500 to 599: the statuses that another try may change


@dataclass(frozen=True)
class Reply:
    """A chat model's reply. Token counts are None where the endpoint does not report them."""

    text: str
    ended: str  # why it ended: "stop", "length", or another word of the endpoint's
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Unanswered(Exception):
    """A request that got no usable reply within its tries; asking again later may help."""


class _Again(Exception):
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the endpoint asks for


def key_from_environment(base_url: str, variable: str) -> str | None:
    """The key for an endpoint; None for one on this machine that wants none.

    Raises:
        UserError: no key, or one that cannot be in a header. The message does not hold it.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        if is_loopback(base_url):
            return None
        raise UserError(f"no key for {base_url}: set the environment variable {variable} (--key-env names another)")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the environment variable {variable} holds no key: it has spaces or unprintable characters")
    return key


def is_loopback(base_url: str) -> bool:
    """Whether a URL's host is this machine."""
    host = urllib.parse.urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_base_url(base_url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        UserError: not http or https, or it holds a password, a query or a fragment.
    """
    expected = "expected something like https://api.openai.com/v1 or http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(base_url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        raise UserError(f"the judge's URL is malformed: {expected}") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(  # not shown: it may hold a secret
            "the judge's URL holds a user name, a password, a query or a fragment; give it without, and the key in "
            "the environment"
        )
    if wrong:
        raise UserError(f"the judge's URL {base_url!r}: {expected}")
    return base_url.rstrip("/")


class _Bearer(requests.auth.AuthBase):
    """Given as `auth`, so that requests does not put a .netrc's password in its place."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


@dataclass(eq=False)
class Endpoint:
    """An endpoint and its limits. Safe for any number of threads.

    Args:
        tries: requests sent at most for one question.
        timeout: seconds for one reply.
        backoff: seconds before the second try, on average twice as long before each further one.
        extra: entries for the body of each request; None removes one.
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
        self._not_before = 0.0  # of time.monotonic: a wait the endpoint asked for holds for all threads
        self._threads = threading.local()

    def ask(self, messages: Sequence[Message], temperature: float, max_tokens: int) -> Reply:
        """The reply to a conversation.

        Raises:
            Unanswered: 429, 5xx, time-outs, broken JSON or the like in every try, or `stop` was called meanwhile.
            UserError: the endpoint refuses requests like this one (no such model, wrong key).
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
                return self._send(body)
            except _Again as problem:
                reasons.append(str(problem))
                if problem.wait is not None and problem.wait > LONGEST_OBEYED:
                    break
                if problem.wait is not None:
                    with self._lock:
                        self._not_before = max(self._not_before, time.monotonic() + problem.wait)
                if number < self.tries:
                    # Jitter, so that many threads do not come back at once; never earlier than was asked for.
                    pause = min(self.backoff * 2 ** (number - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5)
                    self._wait_until(time.monotonic() + pause)
        raise Unanswered(f"{len(reasons)} tries, the last: {reasons[-1]}" if reasons else "stopped before it was asked")

    def stop(self) -> None:
        """Send nothing more; who waits for another try gives up."""
        self._stopped.set()

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0 and not self._stopped.wait(left):
            pass

    def _session(self) -> requests.Session:
        if not hasattr(self._threads, "session"):
            self._threads.session = requests.Session()
            # A proxy of the environment must not see what stays on this machine.
            self._threads.session.trust_env = not is_loopback(self.base_url)
        session: requests.Session = self._threads.session
        return session

    def _send(self, body: Mapping[str, Any]) -> Reply:
        deadline = time.monotonic() + self.timeout
        content = bytearray()
        try:
            with self._session().post(
                f"{self.base_url}/chat/completions",
                json=body,
                auth=_Bearer(self.key),
                timeout=self.timeout,
                allow_redirects=False,  # the key is for this host
                stream=True,
            ) as response:
                # In small parts: each waits for its last byte, and the limit is on the whole reply.
                for part in response.iter_content(64):
                    content += part
                    if time.monotonic() > deadline:
                        raise _Again(f"no whole reply in {self.timeout:g} s")
                    if len(content) > LONGEST_REPLY:
                        raise _Again(f"a reply of more than {LONGEST_REPLY} bytes")
        except requests.Timeout:
            raise _Again(f"no reply in {self.timeout:g} s") from None
        except requests.RequestException as error:
            # Its text may hold a proxy's password.
            raise _Again(f"the connection failed ({type(error).__name__})") from None
        if response.status_code != 200:
            self._refused(response, bytes(content))
        return self._parse(bytes(content))

    def _refused(self, response: requests.Response, content: bytes) -> None:
        status = response.status_code
        said = self.redacted(" ".join(content.decode("utf-8", "replace").split()))[:300]
        message = f"HTTP {status} from {self.base_url}: {said or 'no text'}"
        if status in AGAIN or status >= 500:
            raise _Again(message, seconds_to_wait(response.headers.get("Retry-After")))
        if status == 400:  # may be this one question's fault: longer than the judge's context, a content filter
            raise Unanswered(message)
        raise UserError(message)

    def _parse(self, content: bytes) -> Reply:
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            ended = choice.get("finish_reason")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise _Again("HTTP 200 with a body that is not a chat completion") from None
        if text is None:  # a refusal is a field of its own
            text = choice["message"].get("refusal") or ""
        if not isinstance(text, str):
            raise _Again("HTTP 200 with a message that is not text")
        usage = reply.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        return Reply(
            self.redacted(text),
            ended if isinstance(ended, str) else "stop",
            *(_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens")),
        )

    def redacted(self, text: str) -> str:
        """What comes from outside, without the key: an endpoint may send back what it was sent."""
        # A short one is no secret but a word for a server that wants any ("EMPTY"), and may be in a judge's text.
        return text.replace(self.key, "[key]") if self.key and len(self.key) >= 8 else text


def seconds_to_wait(header: str | None) -> float | None:
    """What `Retry-After` asks for (seconds or a date, RFC 9110 section 10.2.3); None where it says nothing."""
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
