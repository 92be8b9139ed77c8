"""Counts its visitors in a SQLite database on a volume."""

import http.server
import os
import sqlite3
import threading

database = sqlite3.connect("/data/visits.db", check_same_thread=False)
# What was answered survives a power cut. Without the log, SQLite commits by removing a file, and waits for nobody to write
# that down (https://sqlite.org/pragma.html#pragma_synchronous).
database.execute("PRAGMA journal_mode = WAL")
database.execute("PRAGMA synchronous = FULL")
database.execute("CREATE TABLE IF NOT EXISTS visits (path TEXT PRIMARY KEY, count INTEGER NOT NULL)")
one_at_a_time = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        if self.path == "/healthz":
            self.answer("ok\n")
            return
        with one_at_a_time, database:
            row = database.execute(
                "INSERT INTO visits VALUES (?, 1) ON CONFLICT (path) DO UPDATE SET count = count + 1 RETURNING count",
                (self.path,),
            ).fetchone()
        self.answer(f"visit {row[0]} of {self.path}\n")

    def answer(self, text):
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler)
server.serve_forever()
