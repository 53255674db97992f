"""The tabletop as an environment of LeRobot, with LIBERO's names: nothing needs to be downloaded for it."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from openvla_gguf.gym import STEPS, TabletopEnv

GYM_ID = "openvla/TabletopLeRobot-v0"


class LeRobotTabletopEnv(TabletopEnv):
    """Observations as LeRobot reads them: `pixels`, pictures by name, and `agent_pos`, the state."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        whole = self.observation_space
        pixels = spaces.Dict({"image": whole["image"], "image2": whole["wrist_image"]})
        self.observation_space = spaces.Dict({"pixels": pixels, "agent_pos": whole["state"]})

    @property
    def task_description(self) -> str:
        return self.table.instruction

    @property
    def task(self) -> str:
        return self.table.instruction

    def _observation(self) -> dict[str, Any]:
        table = self.table
        return {"pixels": {"image": table.image, "image2": table.wrist_image}, "agent_pos": table.state}


if GYM_ID not in gymnasium.registry:
    gymnasium.register(GYM_ID, LeRobotTabletopEnv, max_episode_steps=STEPS)


@EnvConfig.register_subclass("openvla_tabletop")
@dataclass
class OpenVLATabletopConfig(EnvConfig):
    """`task` is the suite; pictures are `size` pixels square."""

    task: str | None = "base"
    fps: int = 5
    size: int = 224
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "pixels/image": f"{OBS_IMAGES}.image",
            "pixels/image2": f"{OBS_IMAGES}.image2",
            "agent_pos": OBS_STATE,
        }
    )

    def __post_init__(self) -> None:
        shape = (self.size, self.size, 3)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (7,)),
            "pixels/image": PolicyFeature(FeatureType.VISUAL, shape),
            "pixels/image2": PolicyFeature(FeatureType.VISUAL, shape),
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
        }

    @property
    def package_name(self) -> str:
        return __package__

    @property
    def gym_id(self) -> str:
        return GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"suite": self.task, "size": self.size, "render_mode": "rgb_array"}
