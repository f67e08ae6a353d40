"""A judge's server that does what a test tells it to."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUALITY = {"good": 0.9, "fair": 0.5, "bad": 0.1}


class FakeServer(ThreadingHTTPServer):
    """Answers by `behave(request body, number of the call)` -> (status, headers, content) or content."""

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.bodies, self.active, self.most_active = behave, [], 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(200, {}, {"data": [{"id": "judge"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            number = len(self.server.bodies)
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        found = self.server.behave(body, number)
        with self.server.lock:
            self.server.active -= 1
        status, headers, content = found if isinstance(found, tuple) else (200, {}, found)
        choices = [] if content is None else [{"message": {"content": content}}]
        self.reply(status, headers, {"choices": choices})

    def reply(self, status, headers, value):
        data = json.dumps(value).encode()
        with contextlib.suppress(ConnectionError):  # the client has given up
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)


def shown(body):
    """[(id, text)] of the answers in a question, as they stand."""
    text = body["messages"][1]["content"]
    return [
        (int(i), answer) for i, answer in re.findall(r'<answer id="(\d+)">\n(.*?)\n</answer>', text, re.S)
    ]


def by_quality(body, _=0):
    entries = [{"id": i, "score": QUALITY.get(text, 0.3)} for i, text in shown(body)]
    return json.dumps({"scores": entries})
