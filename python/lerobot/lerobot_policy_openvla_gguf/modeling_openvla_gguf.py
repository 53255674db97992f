"""The policy: batches of LeRobot's observations in, its actions out."""

import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_IMAGE, OBS_STATE
from openvla_gguf import OpenVLA
from torch import Tensor

from .configuration_openvla_gguf import OpenVLAGGUFConfig
from .processor_openvla_gguf import make_openvla_gguf_pre_post_processors

MODEL = "model.gguf"
"""The model's name in a folder of `save_pretrained`."""


class OpenVLAGGUFPolicy(PreTrainedPolicy):
    """An OpenVLA or an OpenVLA-OFT. It has no weights of torch, and is not trained.

    `from_pretrained` takes a GGUF file, or a folder that `save_pretrained` wrote.
    """

    config_class = OpenVLAGGUFConfig
    name = "openvla_gguf"

    def __init__(self, config: OpenVLAGGUFConfig, **kwargs: Any):
        super().__init__(config)
        config.validate_features()
        self.engine = OpenVLA(
            config.model,
            config.unnorm_key,
            device=config.engine_device,
            threads=config.threads,
            profile=config.profile,
            center_crop=config.center_crop,
        )
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> "OpenVLAGGUFPolicy":
        path = Path(pretrained_name_or_path)
        if path.is_dir():
            config = config or PreTrainedConfig.from_pretrained(path)
            config.model = str(path / config.model)
        elif path.is_file():
            config = config or cls.config_class()
            config.model = str(path)
        else:
            raise FileNotFoundError(f"{path} is neither a GGUF file nor a folder of save_pretrained on this machine")
        return cls(config).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The settings, the processors, and the model: a link to it where the file system has such, else a copy."""
        model = self.config.model
        target = save_directory / MODEL
        target.unlink(missing_ok=True)
        try:
            os.link(model, target)
        except OSError:
            shutil.copyfile(model, target)
        self.config.model = MODEL
        try:
            self.config._save_pretrained(save_directory)
        finally:
            self.config.model = model
        for pipeline in make_openvla_gguf_pre_post_processors(self.config):
            pipeline.save_pretrained(save_directory)

    def get_optim_params(self) -> dict:
        return {}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict | None]:
        raise NotImplementedError("openvla_gguf acts; it is not trained")

    def reset(self) -> None:
        self._actions: deque[Tensor] = deque()
        self._sessions: list[Any] = []

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """`[batch, n]`: the next action of a chunk, of a new one where none is left."""
        if not self._actions:
            chunk = self.predict_action_chunk(batch)[:, : self.config.n_action_steps]
            self._actions.extend(chunk.transpose(0, 1))
        return self._actions.popleft()

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """`[batch, chunk, n]` of float32, in the data set's units; of an OpenVLA, chunks of one."""
        names = self.config.cameras or [name for name in batch if name.startswith(OBS_IMAGE)]
        names = names[: len(self.engine.cameras)]
        if not names:
            raise ValueError(f"no picture is observed: {', '.join(batch)}; name it in `cameras`")
        pictures = [_pixels(batch[name]) for name in names]
        tasks = batch["task"]
        n = len(pictures[0])
        if isinstance(tasks, str):
            tasks = [tasks] * n
        states = batch[OBS_STATE].double().cpu().numpy() if self.engine.state_length else [None] * n
        while len(self._sessions) < n:
            self._sessions.append(self.engine.session())
        chunks = []
        for i, session in enumerate(self._sessions[:n]):
            first, *wrist = [picture[i] for picture in pictures]
            step = session.act(first, tasks[i], wrist=wrist, state=states[i])
            chunks.append(step.actions if hasattr(step, "actions") else step.action[None])
        actions = torch.from_numpy(np.stack(chunks)).float()
        if self.config.gripper == "binary_close_positive":
            actions[..., -1] = -torch.sign(2 * actions[..., -1] - 1)
        return actions.to(self.config.device)


def _pixels(pictures: Tensor) -> np.ndarray:
    """`[batch, height, width, 3]` of uint8, of LeRobot's `[batch, 3, height, width]` from 0 to 1."""
    if pictures.dtype != torch.uint8:
        pictures = (pictures * 255).round().clamp(0, 255).to(torch.uint8)
    return pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
