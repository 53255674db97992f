"""The functions by which the LIBERO scripts of OpenVLA and OpenVLA-OFT act, without torch or tensorflow.

    from openvla_gguf import OpenVLA
    from openvla_gguf.libero import get_action, get_libero_image, invert_gripper_action, normalize_gripper_action

    model = OpenVLA("openvla-7b-finetuned-libero-spatial.gguf", unnorm_key="libero_spatial", profile="oft", center_crop=True)
    action = get_action(cfg, model, {"full_image": get_libero_image(obs)}, task_description)
    obs, reward, done, info = env.step(invert_gripper_action(normalize_gripper_action(action)).tolist())

ref: `experiments/robot/robot_utils.py`, `openvla_utils.py` and `libero/libero_utils.py` of openvla and openvla-oft. How
pictures are prepared is the model's: it takes them turned but not resized. (`profile="libero"` would turn them itself.)
"""

import math
from typing import Any, List, Mapping, Optional, Union

import numpy as np
import numpy.typing as npt

from ._native import OpenVLA

_Array = npt.NDArray[Any]


def get_action(
    cfg: Any,
    model: OpenVLA,
    obs: Mapping[str, Any],
    task_label: str,
    processor: Any = None,
    action_head: Any = None,
    proprio_projector: Any = None,
    noisy_action_projector: Any = None,
    use_film: bool = False,
) -> Union[_Array, List[_Array]]:
    """The next action: `[7]`; for an OpenVLA-OFT a list of such, its chunk.

    `obs` has `full_image` and, for an OpenVLA-OFT, a picture for each key with `wrist` in its name, in their order, and
    `state`. Of `cfg`, `unnorm_key` is read, where it has one. What follows `task_label` is in the model file.
    """
    unnorm_key: Optional[str] = getattr(cfg, "unnorm_key", None)
    known = model.unnorm_keys
    if unnorm_key is not None and unnorm_key not in known and f"{unnorm_key}_no_noops" in known:
        unnorm_key += "_no_noops"  # as the scripts look it up
    images = [obs["full_image"]]
    if len(model.cameras) > 1:
        images += [image for name, image in obs.items() if "wrist" in name]
    state = obs["state"] if model.state_length else None
    # The scripts' own prompt has small letters.
    step = model.act(images[0], task_label.lower(), wrist=images[1:], state=state, unnorm_key=unnorm_key)
    return list(step.actions) if hasattr(step, "actions") else step.action


def get_vla_action(
    cfg: Any,
    vla: OpenVLA,
    processor: Any,
    obs: Mapping[str, Any],
    task_label: str,
    action_head: Any = None,
    proprio_projector: Any = None,
    noisy_action_projector: Any = None,
    use_film: bool = False,
) -> Union[_Array, List[_Array]]:
    """As `get_action`, with the arguments of openvla-oft's."""
    return get_action(cfg, vla, obs, task_label)


def normalize_gripper_action(action: _Array, binarize: bool = True) -> _Array:
    """A copy whose last number is from -1 to 1 in place of 0 to 1; -1 or 1 if `binarize`."""
    action = np.array(action)
    action[..., -1] = 2 * action[..., -1] - 1
    if binarize:
        action[..., -1] = np.sign(action[..., -1])
    return action


def invert_gripper_action(action: _Array) -> _Array:
    """A copy whose last number has the other sign: 1 is open for OpenVLA, and closed for LIBERO's robot."""
    action = np.array(action)
    action[..., -1] *= -1.0
    return action


def get_libero_image(obs: Mapping[str, Any], resize_size: Any = None) -> _Array:
    """The front camera's picture, turned by 180° as those that the models were trained on. Nothing is resized."""
    return np.ascontiguousarray(obs["agentview_image"][::-1, ::-1])


def get_libero_wrist_image(obs: Mapping[str, Any], resize_size: Any = None) -> _Array:
    """As `get_libero_image`, of the wrist camera."""
    return np.ascontiguousarray(obs["robot0_eye_in_hand_image"][::-1, ::-1])


def quat2axisangle(quat: _Array) -> _Array:
    """A quaternion x, y, z, w as axis times angle, `[3]`; without choosing the nearer of both ways round, as robosuite."""
    w = max(-1.0, min(1.0, float(quat[3])))
    length = math.sqrt(1.0 - w * w)
    if math.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quat[:3], np.float64) * 2.0 * math.acos(w) / length
