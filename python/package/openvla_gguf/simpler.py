"""SimplerEnv's `OpenVLAInference` without torch: an OpenVLA, and what its motions are for ManiSkill's two robots.

    from openvla_gguf.simpler import OpenVLAInference       # for: from simpler_env.policies.openvla.openvla_model import …

    model = OpenVLAInference("openvla-7b.gguf", policy_setup="widowx_bridge")
    raw_action, action = model.step(image, "put the eggplant in the basket")

ref: SimplerEnv `simpler_env/policies/openvla/openvla_model.py`. Two things differ. Pictures are resized as OpenVLA's own
processor resizes them, from the size that they come in; that file first shrinks them by OpenCV's INTER_AREA. And
instructions are put into the model's prompt, "In: What action …"; that file leaves the prompt out.
"""

import math
from os import PathLike
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np
import numpy.typing as npt

from ._native import OpenVLA

_Array = npt.NDArray[Any]

_KEYS = {"widowx_bridge": "bridge_orig", "google_robot": "fractal20220817_data"}


class OpenVLAInference:
    """`saved_model_path` is a model file, or an `OpenVLA` that is open. The horizons and `image_size` are taken as there
    and mean nothing; `action_scale` multiplies positions and rotations.
    """

    def __init__(
        self,
        saved_model_path: Union[str, "PathLike[str]", OpenVLA],
        unnorm_key: Optional[str] = None,
        policy_setup: str = "widowx_bridge",
        horizon: int = 1,
        pred_action_horizon: int = 1,
        exec_horizon: int = 1,
        image_size: Sequence[int] = (224, 224),
        action_scale: float = 1.0,
        **options: Any,
    ) -> None:
        if policy_setup not in _KEYS:
            raise NotImplementedError(f"policy_setup {policy_setup!r}; there are {', '.join(_KEYS)}")
        self.policy_setup = policy_setup
        self.unnorm_key = _KEYS[policy_setup] if unnorm_key is None else unnorm_key
        if isinstance(saved_model_path, OpenVLA):
            self.vla = saved_model_path
        else:
            self.vla = OpenVLA(saved_model_path, self.unnorm_key, **options)
        self.action_scale = action_scale
        self.sticky_gripper_num_repeat = 15 if policy_setup == "google_robot" else 1
        self.task_description: Optional[str] = None
        self._forget()

    def _forget(self) -> None:
        self.sticky_action_is_on = False
        self.gripper_action_repeat = 0
        self.sticky_gripper_action: Any = 0.0
        self.previous_gripper_action: Optional[_Array] = None
        self._session = self.vla.session()

    def reset(self, task_description: str) -> None:
        """Begins an episode."""
        self.task_description = task_description
        self._forget()

    def step(
        self, image: _Array, task_description: Optional[str] = None, *args: Any, **kwargs: Any
    ) -> Tuple[Dict[str, _Array], Dict[str, _Array]]:
        """The model's motion, and that as the robot takes it.

        `image` is `[height, width, 3]` of uint8. Another `task_description` than before begins an episode; without one, the
        last is meant. The first dictionary has `world_vector` `[3]`, `rotation_delta` `[3]` (roll, pitch and yaw) and
        `open_gripper` `[1]`, 1 open; the second `world_vector`, `rot_axangle` `[3]`, `gripper` `[1]` and
        `terminate_episode` `[1]`, which is 0.
        """
        if task_description is not None and task_description != self.task_description:
            self.reset(task_description)
        if self.task_description is None:
            raise ValueError("the first step names no task_description")
        motion = self._session.act(image, self.task_description, unnorm_key=self.unnorm_key)
        return self.convert(motion.action)

    def convert(self, motion: _Array) -> Tuple[Dict[str, _Array], Dict[str, _Array]]:
        """Both dictionaries of `step`, of seven numbers in the data set's units."""
        raw = {"world_vector": motion[:3], "rotation_delta": motion[3:6], "open_gripper": motion[6:7]}
        action = {
            "world_vector": raw["world_vector"] * self.action_scale,
            "rot_axangle": euler_to_axis_angle(raw["rotation_delta"]) * self.action_scale,
            "gripper": self._gripper(raw["open_gripper"]),
            "terminate_episode": np.array([0.0]),
        }
        return raw, action

    def _gripper(self, opened: _Array) -> _Array:
        if self.policy_setup == "widowx_bridge":
            return 2.0 * (opened > 0.5) - 1.0
        # The robot takes changes, and needs time for each: one that is large is repeated.
        if self.previous_gripper_action is None:
            change = np.array([0])
        else:
            change = self.previous_gripper_action - opened
        self.previous_gripper_action = opened
        if np.abs(change).item() > 0.5 and not self.sticky_action_is_on:
            self.sticky_action_is_on = True
            self.sticky_gripper_action = change
        if self.sticky_action_is_on:
            self.gripper_action_repeat += 1
            change = self.sticky_gripper_action
        if self.gripper_action_repeat == self.sticky_gripper_num_repeat:
            self.sticky_action_is_on = False
            self.gripper_action_repeat = 0
            self.sticky_gripper_action = 0.0
        return change

    def visualize_epoch(self, predicted_raw_actions: Sequence[Any], images: Sequence[_Array], save_path: str) -> None:
        """Draws each number of the actions over time, and every third picture. Needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        labels = ["x", "y", "z", "roll", "pitch", "yaw", "grasp"]
        fig, axes = plt.subplot_mosaic([["image"] * len(labels), labels], figsize=(45, 10))
        actions = np.array([np.concatenate(list(action.values()), axis=-1) for action in predicted_raw_actions])
        for i, label in enumerate(labels):
            axes[label].plot(actions[:, i])
            axes[label].set_title(label)
            axes[label].set_xlabel("step")
        axes["image"].imshow(np.concatenate(list(images[::3]), axis=1))
        fig.savefig(save_path)
        plt.close(fig)


def euler_to_axis_angle(angles: Sequence[float]) -> _Array:
    """Roll, pitch and yaw about fixed axes, in radians, as one rotation: `[3]`, its axis times its angle.

    ref: transforms3d `euler2axangle`, with its default axes, `sxyz`
    """
    (sr, cr), (sp, cp), (sy, cy) = ((math.sin(angle / 2), math.cos(angle / 2)) for angle in angles)
    w = cr * cp * cy + sr * sp * sy
    axis = np.array(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
        ]
    )
    length = float(np.linalg.norm(axis))
    if length < 1e-15:
        return np.zeros(3)
    return axis / length * (2 * math.acos(max(-1.0, min(1.0, w))))
