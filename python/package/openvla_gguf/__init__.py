"""OpenVLA robot policies from one quantized GGUF file: image and instruction in, motion out.

    policy = openvla_gguf.OpenVLA("openvla-7b.gguf", unnorm_key="bridge_orig")
    action = policy.act(image, "put eggplant into pot")
    robot.move(action.action)
"""

from ._errors import InputError, OpenVLAError
from ._native import Action, Chunk, OpenVLA, Session, Tabletop, __version__, convert

__all__ = ["Action", "Chunk", "InputError", "OpenVLA", "OpenVLAError", "Session", "Tabletop", "__version__", "convert"]
