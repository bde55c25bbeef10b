"""A server with OpenAI's chat interface, for judges that are services."""

import http.server
import json
import threading
from typing import Any


class Server:
    """A chat server that answers what `replies` say, and remembers what it was sent."""

    def __init__(self, *replies: tuple[int, Any]) -> None:
        self.replies, self.received = list(replies), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received.append((self.path, self.headers.get("Authorization"), body))
                status, reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
