"""vla-eval's own runner, from PyPI and unchanged, against a running openvla-serve, on the tabletop.

usage: vla_eval_peer.py PORT MODEL.gguf EPISODES
"""

import pathlib
import sys
import tempfile
from importlib.metadata import version

import anyio
import numpy as np
import vla_eval
from openvla_gguf import OpenVLA, Tabletop
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import set_image_format

port, model, episodes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
LIBERO = f"ws://127.0.0.1:{port}/vla-eval?gripper=binary_close_positive"
SUITES = ["base", "language"]
SIZE, STEPS, SEED = 224, 40, 1000
policy = OpenVLA(model, device="cpu")


def evaluate(config):
    """The results of vla-eval's runner: by `vla_eval.run`, or before 0.8 by what its command line calls."""
    if hasattr(vla_eval, "run"):
        return vla_eval.run(config, docker=False)
    from vla_eval.orchestrator import Orchestrator

    return anyio.run(Orchestrator(config, no_save=True).run)


def alone(suite, seed):
    """An episode without a server: whether it succeeded, and in how many steps."""
    table = Tabletop(suite, size=SIZE)
    image, instruction = table.reset(seed)
    chunk = []
    for step in range(1, STEPS + 1):
        if not chunk:
            if policy.state_length:
                wrist = [table.wrist_image] if len(policy.cameras) > 1 else None
                chunk = list(policy.act(image, instruction, wrist=wrist, state=table.state).actions)
            else:
                chunk = [policy.act(image, instruction).action]
        image, _, done = table.step(chunk.pop(0).astype(np.float32))
        if done:
            break
    return done, step


with tempfile.TemporaryDirectory() as folder:
    benchmark = {
        "benchmark": "openvla_gguf.vla_eval:TabletopBenchmark",
        "episodes_per_task": episodes,
        "params": {"suites": SUITES, "seed": SEED, "size": SIZE, "max_steps": STEPS},
    }
    config = {"server": {"url": LIBERO}, "output_dir": folder, "benchmarks": [benchmark]}
    (results,) = evaluate(config)
info = results["server_info"]
assert info["model_server"] == "openvla-serve" and info["protocol_version"] == 1, info
steps = 0
for task in results["tasks"]:
    for episode in task["episodes"]:
        assert "failure_reason" not in episode or episode["failure_reason"] is None, episode
        wanted = alone(task["task"], SEED + episode["episode_id"])
        found = bool(episode["metrics"]["success"]), episode["steps"]
        assert found == wanted, (task["task"], episode, wanted)
        steps += episode["steps"]
    done = sum(bool(episode["metrics"]["success"]) for episode in task["episodes"])
    print(f"  {task['task']}: {done} of {len(task['episodes'])} succeed, as without a server")


async def by_hand():
    """What a runner does not show: every form of picture, errors, and the gripper as it comes."""
    table = Tabletop("language", size=SIZE)
    image, instruction = table.reset(137)
    observation = {"images": {"agentview": image}, "task_description": instruction}
    if policy.state_length:
        observation["images"]["wrist"], observation["states"] = table.wrist_image, table.state
        motion = policy.act(image, instruction, wrist=[table.wrist_image], state=table.state).actions[0]
    else:
        motion = policy.act(image, instruction).action
    motion = motion.astype(np.float32)
    turned = motion.copy()
    turned[-1] = -np.sign(2 * turned[-1] - 1)
    for url, wanted in [(LIBERO, turned), (LIBERO.partition("?")[0], motion)]:
        async with Connection(url, timeout=60, max_retries=1) as connection:
            for form in ["png", "raw"]:
                set_image_format(form)
                await connection.start_episode({"task": {"name": "by hand"}})
                action = await connection.act(observation)
                assert action["actions"].dtype == np.float32 and np.array_equal(action["actions"], wanted), action
            set_image_format("jpeg")
            await connection.start_episode({"task": {"name": "by hand"}})
            assert (await connection.act(observation))["actions"].shape == (7,)
            set_image_format("png")
            await connection.start_episode({"task": {"name": "by hand"}})
            try:
                await connection.act({"images": {}, "task_description": instruction})
                raise SystemExit("an observation without a picture was taken")
            except RuntimeError as error:
                assert "observation_failed: bad_request" in str(error), error
            assert np.array_equal((await connection.act(observation))["actions"], wanted)


anyio.run(by_hand)
name = pathlib.Path(model).name
print(f"  vla-eval {version('vla-eval')}, {name}: {steps} steps without a fault, each as without a server")
