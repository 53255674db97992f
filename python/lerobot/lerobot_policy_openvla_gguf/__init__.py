"""OpenVLA and OpenVLA-OFT from one GGUF file, as the policy `openvla_gguf` of LeRobot; and the tabletop, as its
environment `openvla_tabletop`."""

from .configuration_openvla_gguf import OpenVLAGGUFConfig
from .env_openvla_tabletop import OpenVLATabletopConfig
from .modeling_openvla_gguf import OpenVLAGGUFPolicy
from .processor_openvla_gguf import make_openvla_gguf_pre_post_processors

__all__ = [
    "OpenVLAGGUFConfig",
    "OpenVLAGGUFPolicy",
    "OpenVLATabletopConfig",
    "make_openvla_gguf_pre_post_processors",
]
