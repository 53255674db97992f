"""What watching costs the robots: the time of steps with nobody at the page, and with five, in turns.

    python3 serve/tests/watchers.py target/release/openvla-serve [THREADS]

Starts a server with the built-in example. One robot asks as fast as it is answered, in blocks of 200 steps, of which
every other one is watched. Prints the median and the 95th percentile of the model's step as the server has it, and of
the whole request; then the difference of each pair of neighboring blocks, as a median with a 95 % interval (bootstrap).
"""

import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time

BLOCKS, STEPS, WATCHERS = 40, 200, 5
BOUNDARY = "x" * 30


def body(picture):
    part = lambda name, value, more="": (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode()
        + value
        + b"\r\n"
    )
    return (
        part("image", picture, '; filename="x.png"')
        + part("instruction", b"put eggplant into pot")
        + f"--{BOUNDARY}--\r\n".encode()
    )


class Watcher(threading.Thread):
    """Reads events until it is told to stop."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        self.connection.request("GET", "/page/events")
        self.events, self.bytes, self.going = self.connection.getresponse(), 0, True
        assert self.events.status == 200
        self.start()

    def run(self):
        while self.going and (chunk := self.events.read1(1 << 16)):
            self.bytes += len(chunk)
        self.connection.close()


def block(connection, payload):
    """Milliseconds of the model's step, and of the request, for each of so many steps."""
    headers = {
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
        "X-Client-Id": "arm",
    }
    inside, whole = [], []
    for _ in range(STEPS):
        begun = time.perf_counter()
        connection.request("POST", "/v1/act", payload, headers)
        answer = json.loads(connection.getresponse().read())
        whole.append(1e3 * (time.perf_counter() - begun))
        inside.append(answer["timing_ms"]["step"])
    return inside, whole


def main():
    program, threads = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "1"
    server = subprocess.Popen(
        [program, "--port", "0", "--log-json", "--threads", threads], stderr=subprocess.PIPE, text=True
    )
    try:
        port = None
        for line in server.stderr:
            port = port or (m := re.search(r"127\.0\.0\.1:(\d+)", line)) and int(m[1])
            if '"ready"' in line:
                break
        payload = body(open("example/tabletop.png", "rb").read())
        connection = http.client.HTTPConnection("127.0.0.1", port)
        block(connection, payload)  # warms up
        times = {0: [], WATCHERS: []}
        for i in range(BLOCKS):
            n = (0, WATCHERS)[(i + i // 2) % 2]  # 0 5 5 0 0 5 5 0: no drift counts for one of them
            watchers = [Watcher(port) for _ in range(n)]
            time.sleep(0.3)
            times[n].append(block(connection, payload))
            for watcher in watchers:
                watcher.going = False
            for watcher in watchers:
                watcher.join(3)
                assert watcher.bytes > 1000, "it saw something"
        for what, which in (("step", 0), ("request", 1)):
            for n, blocks in times.items():
                every = [ms for pair in blocks for ms in pair[which]]
                p95 = statistics.quantiles(every, n=20)[-1]
                print(f"{what:8} {n} watch: median {statistics.median(every):.3f} ms, p95 {p95:.3f} ms")
            medians = [[statistics.median(pair[which]) for pair in times[n]] for n in (0, WATCHERS)]
            off = [watched - alone for alone, watched in zip(*medians)]
            resampled = sorted(
                statistics.median(random.choices(off, k=len(off))) for _ in range(2000)
            )
            print(
                f"{what:8} difference: {statistics.median(off):+.3f} ms "
                f"({resampled[50]:+.3f} … {resampled[-51]:+.3f})"
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
