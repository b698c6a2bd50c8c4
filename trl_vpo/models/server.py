"""A model behind any OpenAI-compatible server: requests out, answers in, and what to do when it goes wrong.

What goes wrong is told apart by whose fault it is: one request's (a `Failure` of that request), the server's for a
while (asked again, with growing pauses), or the run's (`ModelError`; the same command continues it later).
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

from trl_vpo.errors import ModelError
from trl_vpo.models.payload import chat_messages, every_frame
from trl_vpo.models.requests import AnsweringModel, Request, Sampling
from trl_vpo.runs.secrets import scrub
from trl_vpo.text.responses import Failure, unusable, without_reasoning

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds between attempts, where the server does not name a pause
LONGEST_RETRY_AFTER = 600.0  # seconds that a server's Retry-After is waited for
LARGEST_ANSWER = 1 << 24  # bytes
LONGEST_ANSWER = 10  # times `timeout`, from the first byte of an answer to its last
SEED_BITS = 31  # some servers keep a seed in a signed 32-bit integer
QUOTED = 300  # characters of a server's message that are shown
RUN_STATUS = {  # what a status says about every request, and what to do
    401: "it does not accept the API key in {key}: set that variable to a valid key",
    402: "the account behind the API key in {key} cannot pay: top it up",
    403: "the API key in {key} may not use this model: ask for access, or name another model",
    404: "it has no such model or no such address: check the model's name, and that the URL ends as in /v1",
    405: "this is not the address of a chat model: check that the URL ends as in /v1",
}
# Finish reasons of whole answers; eos_token is TGI's, end_turn Anthropic's.
WHOLE = {"", "none", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "function_call"}
NO_VIDEO = " A server that takes no video may take its frames: set server_media: frames."


class RequestBudget:
    """A number of requests that may be sent, by all threads and models that share it. `limit` None: any number."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        """Count one request. Raises `ModelError` if none is left."""
        with self._lock:
            if self.limit is not None and self.used >= self.limit:
                raise ModelError(
                    f"the request budget is used up: max_requests is {self.limit}, repeated attempts included. The "
                    "same command continues the run, with a budget of its own."
                )
            self.used += 1


class _AttemptFailed(Exception):
    """An attempt worth repeating."""

    def __init__(self, reason: str, *, busy: bool = False, retry_after: float | None = None):
        super().__init__(reason)
        self.busy = busy  # the server is down or too busy, whatever it is asked; else the request may be at fault
        self.retry_after = retry_after  # seconds that the server asks to wait for


class _Stopped(Exception):
    """This request is not sent, because another one ended the run."""


class ServerModel(AnsweringModel):
    """A model behind a server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, OpenAI and others.

    Temperature, top-p, the longest answer and a seed (the last 31 bits of the request's) go with every request. A
    server may add sampling defaults of its own: vLLM takes those of the model's generation_config.json unless it was
    started with `--generation-config vllm`. Raises ModelError for a URL or key that cannot be used, or without the
    `openai` package.
    """

    def __init__(
        self,
        url: str,  # as http://HOST:PORT/v1
        model: str,  # its name on the server
        *,
        api_key_env: str = "OPENAI_API_KEY",  # environment variable with the key; servers without keys need none
        timeout: float = 120.0,  # seconds without a byte from the server that end an attempt
        max_retries: int = 5,  # attempts after the first
        budget: RequestBudget | None = None,  # every attempt counts; several models may share it
        concurrency: int = 8,  # requests in flight
        media: str = "video",  # one mp4, all of whose frames vLLM (from 0.18) shows and others may not; or "frames"
        max_pixels: int | None = None,  # of images and frames; larger ones are scaled down
    ):
        try:
            import openai
        except ImportError as error:
            raise ModelError("a model behind a server needs openai: pip install trl-vpo[judge]") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            shown = scrub(url.partition("?")[0].rpartition("@")[2])  # there may be a key before the host
            raise ModelError(f"{shown!r} is not the address of a server: give it as http://HOST:PORT/v1.")
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        self.url, self.model = scrub(shown), model  # as messages and records show it: without user and password
        self._key_env, self._key = api_key_env, os.environ.get(api_key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise ModelError(
                f"the API key in {api_key_env} holds a line break or another character that no key has: set it again."
            )
        self._timeout, self._max_retries, self._concurrency = timeout, max_retries, concurrency
        self._budget, self._media, self._max_pixels = budget or RequestBudget(), media, max_pixels
        self._client = openai.OpenAI(
            base_url=url,
            api_key=self._key or "none",
            timeout=timeout,
            max_retries=0,  # the client's own attempts would not be counted
            http_client=_bounded_client(LONGEST_ANSWER * timeout),
        )
        self._lock = threading.Lock()
        self._refused = 0  # requests that the server refused
        self._answered: dict[str, Any] | None = None  # the last request that it answered

    def record(self) -> dict[str, str | None]:
        return {"model": self.model, "adapter": None, "revision": None, "server": self.url}

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[str | Failure]:
        """See `AnsweringModel`. Before an error is raised, the requests in flight come to their end.

        Raises ModelError where the server is down, refuses the key or the model or every request, or the budget is
        used up.
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
            raise ModelError(
                f"{self.url} refused all of the first {self._refused} requests to {self.model!r}. {results[0].reason}"
            )
        return results

    # --- one request -------------------------------------------------------------------------------------------------

    def _ask(self, request: Request, sampling: Sampling, stop: threading.Event) -> str | Failure:
        """Send a request until it is answered or given up. An error stops the others here already, before `answer`."""
        try:
            clips = request.media.videos if self._media == "video" else ()
            payload = {
                "messages": chat_messages(request, media=self._media, max_pixels=self._max_pixels),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": request.seed % 2**SEED_BITS,
                "extra_body": every_frame(clips) if clips else None,
            }
            result = self._send(payload, stop)
            return self._give_up(result, stop) if isinstance(result, _AttemptFailed) else result
        except BaseException:
            stop.set()
            raise

    def _send(self, payload: dict[str, Any], stop: threading.Event) -> str | Failure | _AttemptFailed:
        """Return the server's reply, or the failure of the last attempt."""
        for attempt in range(self._max_retries + 1):
            if stop.is_set():
                raise _Stopped
            self._budget.take()
            try:
                return self._attempt(payload)
            except _AttemptFailed as failed:
                problem = failed
            if attempt < self._max_retries:
                pause = self._pause(attempt, problem)
                logger.info(f"{self.url}: {problem}; asking again in {pause:.1f} s")
                stop.wait(pause)
        return problem

    def _attempt(self, payload: dict[str, Any]) -> str | Failure:
        import openai

        try:
            reply = self._client.chat.completions.with_raw_response.create(model=self.model, **payload)
        except openai.APITimeoutError:
            raise _AttemptFailed(f"no answer within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, _AttemptFailed):
                raise cause from None
            reason = self._clean(f"no connection ({type(cause).__name__}: {cause})")
            raise _AttemptFailed(reason, busy=True) from None
        except openai.APIStatusError as error:
            refusal = error.response
        else:
            result = self._read(reply.content, payload["max_tokens"])
            self._answered = payload
            return result
        # Outside of the handler: the client's error may show the key.
        return self._refusal(refusal, NO_VIDEO if payload["extra_body"] else "")

    def _refusal(self, response: Any, hint: str) -> Failure:
        """Turn an HTTP error into the end of the run, of this attempt, or of this request."""
        status, message = response.status_code, _message(self._clean(response.text))
        if 300 <= status < 400:
            target = self._clean(urljoin(self.url, response.headers.get("location", "")).partition("?")[0])
            raise ModelError(f"{self.url} redirects to {target}: give the address that answers itself.")
        if status in RUN_STATUS:
            remedy = RUN_STATUS[status].format(key=self._key_env)
            raise ModelError(f"{self.url} refuses requests to {self.model!r} ({status}): {remedy}. It says: {message}")
        if status in (408, 409, 425, 429) or status >= 500:
            reason = f"status {status}: {message}{hint if status >= 500 else ''}"
            raise _AttemptFailed(reason, busy=status == 429, retry_after=_retry_after(response.headers))
        with self._lock:
            self._refused += 1
        return Failure(f"the server refused the request ({status}): {message}{hint}")

    def _read(self, content: bytes, max_tokens: int) -> str | Failure:
        """Return the text of a chat completion."""
        try:
            choice = json.loads(content)["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"] == "text")
            text = without_reasoning(text or "")
            text.encode()
        except UnicodeEncodeError:
            return Failure("the answer holds half a surrogate pair, which is not valid text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            start = self._clean(content.decode(errors="replace"))[:QUOTED]
            raise _AttemptFailed(f"malformed answer: {start!r}") from None
        if finish == "length":
            return Failure(f"cut off after {max_tokens} tokens")
        if finish == "content_filter":
            return Failure("stopped by the server's content filter")
        if str(finish).lower() not in WHOLE:  # abort, error, insufficient_system_resource
            return Failure(f"the server broke the answer off: finish_reason {self._clean(repr(finish))[:QUOTED]}")
        return unusable(text) or text

    # --- when it fails -----------------------------------------------------------------------------------------------

    def _pause(self, attempt: int, problem: _AttemptFailed) -> float:
        """Return seconds before the next attempt: what the server asks for, or doubling from half a second."""
        pause = min(LONGEST_PAUSE, 0.5 * 2**attempt)
        if problem.retry_after is None:
            return pause * random.uniform(0.5, 1)
        if problem.retry_after > LONGEST_RETRY_AFTER:
            raise ModelError(
                f"{self.url} asks to wait {problem.retry_after:.0f} s ({problem}). The same command continues the run "
                "then."
            )
        return problem.retry_after + pause * random.uniform(0, 0.5)

    def _give_up(self, problem: _AttemptFailed, stop: threading.Event) -> Failure:
        """Return a Failure if the request itself is at fault: the server still replies to one that it answered."""
        reason = f"{problem} ({self._max_retries + 1} attempts)"
        known = None if problem.busy else self._answered
        if known is not None and not isinstance(self._send(known, stop), _AttemptFailed):
            return Failure(reason)
        raise ModelError(
            f"{self.url} gives no answer from {self.model!r}: {reason}. Check that the server runs and that "
            "the URL is right; the same command continues the run."
        )

    def _clean(self, text: str) -> str:
        """Take secrets out of a server's text: some repeat the key that they refuse."""
        return scrub(text.replace(self._key, "<API key>") if self._key else text, self._key)


def _bounded_client(seconds: float) -> Any:
    """Return an HTTP client that reads no endless answer, and follows no redirect, which would take the key along."""
    import openai

    class Client(openai.DefaultHttpxClient):
        def send(self, request: Any, *, stream: bool = False, **kwargs: Any) -> Any:
            response, content = super().send(request, stream=True, **kwargs), bytearray()
            end = time.monotonic() + seconds
            try:
                coding = response.headers.get("content-encoding", "identity")
                if coding != "identity":  # it may be small and inflate to gigabytes
                    raise _AttemptFailed(f"an answer in the encoding {coding[:QUOTED]!r}, which was not asked for")
                for part in response.iter_bytes():
                    content += part
                    if len(content) > LARGEST_ANSWER:
                        raise _AttemptFailed(f"an answer of more than {LARGEST_ANSWER} bytes")
                    if time.monotonic() > end:
                        raise _AttemptFailed(f"an answer that takes longer than {seconds:g} s")
            finally:
                response.close()
            headers = response.headers
            return type(response)(response.status_code, headers=headers, content=bytes(content), request=request)

    return Client(follow_redirects=False, headers={"accept-encoding": "identity"})


def _message(body: str) -> str:
    """Return a server's message out of the body of its error."""
    try:
        content = json.loads(body)
    except ValueError:
        content = body
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    text = content if isinstance(content, str) else json.dumps(content)
    return text.encode(errors="replace").decode().strip()[:QUOTED] or "nothing"


def _retry_after(headers: Any) -> float | None:
    """Return the seconds of a Retry-After header, which gives seconds or a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
