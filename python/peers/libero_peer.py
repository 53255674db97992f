"""An episode of LIBERO, rendered by MuJoCo's OSMesa, with a policy of ours in its loop: as openvla's run_libero_eval.py.

usage: libero_peer.py MODEL.gguf [STEPS]

LIBERO imports torch to read init states and nothing else: what it reads are arrays of numpy in torch's zip, which is
done here, so that torch stays out.
"""

import os
import pickle
import statistics
import sys
import tempfile
import time
import types
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Before mujoco and robosuite are imported.
os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = "osmesa"
folder = tempfile.TemporaryDirectory()
os.environ["LIBERO_CONFIG_PATH"] = folder.name
root = Path(find_spec("libero").submodule_search_locations[0]) / "libero"
paths = {
    "benchmark_root": root,
    "bddl_files": root / "bddl_files",
    "init_states": root / "init_files",
    "datasets": root.parent / "datasets",
    "assets": root / "assets",
}
# Without it, importing LIBERO asks at the terminal.
Path(folder.name, "config.yaml").write_text("".join(f"{key}: {path}\n" for key, path in paths.items()))


class Arrays(pickle.Unpickler):
    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "encode"}

    def find_class(self, module, name):
        if name not in self.ALLOWED or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"{module}.{name} is not of an array")
        return super().find_class(module, name)


def load(path, **_):
    with zipfile.ZipFile(path) as file:
        name = next(name for name in file.namelist() if name.endswith("/data.pkl"))
        with file.open(name) as stream:
            return Arrays(stream).load()


sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].load = load

import numpy as np
import openvla_gguf
from libero.libero.benchmark import get_benchmark_dict
from libero.libero.envs import OffScreenRenderEnv
from openvla_gguf import libero
from robosuite.utils.transform_utils import quat2axisangle

random = np.random.default_rng(0)
for quaternion in random.normal(size=(1000, 4)):
    quaternion /= np.linalg.norm(quaternion)
    ours, theirs = libero.quat2axisangle(quaternion.copy()), quat2axisangle(quaternion.copy())
    assert np.abs(ours - theirs).max() < 1e-9, (quaternion, ours, theirs)

model = openvla_gguf.OpenVLA(sys.argv[1], device="cpu")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 220
suite = get_benchmark_dict()["libero_spatial"]()
task = suite.get_task(0)
env = OffScreenRenderEnv(
    bddl_file_name=suite.get_task_bddl_file_path(0), camera_heights=256, camera_widths=256
)
env.seed(0)
env.reset()
seen = env.set_init_state(suite.get_task_init_states(0)[0])
for _ in range(10):  # while objects fall
    seen, *_ = env.step([0, 0, 0, 0, 0, 0, -1])
picture = libero.get_libero_image(seen)
assert picture.shape == (256, 256, 3) and picture.std() > 20, "a scene, not a blank"

cfg = types.SimpleNamespace(unnorm_key=None)
queue, acting, stepping = [], [], []
for _ in range(steps):
    if not queue:
        begun = time.perf_counter()
        observation = {"full_image": libero.get_libero_image(seen)}
        if len(model.cameras) > 1:
            observation["wrist_image"] = libero.get_libero_wrist_image(seen)
        turned = libero.quat2axisangle(seen["robot0_eef_quat"])
        arm = (seen["robot0_eef_pos"], turned, seen["robot0_gripper_qpos"])
        observation["state"] = np.concatenate(arm)
        actions = libero.get_action(cfg, model, observation, task.language)
        queue = list(actions) if isinstance(actions, list) else [actions]
        acting.append(time.perf_counter() - begun)
    action = libero.invert_gripper_action(libero.normalize_gripper_action(queue.pop(0)))
    assert action.shape == (7,) and np.isfinite(action).all() and abs(action[6]) == 1, action
    begun = time.perf_counter()
    seen, _, done, _ = env.step(action.tolist())
    stepping.append(time.perf_counter() - begun)
    if done:
        break
env.close()
model_ms, env_ms = (1e3 * statistics.median(seconds) for seconds in (acting, stepping))
versions = ", ".join(f"{name} {version(name)}" for name in ("hf-libero", "robosuite", "mujoco"))
print(
    f"  {versions}: {task.name}, {len(stepping)} steps, {len(acting)} asked of {Path(sys.argv[1]).name}; "
    f"medians: {model_ms:.1f} ms the model, {env_ms:.0f} ms the simulator"
)
