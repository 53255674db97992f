from os import PathLike
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union, final

import numpy as np
import numpy.typing as npt

__all__ = ["Action", "Chunk", "OpenVLA", "Session", "Tabletop", "__version__", "convert"]

__version__: str

_Image = Union[npt.NDArray[np.uint8], bytes, str, "PathLike[str]", Any]
"""`[height, width, 3]` of uint8, a PIL image, or an image file as a path or its bytes."""

@final
class Action:
    """One motion."""

    @property
    def action(self) -> npt.NDArray[np.float64]:
        """`[n]`, in the data set's units: for Bridge meters and radians a step, then the gripper, 1 open."""
    @property
    def normalized(self) -> npt.NDArray[np.float64]:
        """`[n]`, the same in -1..1."""
    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """`[n]`, the ids that it was decoded from."""
    @property
    def unconstrained(self) -> Dict[str, Any]:
        """`tokens`: the best of all ids at each step; `all_actions`: whether they all are actions."""
    @property
    def unnorm_key(self) -> str:
        """The data set whose units it is in."""
    @property
    def timing_ms(self) -> Dict[str, float]:
        """Milliseconds by stage, and in total."""

@final
class Chunk:
    """What an OpenVLA-OFT does next: actions, to be made one after another before it looks again."""

    @property
    def actions(self) -> npt.NDArray[np.float64]:
        """`[chunk, n]`, in the data set's units."""
    @property
    def normalized(self) -> npt.NDArray[np.float64]:
        """`[chunk, n]`, as the model gave them: about -1..1, and not bounded."""
    @property
    def tokens(self) -> Optional[npt.NDArray[np.int64]]:
        """`[chunk, n]`, the ids that they were decoded from, if the model gives tokens."""
    @property
    def normalized_state(self) -> npt.NDArray[np.float64]:
        """The state as the model was given it, in -1..1."""
    @property
    def unnorm_key(self) -> str:
        """The data set whose units they are in."""
    @property
    def timing_ms(self) -> Dict[str, float]:
        """Milliseconds by stage, and in total."""

@final
class Session:
    """One robot at one task: see `OpenVLA.session`."""

    @property
    def name(self) -> str: ...
    def act(
        self,
        image: Union[_Image, Mapping[str, _Image]],
        instruction: str,
        *,
        wrist: Optional[Sequence[_Image]] = None,
        state: Optional[Sequence[float]] = None,
        unnorm_key: Optional[str] = None,
    ) -> Union[Action, Chunk]:
        """As `OpenVLA.act`."""
    def __enter__(self) -> Session: ...
    def __exit__(self, *args: object) -> None: ...

@final
class OpenVLA:
    """A policy: an OpenVLA, or an OpenVLA-OFT, whichever the file holds.

    It may be used from several threads, which take turns. After a fork, open another one.
    """

    def __new__(
        cls,
        path: Union[str, "PathLike[str]"],
        unnorm_key: Optional[str] = None,
        *,
        device: str = "auto",
        threads: Optional[int] = None,
        n_gpu_layers: Optional[int] = None,
        draft: str = "off",
        profile: Optional[str] = None,
        center_crop: Optional[bool] = None,
    ) -> OpenVLA:
        """Opens a file that `openvla-convert` or `convert` wrote.

        `unnorm_key` names the data set whose units are wanted; it may be left out where there is one. `device` is
        `auto`, `cpu`, `cuda`, `vulkan`, or one of several, such as `cuda:1`. `draft="auto"` lets sessions try the motion
        before as the next one's tokens. `profile` (`raw`, `oft` or `libero`) and `center_crop` replace what the file
        says of how pictures are prepared.

        Raises `OpenVLAError` if the file cannot be used or a device is not there.
        """
    def act(
        self,
        image: Union[_Image, Mapping[str, _Image]],
        instruction: str,
        *,
        wrist: Optional[Sequence[_Image]] = None,
        state: Optional[Sequence[float]] = None,
        unnorm_key: Optional[str] = None,
    ) -> Union[Action, Chunk]:
        """One control step.

        `image` is the camera's picture; for an OpenVLA-OFT it may be a mapping from the names of its `cameras` to
        pictures, else `wrist` has those of its wrist cameras in the model's order. `state` is the arm's, in the data
        set's units. An OpenVLA gives an `Action`, an OpenVLA-OFT a `Chunk`.

        Raises `InputError` for what the model does not read, `TypeError` for what is no image at all.
        """
    def predict_action(
        self,
        image: Union[_Image, Mapping[str, _Image]],
        instruction: str,
        unnorm_key: Optional[str] = None,
        *,
        wrist: Optional[Sequence[_Image]] = None,
        state: Optional[Sequence[float]] = None,
    ) -> npt.NDArray[np.float64]:
        """The numbers of `act` alone: `[n]`, or `[chunk, n]`."""
    def session(self, name: str = "") -> Session:
        """One robot at one task, whose motions may be drafted from those before. One model serves many."""
    def close(self) -> None:
        """Gives the model's memory back. Whatever is asked later raises `OpenVLAError`."""
    @property
    def name(self) -> str: ...
    @property
    def unnorm_keys(self) -> List[str]:
        """The data sets that the model knows."""
    @property
    def cameras(self) -> List[str]:
        """The cameras whose pictures an OpenVLA-OFT is shown, in its order; an OpenVLA has one without a name."""
    @property
    def chunk(self) -> int:
        """Actions of one step: 1 for an OpenVLA."""
    @property
    def state_length(self) -> int:
        """Numbers of the arm's state; 0 if the model reads none."""
    def __enter__(self) -> OpenVLA: ...
    def __exit__(self, *args: object) -> None: ...

