"""transforms3d, which SimplerEnv uses, against ours."""

from importlib.metadata import version

import numpy as np
from openvla_gguf.simpler import euler_to_axis_angle
from transforms3d.euler import euler2axangle

angles = np.random.default_rng(0).uniform(-np.pi, np.pi, (10_000, 3))
angles[:100] *= 1e-6
worst = 0.0
for roll, pitch, yaw in [*angles, (0.0, 0.0, 0.0), (np.pi, 0.0, 0.0)]:
    axis, angle = euler2axangle(roll, pitch, yaw)
    worst = max(worst, float(np.abs(euler_to_axis_angle([roll, pitch, yaw]) - axis * angle).max()))
assert worst < 1e-7, worst
print(f"  transforms3d {version('transforms3d')}: 10002 rotations, at most {worst:.1e} rad apart")
