"""A web server on the unix socket $SOCKET that greets, and finishes what it has begun when it is told to stop."""

import http.server
import os
import signal
import socket
import socketserver
import threading

GREETING = os.environ.get("GREETING", "Hello")
VERSION = open("version.txt").read().strip()
SOCKET = os.environ["SOCKET"]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

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

    def address_string(self):
        # The peer of a unix socket has no address; the balancer says who asks.
        return self.headers.get("X-Forwarded-For", "-") if hasattr(self, "headers") else "-"

    def log_message(self, format, *args):
        if self.path != "/healthz":
            print(self.address_string(), format % args, flush=True)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 128
    # Requests that are being answered may finish; idle connections do not keep the process.
    daemon_threads = True


# A crash may have left one behind, and a socket can't be bound over another.
if os.path.exists(SOCKET):
    os.unlink(SOCKET)
server = Server(SOCKET, Handler)
# shutdown() waits for the loop to end, so it can't be called from the thread that runs the loop.
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
print(f"{VERSION} listens on {SOCKET}", flush=True)
server.serve_forever(poll_interval=0.1)
print("stopped", flush=True)
