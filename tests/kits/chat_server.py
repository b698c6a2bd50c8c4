"""A real HTTP server on loopback that answers chat requests as each test says, and a model behind it."""

import contextlib
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_vpo.errors import ModelError
from trl_vpo.models.requests import Request, Sampling
from trl_vpo.models.server import ServerModel

KEY = "sk-very-secret-0123456789"
SAMPLING = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.8)


@dataclass
class Reply:
    """A server's reply to a request: wait, then send a status, a body and headers; or hang up.

    `pauses`: seconds before each of the spaces in front of the body.
    """

    body: object = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    wait: float = 0.0
    pauses: tuple[float, ...] = ()
    hang_up: bool = False


def said(text, finish="stop", **message) -> Reply:
    return Reply({"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]})


def refused(status: int, message="no", **headers) -> Reply:
    return Reply({"error": {"message": message}}, status, headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        outer, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        with outer.lock:
            number = len(outer.seen)
            headers = {key.lower(): value for key, value in self.headers.items()}
            outer.seen.append((time.monotonic(), self.path, headers, body))
            outer.active += 1
            outer.most_active = max(outer.most_active, outer.active)
        reply = outer.behave(number, body)
        time.sleep(reply.wait)
        with outer.lock:
            outer.active -= 1
        if reply.hang_up:  # a reset, not a polite end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for key, value in {"content-type": "application/json", **reply.headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("content-length", str(len(reply.pauses) + len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client may have given up waiting
            for pause in reply.pauses:
                time.sleep(pause)
                self.wfile.write(b" ")
            self.wfile.write(data)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """`behave(number, request)` gives the reply to a request; `seen` has (time, path, headers, body) of each."""

    daemon_threads = True

    def __init__(self, behave: Callable[[int, dict], Reply]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.lock = behave, threading.Lock()
        self.seen, self.active, self.most_active = [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    bodies = property(lambda self: [body for *_, body in self.seen])
    gaps = property(lambda self: [after[0] - before[0] for before, after in itertools.pairwise(self.seen)])

    def handle_error(self, *args):
        pass

    def close(self):
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def chat_servers():
    """Give a function that starts a server: replies in turn, the last one for ever; or as `behave` says."""
    servers = []

    def start(*replies: Reply, behave=None) -> Server:
        servers.append(Server(behave or (lambda number, _: replies[min(number, len(replies) - 1)])))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def model_of(server: Server, **settings) -> ServerModel:
    return ServerModel(server.url, "tiny", **{"max_retries": 2, "concurrency": 4, **settings})


def stopped(model: ServerModel, requests: list[Request]) -> str:
    """Return the message of the error that ends the run; the whole chain of errors keeps the key to itself."""
    with pytest.raises(ModelError) as caught:
        model.answer(requests, SAMPLING)
    assert KEY not in str(caught.getrepr(chain=True, style="short"))
    return str(caught.value)