@final
class Tabletop:
    """A gripper over a small table, to try policies in: the world that the built-in example was trained for.

    The same seed gives the same scene, pictures and steps everywhere. Meters and radians throughout.
    """

    def __new__(cls, suite: str = "base", *, size: int = 224) -> Tabletop:
        """`suite` is `base`, the example's training distribution, or what differs from it in one way: `visual`, `motion`,
        `physical`, `semantic`, `language`. Pictures are `size` pixels square, 16 to 2048.
        """
    def reset(self, seed: int) -> Tuple[npt.NDArray[np.uint8], str]:
        """Begins the scene of a seed, from 0 to 2^64 - 1; gives `image` and `instruction`."""
    def step(self, action: Union[Sequence[float], npt.NDArray[np.floating[Any]]]) -> Tuple[npt.NDArray[np.uint8], float, bool]:
        """Makes a step of seven numbers: Δx Δy Δz in meters, Δroll Δpitch Δyaw in radians, and the gripper, which opens
        at a half and above. Motions are cut off at 0.06 m and 0.3 rad; roll and pitch are ignored.

        Gives `image`, a reward of 1 when the task is done and 0 else, and `done`.
        """
    def expert(self) -> npt.NDArray[np.float64]:
        """`[7]`, the next step of one who knows where everything is."""
    @property
    def image(self) -> npt.NDArray[np.uint8]:
        """`[size, size, 3]`, what the front camera sees."""
    @property
    def wrist_image(self) -> npt.NDArray[np.uint8]:
        """`[size, size, 3]`, what the wrist camera sees."""
    @property
    def state(self) -> npt.NDArray[np.float64]:
        """`[8]`: position, roll, pitch and yaw of the gripper, and where each finger is."""
    @property
    def instruction(self) -> str: ...
    @property
    def done(self) -> bool:
        """Whether what was asked for lies where it should."""

def convert(
    checkpoint: Union[str, "PathLike[str]"],
    output: Union[None, str, "PathLike[str]"] = None,
    *,
    type: str = "Q4_K_M",
    lora: Union[None, str, "PathLike[str]"] = None,
    base: Union[None, str, "PathLike[str]"] = None,
    platform: Optional[str] = None,
    imatrix: Union[None, str, "PathLike[str]"] = None,
    proof: bool = True,
    threads: Optional[int] = None,
) -> Path:
    """Turns a checkpoint into one GGUF file and returns its path, as `openvla-convert` does.

    `checkpoint` is a folder, or `user/repo[@revision]` on the Hugging Face Hub. `output` defaults to a name such as
    `OpenVLA-7B-v1.0-Q4_K_M.gguf` in this folder; a file there is replaced. A progress bar is shown on a terminal; Ctrl-C
    leaves nothing behind.

    Raises `OpenVLAError` if the checkpoint cannot be converted.
    """
