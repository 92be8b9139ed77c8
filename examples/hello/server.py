"""A web server that greets, says which version it is, and finishes what it has begun when it is told to stop."""

import http.server
import os
import signal
import socket
import threading

GREETING = os.environ.get("GREETING", "Hello")
VERSION = open("version.txt").read().strip()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        if self.path == "/healthz":
            body = b"ok\n"
        else:
            body = f"{GREETING}, {VERSION}, from {socket.gethostname()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        if self.path != "/healthz":
            print(self.address_string(), format % args, flush=True)


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
    # Requests that are being answered may finish; idle connections do not keep the process.
    daemon_threads = True


server = Server(("0.0.0.0", int(os.environ["PORT"])), Handler)
# shutdown() waits for the loop to end, so it can't be called from the thread that runs the loop.
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
print(f"{VERSION} listens on port {server.server_port}", flush=True)
server.serve_forever(poll_interval=0.1)
print("stopped", flush=True)
