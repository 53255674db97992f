"""A fleet of servers on Ray Serve: `serve run openvla_gguf.fleet:app model=openvla-7b.gguf replicas=2`.

Every replica is one `openvla-serve`, which requests are handed to unchanged: deadlines, limits, drafts and the rule that a
robot's newest observation wins are its own, and every client of it is one of the fleet's. A robot stays at its replica.

    Ray's HTTP proxy: `Gate`                  a replica: `Robots`
    X-Client-Id names the session,      ->    `Handover`  ->  127.0.0.1: `openvla-serve`
    no answer after X-Deadline-Ms             whose life and health are watched here
"""

import asyncio
import base64
import collections
import json
import logging
import os
import shlex
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, FilePath
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.middleware import Middleware

__all__ = ["Settings", "app", "gate"]

log = logging.getLogger("ray.serve")

PROGRAM = Path(__file__).with_name("openvla-serve")

ROUTER = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    # A full replica's server says so itself; another one would not know what the robot sent before.
    request_router_kwargs={"num_fallback_replicas": 0},
)
"""Keeps a robot at its replica, and moves few robots when there are more replicas, or fewer."""

GATE = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "openvla_gguf.fleet:gate")
"""Ray's proxies call this for their middleware, if the variable is set where Ray was started."""

MOST_REQUESTS = 512
"""That a replica is handed at a time. More than wait in its server, so that its rules, not Ray's, say who waits."""


class Settings(BaseModel):
    """What `serve run` is told as `name=value`, and a configuration file under `args`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Optional[str] = None
    """A GGUF file, at this path on every machine; else the built-in example, which knows the simulated table alone."""
    unnorm_key: Optional[str] = None
    """The data set of requests that name none."""
    options: str = ""
    """Further options of `openvla-serve`, such as `--draft auto --clamp`."""
    token_file: Optional[FilePath] = None
    """Holds the token that clients must show."""
    replicas: int = Field(1, ge=1)
    """At least so many."""
    max_replicas: Optional[int] = Field(None, ge=1)
    """At most so many: their number then follows the length of the queues."""
    waiting: float = Field(2.0, gt=0)
    """Requests of a replica, computed or waiting, above which there shall be more replicas."""
    cpus: int = Field(1, ge=1)
    """Cores of a replica."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of a replica."""

    def arguments(self) -> List[str]:
        """Those of `openvla-serve`."""
        arguments = ["--log-json", "--port", "0", "--threads", str(self.cpus), "--max-connections", str(2 * MOST_REQUESTS)]
        named = [("--model", self.model), ("--unnorm-key", self.unnorm_key), ("--token-file", self.token_file)]
        for name, value in named:
            if value is not None:
                arguments += [name, str(value)]
        return arguments + shlex.split(self.options)


def app(settings: Settings) -> serve.Application:
    """The application. Where `serve run` starts Ray itself, its proxies get the `gate`."""
    os.environ.setdefault(*GATE)
    most = settings.max_replicas
    if most is None:
        scale: Dict[str, Any] = {"num_replicas": settings.replicas}
    elif most < settings.replicas:
        raise ValueError(f"max_replicas is {most}, less than the {settings.replicas} of replicas")
    else:
        bounds = {"min_replicas": settings.replicas, "max_replicas": most}
        scale = {"autoscaling_config": AutoscalingConfig(**bounds, target_ongoing_requests=settings.waiting)}
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":  # which routes by itself, and takes no router
        scale["request_router_config"] = ROUTER
    resources = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
    return Robots.options(ray_actor_options=resources, **scale).bind(settings.arguments(), settings.token_file)


# --- in Ray's proxies


def gate() -> List[Middleware]:
    """What Ray's proxies put before every request."""
    return [Middleware(Gate)]


