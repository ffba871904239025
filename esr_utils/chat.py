"""Language models that answer a conversation: a server with OpenAI's chat-completions protocol, or one on this machine.

Both have `model` and `where`, to be written beside an answer, and `reply(messages)`. A key is read from the environment
for each request, and no file, log, message or answer of this module holds it.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import tenacity
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_utils import runs, weights

Messages = list[dict[str, str]]  # of {"role": "user" or "assistant", "content": ...}
_LONGEST = 1 << 20  # bytes of one answer


class ChatError(RuntimeError):
    """A model that cannot be asked; the message says what to do."""


class _Again(Exception):
    """What may pass by itself. `wait_s`: how long the server asks to wait, if it does."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Reply:
    """What a model answered: the text, why it was cut off (empty if whole), and which model says it wrote it."""

    text: str
    cut: str
    answered_by: str


class Endpoint:
    """A model behind a server that speaks OpenAI's chat-completions protocol.

    Busy servers (429 or 5xx), timeouts and broken connections are tried again, after the time the server asks for
    (Retry-After), else after twice as long each time, plus chance.

    Args:
        base_url: what stands before `/chat/completions`, mostly ending in `/v1`.
        model: as the server calls it.
        key_variable: environment variable with the key, read anew for each request and written nowhere; unset or
            empty: no key is sent.
        timeout_s: seconds for one whole answer.
        tries: requests for one answer.
        first_wait_s: seconds before the second try, if the server does not say.
        max_wait_s: seconds before any try. A server that asks for more ends the run.

    Raises:
        ChatError: the URL or the variable's name cannot be used.
    """

    def __init__(
        self, base_url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout_s: float = 120.0,
        tries: int = 6, first_wait_s: float = 1.0, max_wait_s: float = 60.0,
    ) -> None:  # fmt: skip
        import httpx

        if not re.fullmatch(r"[A-Za-z_]\w*|", key_variable):  # not shown: it may be the key itself
            raise ChatError("key_variable must be the name of an environment variable, not a key")
        try:
            url = httpx.URL(base_url.rstrip("/") + "/chat/completions")
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ChatError(
                "base_url must be http(s)://host[:port]/path without user, password or query (they would be written "
                "down; a key goes into the variable named by key_variable)"
            )
        self.model, self.key_variable, self.where = model, key_variable, url.netloc.decode()
        self.timeout_s, self.tries, self.first_wait_s, self.max_wait_s = timeout_s, tries, first_wait_s, max_wait_s
        self._url, self._is_here = url, url.host in ("localhost", "127.0.0.1", "::1")
        self._client = httpx.Client(timeout=timeout_s, trust_env=not self._is_here)  # no proxy for what stays here

    def reply(self, messages: Messages) -> Reply:
        """Raises ChatError: refused, unreachable, or failed at every try."""
        backoff = tenacity.wait_exponential_jitter(self.first_wait_s, self.max_wait_s, jitter=self.first_wait_s)

        def wait(state: tenacity.RetryCallState) -> float:
            asked = state.outcome.exception().wait_s
            return backoff(state) if asked is None else asked

        stop = tenacity.stop_after_attempt(self.tries)
        retrying = tenacity.Retrying(stop=stop, wait=wait, retry=tenacity.retry_if_exception_type(_Again), reraise=True)
        try:
            return retrying(self._request, messages)
        except _Again as error:
            raise ChatError(f"{self.where}: {error}, after {self.tries} tries: run it again later") from None

    def _request(self, messages: Messages) -> Reply:
        """One request. No message or chained error shows a header, so none shows the key."""
        import httpx

        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        asked = {"model": self.model, "messages": messages}
        end, body = time.monotonic() + self.timeout_s, b""
        try:
            with self._client.stream("POST", self._url, headers=headers, json=asked) as response:
                for part in response.iter_bytes():
                    body += part
                    if len(body) > _LONGEST:
                        raise ChatError(f"{self.where} sends more than {_LONGEST} bytes: is it a model's server?")
                    if time.monotonic() > end:  # httpx's timeout is for each part: a trickle would pass it
                        raise _Again(f"no whole answer within {self.timeout_s:g} s")
        except httpx.TimeoutException:
            raise _Again(f"no answer within {self.timeout_s:g} s") from None
        except httpx.ConnectError as error:
            raise ChatError(f"{self.where} cannot be reached ({error}): is the address right?") from None
        except httpx.RequestError as error:
            raise _Again(f"the connection broke off ({type(error).__name__})") from None
        if response.status_code == 200:
            return _read_completion(body, key)
        said = " ".join(_clean(body.decode(errors="replace"), key).split())[:300]
        raise self._refusal(response.status_code, said, retry_after_s(response.headers.get("Retry-After")))

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):  # httpx would refuse it, and show it
            raise ChatError(f"${self.key_variable} holds what no key has in it, such as a line break")
        if key and self._url.scheme == "http" and not self._is_here:
            raise ChatError(
                f"${self.key_variable} would go to {self.where} in the clear: use https, or no key_variable"
            )
        return key

    def _refusal(self, status: int, said: str, wait_s: float | None) -> Exception:
        key = f"the key in ${self.key_variable}" if self.key_variable else "the missing key (no key_variable)"
        reason = {
            401: f"{key}; set the variable to a valid one",
            403: f"{key}, for {self.model!r}",
            404: f"model {self.model!r}, or the path: base_url mostly ends in /v1",
        }.get(status, said)  # of these three, what the server says is left out: it may hold parts of the key
        if status not in (408, 429) and status < 500:
            return ChatError(f"{self.where} refuses (status {status}): {reason}")
        if wait_s is None or wait_s <= self.max_wait_s:
            return _Again(f"status {status}: {said}", wait_s)
        return ChatError(f"{self.where} is busy (status {status}) and asks to wait {wait_s:.0f} s: run it again then")


