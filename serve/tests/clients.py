"""The clients that robots have, from PyPI and unchanged, against a running openvla-serve.

usage: clients.py PORT TOKEN
"""
import json
import sys

import json_numpy
import numpy as np
import requests
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

port, token = int(sys.argv[1]), sys.argv[2]
url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {token}"}
task = "put eggplant into pot"
image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)

# OpenVLA's, as its deploy.py tells users to write it.
json_numpy.patch()
action = requests.post(
    f"{url}/act",
    json={"image": image, "instruction": task, "unnorm_key": None},
    headers=headers,
).json()
assert isinstance(action, np.ndarray), action
assert action.shape == (7,) and action.dtype == np.float64, action
encoded = {"encoded": json.dumps({"image": image, "instruction": task})}
double = requests.post(f"{url}/act", json=encoded, headers=headers).json()
assert isinstance(double, str) and np.array_equal(json.loads(double), action), double
refused = requests.post(f"{url}/act", json={"image": image, "instruction": task})
assert refused.status_code == 401, refused

# openpi's.
policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port, api_key=token)
metadata = policy.get_server_metadata()
assert metadata["action_horizon"] == 1 and metadata["unnorm_keys"], metadata
observation = {
    "observation/image": image_tools.resize_with_pad(image, 224, 224),
    "observation/wrist_image": image[::-1].copy(),
    "observation/state": np.zeros(8),
    "prompt": task,
}
for step in range(3):
    result = policy.infer(observation)
    assert np.array_equal(result["actions"], action[None]), (result, action)
    assert result["server_timing"]["infer_ms"] > 0, result
assert "prev_total_ms" in result["server_timing"], result
chunk = action_chunk_broker.ActionChunkBroker(policy, action_horizon=1).infer(observation)
assert np.array_equal(chunk["actions"], action), chunk
planes = dict(observation, **{"observation/image": image.transpose(2, 0, 1)})
assert np.array_equal(policy.infer(planes)["actions"][0], action), "channels first"
try:
    policy.infer({"prompt": task})
    raise SystemExit("an observation without an image was taken")
except RuntimeError as error:
    assert "bad_request" in str(error), error

print("json_numpy with requests, and openpi_client: as with their own servers")