class Gate:
    """Names the session by which a robot keeps its replica, and answers where a replica no longer can or may.

    Ray goes by one header alone, `x-session-id`; our clients name themselves in `X-Client-Id`. A robot that moves to
    another replica may be answered there before the one that it had is done with an older picture: no replica knows of
    both, so the older motion ends here.
    """

    def __init__(self, app: Any):
        self.app = app
        self.robots: Dict[bytes, _Robot] = {}

    async def __call__(self, scope: Dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        added = {}
        if b"x-client-id" in headers:
            added[b"x-session-id"] = headers[b"x-client-id"]
        patience = _milliseconds(headers.get(b"x-deadline-ms", b""))
        if patience and scope["type"] == "http":
            # Ray then gives up on the request, which is taken out of its replica's queue.
            added[b"x-request-timeout-seconds"] = b"%.3f" % (patience + 0.005)
        added = [(name, value) for name, value in added.items() if name not in headers]
        scope = {**scope, "headers": [*scope["headers"], *added]}
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        name = headers.get(b"x-session-id", headers.get(b"x-client-id"))
        robot = None
        if name is not None and scope["path"].endswith("/act"):
            robot = self.robots.setdefault(name, _Robot())
            robot.waiting += 1
        answer = _Answer(send, time.monotonic() + patience if patience else None, robot)
        try:
            await self.app(scope, receive, answer)
        finally:
            if robot is not None:
                robot.waiting -= 1
                if not robot.waiting:
                    del self.robots[name]
        if not answer.begun:
            message = "the replica that had this request is gone"
            await _error(send, 503, "not_ready", message, "send the robot's next observation", retry=True)


class _Robot:
    """The observations of a robot that wait for an answer, counted as they came."""

    def __init__(self):
        self.waiting = 0
        self.asked = 0
        self.answered = 0


class _Answer:
    """Passes an answer on if it is in time, and no motion for a newer picture of this robot was."""

    def __init__(self, send: Any, deadline: Optional[float], robot: Optional[_Robot]):
        self.send = send
        self.deadline = deadline
        self.begun = False
        self.refused = False
        self.robot = robot
        if robot is not None:
            robot.asked += 1
            self.number = robot.asked

    async def __call__(self, message: Dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            is_late = self.deadline is not None and time.monotonic() >= self.deadline
            if is_late and message["status"] != 504:
                self.refused = True
                await _error(self.send, 504, "deadline_exceeded", "the motion would have been too late")
            elif message["status"] == 200 and self.robot is not None:
                self.refused = self.number < self.robot.answered
                self.robot.answered = max(self.number, self.robot.answered)
                if self.refused:
                    await _error(self.send, 409, "superseded", "a newer observation was answered by another replica")
        if not self.refused:
            await self.send(message)


def _milliseconds(text: bytes) -> Optional[float]:
    """A deadline in seconds. What is no deadline is refused by the replica's server, which knows the rules."""
    return int(text) / 1000 if text.isdigit() and 0 < len(text) < 9 else None


async def _error(send: Any, status: int, code: str, message: str, hint: Optional[str] = None, retry: bool = False) -> None:
    """Sends an error in the form of `openvla-serve`."""
    body = {"code": code, "message": message}
    if hint:
        body["hint"] = hint
    headers = [(b"retry-after", b"1")] if retry else []
    await _respond(send, status, [(b"content-type", b"application/json"), *headers], json.dumps(body).encode())


async def _respond(send: Any, status: int, headers: List[Tuple[bytes, bytes]], body: bytes) -> None:
    names = {name.lower() for name, _ in headers}
    if b"content-length" not in names:
        headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --- in a replica


@serve.deployment(
    max_ongoing_requests=MOST_REQUESTS,
    health_check_period_s=30,
    health_check_timeout_s=60,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=60,
)
@serve.ingress()
class Robots:
    """A replica: one `openvla-serve` and the way to it."""

    async def __init__(self, arguments: List[str], token_file: Optional[Path]):
        self.server = _Server(arguments)
        await asyncio.to_thread(self.server.wait_until_ready)
        context = serve.get_replica_context()
        self.handover = Handover(self.server, context, token_file and token_file.read_text().strip())

    def __serve_build_asgi_app__(self) -> "Handover":
        return self.handover

    async def check_health(self) -> None:
        await self.handover.check_health()

    async def metrics(self) -> Tuple[str, str]:
        return await self.handover.metrics()


class _Server:
    """A running `openvla-serve`. If it ends unasked, so does this process, and Ray starts another."""

    def __init__(self, arguments: List[str]):
        if not PROGRAM.exists():
            raise RuntimeError(f"{PROGRAM} is not there: this openvla-gguf was built without its programs; install the wheel")
        child = [sys.executable, "-I", Path(__file__).with_name("_with_parent.py"), str(os.getpid()), PROGRAM]
        self.process = subprocess.Popen([*child, *arguments], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        self.address: Optional[str] = None
        self.is_ready = False
        self.is_stopping = False
        self.changed = threading.Event()
        self.last = collections.deque(maxlen=5)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        for line in self.process.stderr:
            try:
                entry = json.loads(line)
                level, message = entry.pop("level"), entry.pop("message")
            except (ValueError, KeyError):
                level, message, entry = "ERROR", line.strip(), {}
            entry.pop("timestamp", None)
            rest = " ".join(f"{name}={value}" for name, value in entry.items())
            log.log(getattr(logging, level, logging.DEBUG), "openvla-serve: %s %s", message, rest)
            self.last.append(f"{message} {rest}".strip())
            if message == "listening":
                self.address = entry["address"]
            if message == "ready":
                self.is_ready = True
                self.changed.set()
        code = self.process.wait()
        was_ready, self.is_ready = self.is_ready, False
        self.changed.set()
        if was_ready and not self.is_stopping:
            log.error("openvla-serve ended with code %s; this replica ends, too", code)
            os._exit(1)

    def wait_until_ready(self) -> None:
        """Returns after the model's first step.

        Raises RuntimeError with its last words if it ends before.
        """
        self.changed.wait()
        if not self.is_ready:
            raise RuntimeError(f"openvla-serve ended with code {self.process.wait()}: " + " | ".join(self.last))

    async def stop(self) -> None:
        """Has it finish what it accepted."""
        self.is_stopping = True
        self.process.terminate()
        await asyncio.to_thread(self.process.wait)


# Of one connection, and not of what it carries (RFC 9110, 7.6.1).
HOP_BY_HOP = {
    b"connection", b"expect", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
LARGE = 1 << 20
NOT_PASSED_BACK = HOP_BY_HOP | {b"date"}  # which Ray's proxy adds


class Handover:
    """The ASGI application of a replica: hands everything to its server.

    Every request takes a connection of its own, for to the server a robot without a name is its connection.
    """

    def __init__(self, server: _Server, context: Any, token: Optional[str]):
        self.server = server
        self.context = context
        self.token = {"Authorization": f"Bearer {token}"} if token else {}
        self.moved = False
        self.warned = False
        self.session: Optional[aiohttp.ClientSession] = None

    async def __call__(self, scope: Dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["type"] == "websocket":
            await self.connect(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] == "/metrics":
            await self.all_metrics(scope, send)
        else:
            await self.request(scope, receive, send)

    async def live(self, receive: Any, send: Any) -> None:
        await receive()
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self.session = aiohttp.ClientSession(
            f"http://{self.server.address}", connector=connector, timeout=timeout, auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )  # fmt: skip
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.server.stop()
        await self.session.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def request(self, scope: Dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        length = int(headers.get(b"content-length", 0)) if b"transfer-encoding" not in headers else None
        body = None if length == 0 else _body(receive)
        try:
            async with self.session.request(
                scope["method"], _target(scope), headers=self.headers(scope), data=body, allow_redirects=False,
                # A body that is too large is refused before it is sent; else the refusal could be lost with the connection.
                expect100=length is None or length > LARGE,
                skip_auto_headers=["User-Agent", "Accept", "Accept-Encoding", "Content-Type"],
            ) as answer:  # fmt: skip
                body = await answer.read()
        except aiohttp.ClientError as error:
            message = f"the replica's server did not answer: {error}"
            return await _error(send, 503, "not_ready", message, "send the robot's next observation", retry=True)
        # `--compat-errors` answers errors with status 200.
        self.moved |= answer.status == 200 and scope["method"] == "POST" and body != b'"error"'
        headers = [(name, value) for name, value in answer.raw_headers if name.lower() not in NOT_PASSED_BACK]
        await _respond(send, answer.status, headers, body)

    async def connect(self, scope: Dict[str, Any], receive: Any, send: Any) -> None:
        """Joins a websocket to one of the server, until one of them closes."""
        await receive()
        headers = [(name, value) for name, value in self.headers(scope) if not name.lower().startswith("sec-websocket-")]
        try:
            async with self.session.ws_connect(_target(scope), headers=headers, max_msg_size=0) as server:
                await send({"type": "websocket.accept"})
                ends = [asyncio.create_task(_to_server(receive, server)), asyncio.create_task(_to_robot(server, send))]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.cancel()
                await asyncio.gather(*ends, return_exceptions=True)
        except aiohttp.ClientError as error:
            log.warning("a websocket was refused: %s", error)
            await send({"type": "websocket.close", "code": 1011})

    def headers(self, scope: Dict[str, Any]) -> List[Tuple[str, str]]:
        headers = scope["headers"]
        names = {name for name, _ in headers}
        if b"x-client-id" in names and b"x-session-id" not in names and not self.warned:
            self.warned = True
            log.warning("robots change their replica at every request: start Ray with %s=%s", *GATE)
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name not in HOP_BY_HOP]

    async def all_metrics(self, scope: Dict[str, Any], send: Any) -> None:
        """Those of all replicas, as if one server had them, for whom this one shows its own."""
        async with self.session.get("/metrics", headers=self.headers(scope)) as answer:
            if answer.status != 200:
                return await _respond(send, answer.status, [(b"content-type", b"application/json")], await answer.read())
        handle = serve.get_deployment_handle(self.context.deployment, self.context.app_name)
        body = merge(await handle.broadcast("metrics").results_async())
        kind = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
        await _respond(send, 200, [(b"content-type", kind)], body.encode())

    async def metrics(self) -> Tuple[str, str]:
        """The replica's name, and its server's metrics."""
        async with self.session.get("/metrics", headers=self.token) as answer:
            return self.context.replica_id.unique_id, await answer.text()

    async def check_health(self) -> None:
        """Runs a step, if no robot was given a motion since the last time.

        Raises RuntimeError if it fails.
        """
        moved, self.moved = self.moved, False
        if moved:
            return
        async with self.session.get("/v1/model", headers=self.token) as answer:
            body, status = _observation(await answer.json()), answer.status
        if status == 200:
            headers = {**self.token, "X-Client-Id": "health-check"}
            async with self.session.post("/v1/act", json=body, headers=headers) as answer:
                body, status = await answer.json(), answer.status
        # Robots that are refused because many wait do not make a replica ill; its server knows whether it is stuck. Nor does
        # an emergency stop, which a replica in its place would not have.
        if status == 503 and body["code"] in ("queue_full", "stopped"):
            async with self.session.get("/readyz", headers=self.token) as answer:
                body, status = await answer.text(), answer.status
        if status != 200:
            raise RuntimeError(f"a step of this replica failed with status {status}: {body}")


def _target(scope: Dict[str, Any]) -> str:
    path = scope.get("raw_path") or scope["path"].encode()
    query = scope.get("query_string", b"")
    return (path + b"?" + query if query else path).decode("latin-1")


async def _body(receive: Any) -> Any:
    """A request's body as it comes."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise aiohttp.ClientError("the robot hung up")
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body"):
            return


async def _to_server(receive: Any, server: aiohttp.ClientWebSocketResponse) -> None:
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("bytes") is not None:
            await server.send_bytes(message["bytes"])
        else:
            await server.send_str(message["text"])


async def _to_robot(server: aiohttp.ClientWebSocketResponse, send: Any) -> None:
    async for message in server:
        if message.type == aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
        elif message.type == aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})
    # 1005 and 1006 say that no code was sent, and cannot be sent themselves (RFC 6455, 7.4.1).
    code = 1011 if server.close_code in (None, 1005, 1006) else server.close_code
    await send({"type": "websocket.close", "code": code})


def _observation(model: Dict[str, Any]) -> Dict[str, Any]:
    """What the model reads, in its simplest form: gray pictures and an arm at rest."""
    picture = base64.b64encode(_gray(64)).decode()
    body = {"image": picture, "instruction": "stay"}
    for n, _ in enumerate(model.get("cameras", [])[1:]):
        body[f"wrist_{n}"] = picture
    if model.get("state_length"):
        body["state"] = [0.0] * model["state_length"]
    if model.get("unnorm_key") is None and model.get("unnorm_keys"):
        body["unnorm_key"] = model["unnorm_keys"][0]
    return body


def _gray(size: int) -> bytes:
    """A gray square as a PNG file."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = (b"\0" + b"\x80" * 3 * size) * size
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def merge(replicas: List[Tuple[str, str]]) -> str:
    """The metrics of several servers in one text, each told from the others by the label `replica`."""
    families: Dict[str, Tuple[List[str], List[str]]] = {}
    for replica, text in replicas:
        comments: List[str] = []
        samples: List[str] = []
        for line in text.splitlines():
            if line.startswith("# EOF"):
                continue
            if line.startswith("# "):
                comments, samples = families.setdefault(line.split(" ", 3)[2], ([], []))
                if line not in comments:
                    comments.append(line)
                continue
            name, space, value = line.rpartition(" ")
            name, brace, labels = name.partition("{")
            label = f'replica="{replica}"'
            samples.append(f"{name}{{{label}{',' + labels if brace else '}'}{space}{value}")
    lines = [line for comments, samples in families.values() for line in comments + samples]
    return "\n".join([*lines, "# EOF", ""])
