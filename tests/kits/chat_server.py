"""A real HTTP server on loopback that answers chat requests as each test says."""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the server does with a request: wait, then send a status, a body and headers; or hang up.

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


class Server:
    """`behave(number, request)` gives the reply to a request; `seen` has (time, path, headers, body) of each."""

    def __init__(self, behave: Callable[[int, dict], Reply]):
        self.seen, self.active, self.most_active, lock = [], 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(outer.seen)
                    outer.seen.append(
                        (time.monotonic(), self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                    )
                    outer.active += 1
                    outer.most_active = max(outer.most_active, outer.active)
                reply = behave(number, body)
                time.sleep(reply.wait)
                with lock:
                    outer.active -= 1
                if reply.hang_up:  # a reset, not a polite end
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                self.send(reply)

            def send(self, reply):
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

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    bodies = property(lambda self: [body for *_, body in self.seen])

    def close(self):
        self.http.shutdown()
        self.http.server_close()
