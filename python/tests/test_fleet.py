"""The fleet's parts without a cluster: `tests/fleet` has two replicas under load."""

import asyncio
import io
import json
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("ray.serve", reason="openvla-gguf[fleet]: Ray Serve is not installed")

from openvla_gguf import fleet
from PIL import Image
from pydantic import ValidationError


def test_settings_become_the_servers_options(tmp_path):
    settings = fleet.Settings(model="m.gguf", unnorm_key="k", options="--draft auto --max-delta '0.1,0.2'", cpus=4)
    arguments = settings.arguments()
    assert arguments[arguments.index("--threads") + 1] == "4"
    assert arguments[arguments.index("--model") + 1] == "m.gguf"
    assert arguments[-4:] == ["--draft", "auto", "--max-delta", "0.1,0.2"]


@pytest.mark.parametrize("wrong", [{"modell": "m"}, {"replicas": 0}, {"replicas": "two"}, {"gpus": -1}, {"token_file": "/nowhere"}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        fleet.Settings(**wrong)


def test_an_application_scales_only_upwards():
    fleet.app(fleet.Settings(replicas=1, max_replicas=2))
    with pytest.raises(ValueError, match="max_replicas is 1, less than the 2"):
        fleet.app(fleet.Settings(replicas=2, max_replicas=1))


def ask(inner, headers=(), kind="http"):
    """What a client behind the gate is sent by `inner`, and what that was asked."""
    seen, sent = {}, []

    async def app(scope, receive, send):
        seen.update(dict(scope["headers"]))
        await inner(send)

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": "/v1/act", "headers": [(name.encode(), value.encode()) for name, value in headers]}
    asyncio.run(fleet.Gate(app)(scope, None, send))
    return seen, sent


async def motion(send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"motion"})


async def nothing(send):
    pass


def test_a_robot_names_its_session():
    assert ask(motion, [("x-client-id", "arm")])[0][b"x-session-id"] == b"arm"
    assert ask(motion, [("x-client-id", "arm"), ("x-session-id", "leg")])[0][b"x-session-id"] == b"leg"
    assert ask(nothing, [("x-client-id", "arm")], "websocket")[0][b"x-session-id"] == b"arm"
    assert b"x-session-id" not in ask(motion)[0]


def test_no_motion_is_late():
    async def slow(send):
        await asyncio.sleep(0.03)
        await motion(send)

    seen, sent = ask(slow, [("x-deadline-ms", "10")])
    assert float(seen[b"x-request-timeout-seconds"]) == 0.015
    assert [message.get("status") for message in sent] == [504, None]
    assert json.loads(sent[1]["body"])["code"] == "deadline_exceeded"
    assert ask(slow, [("x-deadline-ms", "5000")])[1][1]["body"] == b"motion"
    for wrong in ["soon", "", "-1", "0", "1e3", "9" * 20]:  # which the server itself refuses
        assert ask(slow, [("x-deadline-ms", wrong)])[1][1]["body"] == b"motion"


def test_no_motion_comes_after_one_for_a_newer_picture():
    async def replica(scope, _, send):
        await asyncio.sleep(float(dict(scope["headers"])[b"takes-ms"]) / 1e3)
        await motion(send)

    async def answers(path, *asked):
        gate, said = fleet.Gate(replica), [[] for _ in asked]

        async def one(robot, takes_ms, said):
            async def send(message):
                said.append(message.get("status", message.get("body")))

            headers = [(b"x-client-id", robot), (b"takes-ms", takes_ms)]
            await gate({"type": "http", "path": path, "headers": headers}, None, send)

        await asyncio.gather(*(one(*request, said) for request, said in zip(asked, said)))
        assert not gate.robots, "who waits for nothing is forgotten"
        return [status for status, _ in said]

    moving = [(b"arm", b"60"), (b"arm", b"20"), (b"leg", b"80"), (b"arm", b"40")]
    assert asyncio.run(answers("/v1/act", *moving)) == [409, 200, 200, 200]
    assert asyncio.run(answers("/v1/model", *moving)) == [200] * 4, "no motions"


def test_a_replica_that_is_gone_is_an_answer():
    _, (start, body) = ask(nothing)
    assert (start["status"], (b"retry-after", b"1") in start["headers"]) == (503, True)
    assert json.loads(body["body"])["code"] == "not_ready"


def test_metrics_of_replicas_are_told_apart():
    text = '# TYPE a counter\na_total{form="act"} 1\n# TYPE b gauge\n# UNIT b s\nb 2\n# EOF\n'
    assert fleet.merge([("x", text), ("y", text)]).splitlines() == [
        "# TYPE a counter", 'a_total{replica="x",form="act"} 1', 'a_total{replica="y",form="act"} 1',
        "# TYPE b gauge", "# UNIT b s", 'b{replica="x"} 2', 'b{replica="y"} 2', "# EOF",
    ]  # fmt: skip


def test_the_health_check_looks_at_a_picture():
    image = Image.open(io.BytesIO(fleet._gray(64)))
    assert (image.mode, image.size, image.getcolors()) == ("RGB", (64, 64), [(4096, (128, 128, 128))])
    oft = {"cameras": ["full_image", "wrist_image"], "state_length": 8, "unnorm_key": None, "unnorm_keys": ["a", "b"]}
    observation = fleet._observation(oft)
    assert observation["wrist_0"] == observation["image"]
    assert (observation["state"], observation["unnorm_key"]) == ([0.0] * 8, "a")


def test_a_server_that_cannot_start_says_why():
    server = fleet._Server(["--log-json", "--port", "0", "--model", "/nowhere.gguf"])
    with pytest.raises(RuntimeError, match="/nowhere.gguf"):
        server.wait_until_ready()


def test_a_server_ends_with_the_process_that_started_it():
    program = (
        "import os, signal; from openvla_gguf import fleet\n"
        "server = fleet._Server(['--log-json', '--port', '0']); server.wait_until_ready()\n"
        "print(server.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    server = int(done.stdout)
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{server}") and open(f"/proc/{server}/stat").read().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < end, "the server runs on"
        time.sleep(0.05)


def test_bodies_of_any_size_are_answered():
    """Those that are too large, too, which the server does not read."""
    server = fleet._Server(["--log-json", "--port", "0"])
    server.wait_until_ready()

    async def post(size):
        asked, answered = [], []
        turns = iter([{"type": "lifespan.startup"}])
        handover = fleet.Handover(server, None, None)

        async def live():
            return next(turns, None) or await asyncio.Event().wait()

        async def receive():
            asked.append(size)
            return {"type": "http.request", "body": b"x" * size}

        async def send(message):
            answered.append(message)

        life = asyncio.create_task(handover({"type": "lifespan"}, live, send))
        while not answered:
            await asyncio.sleep(0)
        headers = [(b"content-length", str(size).encode()), (b"content-type", b"application/json")]
        await handover({"type": "http", "method": "POST", "path": "/act", "headers": headers}, receive, send)
        life.cancel()
        await handover.session.close()
        return answered[1]["status"], len(asked)

    assert asyncio.run(post(10)) == (400, 1)
    assert asyncio.run(post(2 << 20)) == (400, 1)
    assert asyncio.run(post(17 << 20)) == (413, 0)
    server.is_stopping = True
    server.process.kill()
