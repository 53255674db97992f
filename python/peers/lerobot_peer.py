"""What LeRobot's own program wrote about the tabletop, and the policy by hand, from PyPI and unchanged.

usage: lerobot_peer.py EVAL_INFO.json MODEL.gguf
"""

import json
import pathlib
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot_policy_openvla_gguf import OpenVLAGGUFPolicy, OpenVLATabletopConfig
from openvla_gguf import OpenVLA, Tabletop

report, model = sys.argv[1:]
overall = json.loads(pathlib.Path(report).read_text())["overall"]

table = Tabletop("language", size=224)
image, instruction = table.reset(137)
batch = {
    "observation.images.image": torch.from_numpy(image).permute(2, 0, 1).float()[None] / 255,
    "observation.images.image2": torch.from_numpy(table.wrist_image).permute(2, 0, 1).float()[None] / 255,
    "observation.state": torch.from_numpy(table.state)[None],
    "task": [instruction],
}
with OpenVLA(model, device="cpu") as engine:
    if engine.state_length:
        wanted = engine.act(image, instruction, wrist=[table.wrist_image], state=table.state).actions
    else:
        wanted = engine.act(image, instruction).action[None]
wanted = torch.from_numpy(np.asarray(wanted)).float()
policy = OpenVLAGGUFPolicy.from_pretrained(model)
assert torch.equal(policy.predict_action_chunk(batch)[0], wanted)
assert torch.equal(policy.select_action(batch)[0], wanted[0])
with tempfile.TemporaryDirectory() as folder:
    policy.save_pretrained(folder)
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = pathlib.Path(folder)
    again = make_policy(config, env_cfg=OpenVLATabletopConfig())
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    assert torch.equal(after(again.select_action(before(dict(batch))))[0], wanted[0])
episodes = overall["n_episodes"]
print(f"  lerobot {version('lerobot')}, {pathlib.Path(model).name}: lerobot-eval, {episodes} episodes, {overall['pc_success']:.0f} % succeed")
