"""The app of most suites: a web server of the standard library that says who it is and misbehaves when told to.

VERSION is the text it answers with. HEALTH=bad answers the health check with 500, LISTEN=other takes another port,
LISTEN=none takes none, START_DELAY waits before it listens, EXIT=N ends with N at once.
"""

import http.server
import os
import socket
import sys
import time

VERSION = os.environ.get("VERSION", "none")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/slow":
            time.sleep(int(query) / 1000)
        bad = path == "/healthz" and os.environ.get("HEALTH") == "bad"
        body = f"hello {VERSION}\nfrom {socket.gethostname()} pid {os.getpid()}\n".encode()
        self.send_response(500 if bad else 200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


print(f"version {VERSION} starts", flush=True)
time.sleep(float(os.environ.get("START_DELAY", "0")))
if "EXIT" in os.environ:
    print("cannot find the settings file", file=sys.stderr, flush=True)
    sys.exit(int(os.environ["EXIT"]))
port = int(os.environ["PORT"])
if os.environ.get("LISTEN") == "none":
    time.sleep(3600)
if os.environ.get("LISTEN") == "other":
    port = 3999
print(f"version {VERSION} listens on {port}", flush=True)
Server(("0.0.0.0", port), Handler).serve_forever()
