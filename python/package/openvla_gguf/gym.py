"""The tabletop as an environment of gymnasium, which must be installed.

    import gymnasium, openvla_gguf.gym

    env = gymnasium.make("openvla/Tabletop-v0", suite="language")
    observation, info = env.reset(seed=137)
    observation, reward, terminated, truncated, info = env.step(policy.act(observation["image"], info["instruction"]).action)

gymnasium before 1.0 finds it without the import; later ones also take "openvla_gguf.gym:openvla/Tabletop-v0".
"""

from typing import Any, Dict, Optional, Tuple

import numpy as np
from gymnasium import Env, spaces
from gymnasium.envs import registration

from ._native import Tabletop

STEPS = 40
"""Steps after which an episode is cut off. One who knows where everything is needs about 11."""

_LIMITS = np.array([0.06, 0.06, 0.06, 0.3, 0.3, 0.3], np.float32)


class TabletopEnv(Env):  # type: ignore[type-arg]
    """One thing is to be put somewhere. What to put where is in `info["instruction"]` and the observation.

    An observation is a dictionary: `image` and `wrist_image`, `[size, size, 3]` of uint8, `state`, `[8]`, as
    `openvla_gguf.Tabletop` has them, and `instruction`. An action is OpenVLA's: meters, radians, and a gripper that opens at a
    half and above. The reward is 1 at success, which ends the episode, and 0 else.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, suite: str = "base", size: int = 224, render_mode: Optional[str] = None):
        self.table = Tabletop(suite, size=size)
        self.render_mode = render_mode
        picture = spaces.Box(0, 255, (size, size, 3), np.uint8)
        state = spaces.Box(-10, 10, (8,), np.float64)
        # What is asked is English, with no more than its letters and marks.
        instruction = spaces.Text(256, charset="".join(map(chr, range(32, 127))))
        self.observation_space = spaces.Dict(
            {"image": picture, "wrist_image": picture, "state": state, "instruction": instruction}
        )
        self.action_space = spaces.Box(np.append(-_LIMITS, np.float32(0)), np.append(_LIMITS, np.float32(1)))

    def reset(
        self, *, seed: Optional[int] = None, options: Optional[Dict[str, Any]] = None
    ) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """The scene of a seed is that of `openvla_gguf.Tabletop`; without one, scenes follow from the last seed."""
        super().reset(seed=seed)
        scene = seed if seed is not None else int(self.np_random.integers(2**63))
        self.table.reset(scene)
        return self._observation(), self._info()

    def step(self, action: Any) -> Tuple[Dict[str, Any], float, bool, bool, Dict[str, Any]]:
        _, reward, done = self.table.step(action)
        return self._observation(), reward, done, False, self._info()

    def render(self) -> Any:
        return self.table.image if self.render_mode == "rgb_array" else None

    def _observation(self) -> Dict[str, Any]:
        table = self.table
        return {
            "image": table.image,
            "wrist_image": table.wrist_image,
            "state": table.state,
            "instruction": table.instruction,
        }

    def _info(self) -> Dict[str, Any]:
        return {"instruction": self.table.instruction, "is_success": self.table.done}


def register() -> None:
    """Makes `gymnasium.make("openvla/Tabletop-v0")` known. Importing this module does it."""
    if "openvla/Tabletop-v0" not in registration.registry:
        registration.register("openvla/Tabletop-v0", f"{__name__}:TabletopEnv", max_episode_steps=STEPS)


register()
