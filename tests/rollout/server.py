"""A small OpenAI-compatible server on 127.0.0.1 that misbehaves as it is told."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(body, **choice):
    """The reply of a good server: the prompt and the seed in its text."""
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    text = f"{asked}/{body['seed']}"
    content = {"text": text} if "prompt" in body else {"message": {"content": text}}
    usage = {"completion_tokens": 5}
    return {"choices": [{**content, "finish_reason": "stop", **choice}], "usage": usage}


class Server(ThreadingHTTPServer):
    """behave(number of the request, from 0, its body) → (status, bytes or object), or None to cut
    the connection in the middle of the body."""

    behave = staticmethod(lambda number, body: (200, answer(body)))
    models = ("tiny",)
    asked = 0
    headers_seen: list

    def handle_error(self, request, client_address):
        pass  # a client that is gone is part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._reply(200, {"data": [{"id": m} for m in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number, self.server.asked = self.server.asked, self.server.asked + 1
            self.server.seen.append((self.path, body, dict(self.headers)))
        found = self.server.behave(number, body)
        if found is None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
            self.close_connection = True
            return
        self._reply(*found)

    def _reply(self, status, content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(behave=None, models=("tiny",)):
    """The server, with `url`, `seen` (path, body, headers of each request) and `die()`."""
    server = Server(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.lock, server.seen, server.models = threading.Lock(), [], models
    if behave is not None:
        server.behave = behave
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
