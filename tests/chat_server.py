"""A small server on this machine that speaks the chat-completions protocol, and misbehaves on demand."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from esr_utils.prompts import PromptBank

BANK = PromptBank.load()
STYLE_OF = {label: style for style, label in BANK.labels.items()}


def good_answer(question: str) -> str:
    """The project's own phrases or templates, whichever are asked for."""
    if asked := re.search(r"style is called '(\w+)'", question):
        return json.dumps({"phrases": BANK.phrases[STYLE_OF[asked[1]]]})
    return json.dumps({"templates": BANK.templates[1:]})


def completion(text: str | None, finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"model": "tiny-2024", "choices": [{"message": message, "finish_reason": finish}]}).encode()


class ChatServer(ThreadingHTTPServer):
    """Answers with `good_answer`, but for as long as there are `steps`, the next of them is called instead.

    A step gets the handler and the good answer; `say`, `status`, … below make steps. `asked` has each request's body,
    `headers` its headers, `times` when it came.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.steps, self.asked, self.headers, self.times = [], [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that gave up waiting

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: ChatServer = self.server
        server.times.append(time.monotonic())
        server.headers.append(dict(self.headers))
        server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        good = good_answer(server.questions[-1])
        if self.path != "/v1/chat/completions":
            self.answer(b"no such path", 404)
        elif server.steps:
            server.steps.pop(0)(self, good)
        else:
            self.answer(completion(good))

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def say(text: str | None, finish: str = "stop"):
    return lambda handler, good: handler.answer(completion(text, finish))


def raw(body: bytes):
    return lambda handler, good: handler.answer(body)


def status(code: int, text: str = "", **headers: str):
    return lambda handler, good: handler.answer(text.encode(), code, **headers)


def slow(seconds: float):
    def step(handler, good):
        time.sleep(seconds)
        handler.answer(completion(good))

    return step


def trickle(handler, good) -> None:
    """Blank after blank, as servers do that keep a connection open while a model thinks: no single wait is long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)
    handler.wfile.write(completion(good))


def broken_off(handler, good) -> None:
    """Half of the body that was announced."""
    body = completion(good)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def endless(handler, good) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(4000):
        handler.wfile.write(b" " * 1024)
