"""The guest's half of the VM tests: runs what the harness asks for and says how it ended.

One JSON object per line in each direction over a virtio-serial port. A request carries an `id` which its answer
repeats, so that several commands run at a time:

    {"id": 7, "do": "run", "script": "...", "timeout_s": 60}        -> {"id": 7, "code": 0, "stdout": "...", "stderr": "..."}
    {"id": 8, "do": "write", "path": "...", "mode": 420, "data": b64}  -> {"id": 8}
    {"id": 9, "do": "become", "hostname": ..., "machine_id": ..., "clock_ns": ..., "seed": b64}  -> {"id": 9}

`code` is negative for a signal and null past the deadline; "error" in place of all that says why a request was not
carried out. At its start the agent says {"hello": boot id}, which tells the harness that the machine has (re)booted.

Bounds: LINE_MAX per request, OUTPUT_MAX of each stream, AT_ONCE commands at a time (more of them wait in the port).
"""

import base64
import fcntl
import json
import os
import signal
import struct
import subprocess
import threading
import time

PORT = "/dev/virtio-ports/epagent.agent"
LINE_MAX = 8 << 20
OUTPUT_MAX = 1 << 20
AT_ONCE = 16

# include/uapi/linux/random.h
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


def main():
    while not os.path.exists(PORT):  # until udev has named it; systemd does not wait for that
        time.sleep(0.1)
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    writing = threading.Lock()
    slots = threading.Semaphore(AT_ONCE)

    def say(message):
        line = json.dumps(message).encode() + b"\n"
        with writing:
            while line:
                line = line[os.write(port, line):]

    def serve(request):
        try:
            answer = DO[request["do"]](request)
        except Exception as error:  # whatever it is, the harness has to hear of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        finally:
            slots.release()
        say({"id": request["id"], **answer})

    say({"hello": boot_id()})
    for line in lines(port):
        try:
            request = json.loads(line)
        except ValueError:
            continue  # the rest of a line whose beginning an earlier boot had read
        slots.acquire()
        threading.Thread(target=serve, args=(request,), daemon=True).start()


def lines(port):
    kept = b""
    while True:
        got = os.read(port, 1 << 16)
        if not got:
            time.sleep(0.05)  # nobody holds the host's end
            continue
        kept += got
        *whole, kept = kept.split(b"\n")
        yield from whole
        if len(kept) > LINE_MAX:
            kept = b""


def run(request):
    # Memory files, not pipes: what a script leaves in the background may keep them open without anybody waiting.
    outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
    child = subprocess.Popen(
        ["/bin/bash", "-c", request["script"]],
        stdin=subprocess.DEVNULL,
        stdout=outputs[0],
        stderr=outputs[1],
        start_new_session=True,
        cwd="/root",
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
             "LANG": "C.UTF-8", "TERM": "dumb"},
    )
    try:
        code = child.wait(request["timeout_s"])
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        code = None
    stdout, stderr = (os.pread(fd, OUTPUT_MAX, 0).decode(errors="replace") for fd in outputs)
    for fd in outputs:
        os.close(fd)
    return {"code": code, "stdout": stdout, "stderr": stderr}


def write(request):
    os.makedirs(os.path.dirname(request["path"]), exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if request.get("append") else os.O_TRUNC)
    with open(os.open(request["path"], flags, request["mode"]), "wb") as file:
        os.fchmod(file.fileno(), request["mode"])
        file.write(base64.b64decode(request["data"]))
    return {}


def become(request):
    """Makes a fork another machine than its siblings: name, id, the true time, randomness of its own."""
    seed = base64.b64decode(request["seed"])
    with open("/dev/urandom", "wb", buffering=0) as urandom:
        fcntl.ioctl(urandom, RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(urandom, RNDRESEEDCRNG)
    time.clock_settime_ns(time.CLOCK_REALTIME, request["clock_ns"])
    with open("/etc/machine-id") as file:
        before = file.read().strip()
    # The journal that is being written has the old id in its path, and is to be found by the new one.
    os.rename(f"/var/log/journal/{before}", f"/var/log/journal/{request['machine_id']}")
    for path, text in (("/etc/hostname", request["hostname"]), ("/etc/machine-id", request["machine_id"]),
                       ("/proc/sys/kernel/hostname", request["hostname"])):
        with open(path, "w") as file:
            file.write(text + "\n")
    return {}


def boot_id():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


DO = {"run": run, "write": write, "become": become}

if __name__ == "__main__":
    main()