def retry_after_s(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which is a number of seconds or an HTTP date; None if it is neither."""
    if header is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", header):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _clean(text: str, key: str) -> str:
    """Without the key, which a server may send back, and without halves of surrogate pairs, which no file takes."""
    text = text.encode(errors="replace").decode()
    return text.replace(key, "[key]") if len(key) >= 8 else text  # shorter ones are dummies, such as "EMPTY"


def _read_completion(body: bytes, key: str) -> Reply:
    try:
        data = json.loads(body)
        choice, by = data["choices"][0], data.get("model")
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        start = _clean(body[:80].decode(errors="replace"), key)
        raise _Again(f"what came is no whole chat completion: {start!r}") from None
    text = text if isinstance(text, str) else ""  # null where a model declines
    cut = "" if finish in (None, "stop") else _clean(str(finish), key)
    return Reply(_clean(text, key), cut, _clean(str(by or ""), key))


class LocalModel:
    """A causal language model of transformers', greedy: the same question gets the same answer.

    Args:
        model: hub id or folder (see `weights.find`).
        max_new_tokens: an answer that reaches this is taken as cut off.

    Raises:
        ChatError: no name.
        weights.WeightsError: not found or damaged.
    """

    where = "this machine"

    def __init__(self, model: str, max_new_tokens: int = 512) -> None:
        if not model:
            raise ChatError("model is empty: name a hub id or folder, or an endpoint and its model")
        folder = weights.find(model)
        self.model, self.max_new_tokens = model, max_new_tokens
        language_model = weights.load_pretrained(AutoModelForCausalLM, folder, dtype="auto")
        self._model = language_model.eval().to(runs.pick_device())
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise weights.WeightsError(f"{folder} holds no tokenizer: {error}") from None

    @torch.no_grad()
    def reply(self, messages: Messages) -> Reply:
        """Raises ChatError: the model's context is too short for the question."""
        with weights.quiet_transformers():
            given = self._tokens(messages).to(self._model.device)
            n = given["input_ids"].shape[1]
            room = min(self.max_new_tokens, getattr(self._model.config, "max_position_embeddings", 1 << 30) - n)
            if room < 1:
                raise ChatError(f"{self.model} has no room for a question of {n} tokens: use another model")
            pad = self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0
            out = self._model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=room, pad_token_id=pad)
        new = out[0, n:]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        return Reply(text, "length" if len(new) >= room else "", self.model)

    def _tokens(self, messages: Messages):
        options = {"return_tensors": "pt", "return_token_type_ids": False}
        if not self._tokenizer.chat_template:
            turns = [f"{message['role']}: {message['content']}" for message in messages]
            return self._tokenizer("\n\n".join([*turns, "assistant:"]), **options)
        # Models that think aloud are told not to; the templates of others ignore it.
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return self._tokenizer(text, add_special_tokens=False, **options)  # the template has them
