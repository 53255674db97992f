"""The settings of the policy."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig

GRIPPERS = ("continuous_01", "binary_close_positive")


@PreTrainedConfig.register_subclass("openvla_gguf")
@dataclass
class OpenVLAGGUFConfig(PreTrainedConfig):
    """`model` is the file; what follows it is as in `openvla_gguf.OpenVLA`. `device` is where LeRobot has its tensors.

    `cameras` names the observations whose pictures the model is shown, in its order; left out, those that there are, in
    their order. `n_action_steps` is how many actions of a chunk are made before it looks again; left out, all. `gripper` is
    how the last number of an action is given: `continuous_01`, 0 closed to 1 open as in the model's data, or
    `binary_close_positive`, -1 open and 1 closed, as LIBERO's robot takes it.
    """

    model: str = ""
    unnorm_key: str | None = None
    engine_device: str = "auto"
    threads: int | None = None
    profile: str | None = None
    center_crop: bool | None = None
    cameras: list[str] | None = None
    n_action_steps: int | None = None
    gripper: str = "continuous_01"

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self):
        raise NotImplementedError("openvla_gguf acts; it is not trained")

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        if not self.model:
            raise ValueError("openvla_gguf needs a model: --policy.model=FILE.gguf")
        if self.gripper not in GRIPPERS:
            raise ValueError(f"gripper is {self.gripper!r}; one of {', '.join(GRIPPERS)} is wanted")
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise ValueError(f"n_action_steps is {self.n_action_steps}; 1 or more is wanted")
