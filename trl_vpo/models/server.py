"""A model behind any OpenAI-compatible server: requests out, answers in, and what to do when it goes wrong.

What goes wrong is told apart by whose fault it is: one request's (a `Failure` of that request), the server's for a
while (asked again, with growing pauses), or the run's (`GenerateError`; the same command continues it later).
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

from trl_vpo.errors import GenerateError
from trl_vpo.models.payload import chat_messages, every_frame
from trl_vpo.models.requests import AnsweringModel, Request, Sampling
from trl_vpo.runs.secrets import scrub
from trl_vpo.text.responses import Failure, unusable, without_reasoning

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between attempts, where the server does not name a pause
LONGEST_RETRY_AFTER = 600.0  # seconds that a server's Retry-After is waited for
SEED_BITS = 31  # some servers keep a seed in a signed 32-bit integer
SAID = 300  # characters of a server's message that are shown
LARGEST_ANSWER = 1 << 24  # bytes
LONGEST_ANSWER = 10  # times `timeout`, from the first byte of an answer to its last
RUN_STATUS = {  # what a status says about every request, and what to do
    401: "it does not accept the API key in {key}: set that variable to a valid key",
    402: "the account behind the API key in {key} cannot pay: top it up",
    403: "the API key in {key} may not use this model: ask for access, or name another model",
    404: "it has no such model or no such address: check the model's name, and that the URL ends as in /v1",
    405: "this is no address of a chat model: check that the URL ends as in /v1",
}
NO_VIDEO = " A server that takes no video may take its frames: set server_media: frames."
_Sent = tuple[list[dict], int, Sampling, dict]  # messages as they are sent, seed, sampling, further fields


class RequestBudget:
    """How many requests may be sent, over all threads and all models that share it. `limit` None: any number."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Count one request.

        Raises:
            GenerateError: none is left.
        """
        with self._lock:
            if self.limit is not None and self.used >= self.limit:
                raise GenerateError(
                    f"the request budget is used up: max_requests is {self.limit}, repeated attempts included. The "
                    "same command continues the run, with a budget of its own."
                )
            self.used += 1


class _AttemptFailed(Exception):
    """An attempt worth repeating.

    Attributes:
        fault: "server" (down or too busy), "request" (perhaps this one's) or "answer" (nobody can read it).
        retry_after: seconds that the server asks to wait for.
    """

    def __init__(self, reason: str, fault: str, retry_after: float | None = None):
        super().__init__(reason)
        self.fault = fault
        self.retry_after = retry_after


class _Stopped(Exception):
    """This request is not sent, because another one ended the run."""


class ServerModel(AnsweringModel):
    """A model behind a server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, OpenAI and others.

    Temperature, top-p, the longest answer and a seed (the last 31 bits of the request's) go with every request. A
    server may add sampling defaults of its own: vLLM takes those of the model's generation_config.json unless it was
    started with `--generation-config vllm`.

    Args:
        url: base URL, as http://HOST:PORT/v1.
        model: the model's name on the server.
        api_key_env: environment variable with the API key; servers without keys need none.
        timeout: seconds without a byte from the server that end an attempt; an answer that keeps coming is waited for,
            up to ten times as long.
        max_retries: attempts after the first.
        max_requests: most requests, every attempt counted; or `budget`, which several models may share.
        concurrency: requests in flight.
        media: "video" sends a clip as one mp4 and asks for all of its frames, which vLLM (from 0.18) gives and others
            may not; "frames" sends images.
        max_pixels: larger images and frames are scaled down to this many pixels.

    Raises:
        GenerateError: the URL is none, or the `openai` package is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        max_retries: int = 5,
        max_requests: int | None = None,
        budget: RequestBudget | None = None,
        concurrency: int = 8,
        media: str = "video",
        max_pixels: int | None = None,
    ):
        self.url, self.model = scrub(_shown(url)), model
        self._key_env, self._key = api_key_env, os.environ.get(api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise GenerateError(
                f"the API key in {api_key_env} holds a line break or another character that no key has: set it again."
            )
        self._timeout, self._max_retries = timeout, max_retries
        self._budget = budget or RequestBudget(max_requests)
        self._concurrency = concurrency
        self._media, self._max_pixels = media, max_pixels
        try:
            import openai
        except ImportError as error:
            raise GenerateError("a model behind a server needs openai: pip install trl-vpo[judge]") from error
        # The client's own attempts would not be counted.
        self._client = openai.OpenAI(
            base_url=url,
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=0,
            http_client=_careful_client(timeout),
        )
        self._lock = threading.Lock()
        self._replied = 0  # requests that the server replied to, be it with a refusal
        self._refused = 0  # requests that it refused
        self._answered: _Sent | None = None  # the last request that it answered
        self._given_up = 0  # requests that were given up since the last reply

    def record(self) -> dict[str, str | None]:
        return {"model": self.model, "adapter": None, "revision": None, "server": self.url}

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[str | Failure]:
        """See `AnsweringModel`. Before an error is raised, the requests in flight come to their end.

        Raises:
            GenerateError: the server is down, refuses the key or the model or every request, or the budget is used up.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(max_workers=self._concurrency) as pool:
            futures = [pool.submit(self._ask, request, sampling, stop) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also after Ctrl-C
                stop.set()
                pool.shutdown(cancel_futures=True)
        errors = [f.exception() for f in futures if not f.cancelled() and f.exception() is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
        results = [future.result() for future in futures]
        if results and self._refused > 1 and self._answered is None:  # the first one alone may be at fault itself
            raise GenerateError(
                f"{self.url} refused all of the first {self._refused} requests to {self.model!r}. {results[0].reason}"
            )
        return results

    # --- one request -------------------------------------------------------------------------------------------------

    def _ask(self, request: Request, sampling: Sampling, stop: threading.Event) -> str | Failure:
        """What comes of one request. An error stops the others here already: the caller may see it too late."""
        try:
            return self._ask_until_answered(request, sampling, stop)
        except BaseException:
            stop.set()
            raise

    def _ask_until_answered(self, request: Request, sampling: Sampling, stop: threading.Event) -> str | Failure:
        if stop.is_set():
            raise _Stopped
        clips = request.media.videos if self._media == "video" else ()
        messages = chat_messages(request, media=self._media, max_pixels=self._max_pixels)
        result = self._send((messages, request.seed, sampling, every_frame(clips) if clips else {}), stop)
        return self._give_up(result, stop) if isinstance(result, _AttemptFailed) else result

    def _send(self, sent: _Sent, stop: threading.Event) -> str | Failure | _AttemptFailed:
        """The server's reply, or how the last attempt failed."""
        for attempt in range(self._max_retries + 1):
            if stop.is_set():
                raise _Stopped
            self._budget.take()
            try:
                result = self._attempt(*sent)
            except _AttemptFailed as failed:
                problem = failed
            else:
                with self._lock:
                    self._replied, self._given_up = self._replied + 1, 0
                return result
            if attempt < self._max_retries:
                pause = self._pause(attempt, problem)
                logger.info(f"{self.url}: {problem}; asking again in {pause:.1f} s")
                stop.wait(pause)
        return problem

    def _attempt(self, messages: list[dict], seed: int, sampling: Sampling, further: dict) -> str | Failure:
        import openai

        try:
            reply = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed % 2**SEED_BITS,
                extra_body=further or None,
            )
        except openai.APITimeoutError:
            raise _AttemptFailed(f"no answer within {self._timeout:g} s", "request") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, _AttemptFailed):
                raise cause from None
            raise _AttemptFailed(self._clean(f"no connection ({type(cause).__name__}: {cause})"), "server") from None
        except openai.APIStatusError as error:
            refused = error.response
        else:
            result = self._read(reply.content, sampling)
            with self._lock:
                self._answered = messages, seed, sampling, further
            return result
        return self._refusal(
            refused, NO_VIDEO if further else ""
        )  # outside of the handler: the client's error may show the key

    def _refusal(self, response: Any, hint: str) -> Failure:
        """What an HTTP error means: the end of the run, another attempt, or the end of this request."""
        status, said = response.status_code, _said(self._clean(response.text))
        if 300 <= status < 400:
            where = self._clean(urljoin(self.url, response.headers.get("location", "")).partition("?")[0])
            raise GenerateError(f"{self.url} redirects to {where}: give the address that answers itself.")
        if status in RUN_STATUS:
            remedy = RUN_STATUS[status].format(key=self._key_env)
            raise GenerateError(f"{self.url} refuses requests to {self.model!r} ({status}): {remedy}. It says: {said}")
        if status == 429 or status in (408, 409, 425) or status >= 500:
            fault = "server" if status == 429 else "request"
            hint = hint if status >= 500 else ""
            raise _AttemptFailed(f"status {status}: {said}{hint}", fault, _retry_after(response.headers))
        with self._lock:
            self._refused += 1
        return Failure(f"the server refused the request ({status}): {said}{hint}")

    def _read(self, content: bytes, sampling: Sampling) -> str | Failure:
        """The text of a chat completion."""
        try:
            choice = json.loads(content)["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"] == "text")
            text = without_reasoning(text or "")
            text.encode()
        except UnicodeEncodeError:
            return Failure("the answer holds half a surrogate pair, which is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            start = self._clean(content.decode(errors="replace"))[:SAID]
            raise _AttemptFailed(f"malformed answer: {start!r}", "answer") from None
        if finish == "length":
            return Failure(f"cut off after {sampling.max_new_tokens} tokens")
        if finish == "content_filter":
            return Failure("stopped by the server's content filter")
        return unusable(text) or text

    # --- when it fails -----------------------------------------------------------------------------------------------

    def _pause(self, attempt: int, problem: _AttemptFailed) -> float:
        """Seconds before the next attempt: what the server asks for, or doubling from half a second."""
        pause = min(LONGEST_PAUSE, 0.5 * 2**attempt)
        if problem.retry_after is None:
            return pause * random.uniform(0.5, 1)
        if problem.retry_after > LONGEST_RETRY_AFTER:
            raise GenerateError(
                f"{self.url} asks to wait {problem.retry_after:.0f} s ({problem}). The same command continues the run "
                "then."
            )
        return problem.retry_after + pause * random.uniform(0, 0.5)

    def _give_up(self, problem: _AttemptFailed, stop: threading.Event) -> Failure:
        """A Failure where it is taken for this request's fault: the server works, and this is the first one since the
        last reply, or it still replies to another one.
        """
        with self._lock:
            self._given_up += 1
            alone, works = self._given_up == 1, self._replied > 0 or problem.fault == "answer"
        reason = f"{problem} ({self._max_retries + 1} attempts)"
        if problem.fault != "server" and works and (alone or self._still_replies(stop)):
            return Failure(reason)
        raise GenerateError(
            f"{self.url} gives no answer from {self.model!r}: {reason}. Check that the server runs and that "
            "the URL is right; the same command continues the run."
        )

    def _still_replies(self, stop: threading.Event) -> bool:
        """Whether the server replies to the last request that it answered, asked again."""
        answered = self._answered
        return answered is not None and not isinstance(self._send(answered, stop), _AttemptFailed)

    def _clean(self, text: str) -> str:
        """Some servers repeat the key that they refuse."""
        return scrub(text.replace(self._key, "<API key>") if self._key else text, self._key)


def _careful_client(timeout: float) -> Any:
    """Return an HTTP client that follows no redirect, which would take the key along, and reads no endless answer."""
    import openai

    class Client(openai.DefaultHttpxClient):
        def send(self, request: Any, *, stream: bool = False, **kwargs: Any) -> Any:
            response = super().send(request, stream=True, **kwargs)
            try:
                content = _bounded(response, LONGEST_ANSWER * timeout)
            finally:
                response.close()
            return type(response)(response.status_code, headers=response.headers, content=content, request=request)

    return Client(follow_redirects=False, headers={"accept-encoding": "identity"})


def _bounded(response: Any, seconds: float) -> bytes:
    """The body of a response that is read as it comes."""
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":  # it may be small and inflate to gigabytes
        raise _AttemptFailed(f"an answer in the encoding {coding[:SAID]!r}, which was not asked for", "answer")
    content, end = bytearray(), time.monotonic() + seconds
    for part in response.iter_bytes():
        content += part
        if len(content) > LARGEST_ANSWER:
            raise _AttemptFailed(f"an answer of more than {LARGEST_ANSWER} bytes", "answer")
        if time.monotonic() > end:
            raise _AttemptFailed(f"an answer that takes longer than {seconds:g} s", "request")
    return bytes(content)


def _shown(url: str) -> str:
    """The URL as messages and records show it: without user, password and query."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = scrub(url.partition("?")[0].rpartition("@")[2])  # without a scheme, there may be a key before the host
        raise GenerateError(f"{shown!r} is no address of a server: give it as http://HOST:PORT/v1.")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _said(body: str) -> str:
    """A server's message out of the body of its error."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = found if isinstance(found, str) else json.dumps(found)
    return text.encode(errors="replace").decode().strip()[:SAID] or "nothing"


def _retry_after(headers: Any) -> float | None:
    """Seconds, from a Retry-After header that gives seconds or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
