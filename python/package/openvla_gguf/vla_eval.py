"""The tabletop as a benchmark of vla-eval (0.4 to 0.8), which must be installed.

    benchmarks:
      - benchmark: "openvla_gguf.vla_eval:TabletopBenchmark"
        episodes_per_task: 50
        params: {suites: [base, language]}

Actions and observations are in LIBERO's form, so that servers for LIBERO's robots serve it: a gripper of -1 open and 1
closed, which openvla-serve gives at `ws://HOST:8000/vla-eval?gripper=binary_close_positive`.
"""

from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
)

from ._native import Tabletop

_OPEN = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


class TabletopBenchmark(StepBenchmark):
    """Each suite is a task, each of its episodes the scene of one seed.

    `seed` is that of the first episode, `size` the pictures' sides in pixels, `max_steps` where an episode has failed.
    `send_wrist_image` and `send_state` add what an OpenVLA-OFT sees; a server asks for them.
    """

    render_backends = frozenset({"gpu", "cpu"})  # it needs neither

    _ALL_RECORD_FIELDS = frozenset({"reward", "done", "success", "action", "state"})

    @classmethod
    def configure_render(cls, mode: str) -> Dict[str, str]:
        return {}

    def __init__(
        self,
        suites: Union[str, Sequence[str]] = "base",
        seed: int = 0,
        size: int = 256,
        max_steps: int = 40,
        send_wrist_image: bool = False,
        send_state: bool = False,
    ) -> None:
        super().__init__()
        names = [suites] if isinstance(suites, str) else list(suites)
        self._tables = {name: Tabletop(name, size=size) for name in names}
        self._table: Optional[Tabletop] = None
        self._seed = seed
        self._max_steps = max_steps
        self._send_wrist_image = send_wrist_image
        self._send_state = send_state

    def get_tasks(self) -> List[Dict[str, Any]]:
        return [{"name": name, "suite": name} for name in self._tables]

    def reset(self, task: Dict[str, Any]) -> Any:
        self._table = self._tables[task["suite"]]
        image, _ = self._table.reset(self._seed + task.get("episode_idx", 0))
        self._recorder.record_video(image)
        return image

    def step(self, action: Dict[str, Any]) -> StepResult:
        numbers = np.asarray(action.get("actions", action.get("action")), np.float32)
        if numbers.shape != (7,):
            raise ValueError(f"an action of shape {numbers.shape}; (7,) is wanted")
        if self._table is None:
            raise RuntimeError("a step before the first episode")
        opens = numbers[6] < 0  # as LIBERO's robots do
        image, reward, done = self._table.step([*numbers[:6].tolist(), float(opens)])
        self._recorder.record_video(image)
        state = self._table.state.astype(np.float32)
        self._recorder.record_step(reward=reward, done=done, success=done, action=numbers, state=state)
        return StepResult(obs=image, reward=reward, done=done, info={})

    def make_obs(self, raw_obs: Any, task: Dict[str, Any]) -> Dict[str, Any]:
        assert self._table is not None
        observation: Dict[str, Any] = {
            "images": {"agentview": raw_obs},
            "task_description": self._table.instruction,
        }
        if self._send_wrist_image:
            observation["images"]["wrist"] = self._table.wrist_image
        if self._send_state:
            observation["states"] = self._table.state
        return observation

    def get_step_result(self, step_result: StepResult) -> Dict[str, Any]:
        return {"success": bool(step_result.done)}

    def get_metadata(self) -> Dict[str, Any]:
        return {"max_steps": self._max_steps}

    def get_hold_action(self, last_action: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        """Stands still, with the gripper as it was."""
        hold = _OPEN.copy()
        if last_action is not None:
            hold[6] = last_action["actions"][6]
        return {"actions": hold}

    def get_action_spec(self) -> Dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> Dict[str, DimSpec]:
        spec = {"image": IMAGE_RGB, "language": LANGUAGE}
        if self._send_wrist_image:
            spec["wrist_image"] = IMAGE_RGB
        if self._send_state:
            spec["state"] = STATE_EEF_POS_AA_GRIP
        return spec
