"""openpi's client, from PyPI and unchanged, against a running openvla-serve, at both of its paths.

usage: openpi_peer.py PORT TOKEN
"""

import sys
from importlib.metadata import version

import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

port, token = sys.argv[1:]
image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
observation = {
    "observation/image": image_tools.resize_with_pad(image, 224, 224),
    "observation/wrist_image": image[::-1].copy(),
    "observation/state": np.zeros(8),
    "prompt": "put eggplant into pot",
}
actions = []
for path in ["", "/v1/realtime/robot/openpi"]:
    url = f"ws://127.0.0.1:{port}{path}"
    policy = websocket_client_policy.WebsocketClientPolicy(url, None, token)
    assert policy.get_server_metadata()["action_horizon"] == 1
    actions += [policy.infer(observation)["actions"] for _ in range(3)]
    chunk = action_chunk_broker.ActionChunkBroker(policy, action_horizon=1).infer(observation)
    actions.append(chunk["actions"][None])
assert all(np.array_equal(action, actions[0]) for action in actions) and actions[0].shape == (1, 7)
print(f"  openpi-client {version('openpi-client')}: {len(actions)} steps over both paths, all the same motion")
