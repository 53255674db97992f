"""What SimplerEnv and LIBERO make of a motion: numbers from their published definitions, computed another way."""

import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from openvla_gguf import OpenVLA, Tabletop, libero
from openvla_gguf.simpler import OpenVLAInference, euler_to_axis_angle

EXAMPLE = pathlib.Path(__file__).parents[2] / "example"
TASK = "put eggplant into pot"


@pytest.fixture(scope="module")
def policy():
    with OpenVLA(EXAMPLE / "tabletop.gguf", "tabletop", device="cpu") as policy:
        yield policy


@pytest.fixture
def image():
    return Tabletop("language", size=240).reset(137)[0]


def rotation(axis, angle):
    """The matrix of a rotation about one axis."""
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def about(axis_angle):
    """That about any axis, by Rodrigues' formula."""
    angle = np.linalg.norm(axis_angle)
    if angle == 0:
        return np.eye(3)
    x, y, z = axis_angle / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_rotations_are_about_fixed_axes_roll_first():
    assert np.array_equal(euler_to_axis_angle([0, 0, 0]), [0, 0, 0])
    assert np.allclose(euler_to_axis_angle([0, 0, 0.25]), [0, 0, 0.25], atol=1e-15)
    assert np.allclose(euler_to_axis_angle([np.pi / 2, 0, np.pi / 2]), np.array([1, 1, 1]) / np.sqrt(3) * 2 * np.pi / 3)
    for angles in np.random.default_rng(0).uniform(-1.5, 1.5, (200, 3)):
        roll, pitch, yaw = angles
        wanted = rotation(2, yaw) @ rotation(1, pitch) @ rotation(0, roll)
        assert np.allclose(about(euler_to_axis_angle(angles)), wanted, atol=1e-12)


def test_the_widowx_opens_above_a_half(policy):
    model = OpenVLAInference(policy, "tabletop", "widowx_bridge", action_scale=2.0)
    for opened, gripper in [(0.0, -1.0), (0.5, -1.0), (0.50001, 1.0), (0.99608, 1.0)]:
        raw, action = model.convert(np.array([0.01, 0.02, -0.03, 0, 0, 0.1, opened]))
        assert raw["open_gripper"].tolist() == [opened] and action["gripper"].tolist() == [gripper]
        assert np.allclose(action["world_vector"], [0.02, 0.04, -0.06])
        assert np.allclose(action["rot_axangle"], [0, 0, 0.2])
        assert action["terminate_episode"].tolist() == [0.0]


def test_the_google_robot_repeats_a_change_fifteen_times(policy):
    model = OpenVLAInference(policy, "tabletop", "google_robot")

    def grippers(opened):
        return [model.convert(np.array([0, 0, 0, 0, 0, 0, x]))[1]["gripper"].item() for x in opened]

    # Closes: 1 -> 0 is a change of 1, held for 15 steps whatever comes meanwhile; then changes are as they are.
    assert grippers([1.0, 1.0, 0.0]) == [0.0, 0.0, 1.0]
    assert grippers([1.0] + [0.0] * 13) == [1.0] * 14
    assert np.allclose(grippers([0.25, 0.0]), [-0.25, 0.25])
    assert grippers([1.0] + [1.0] * 14 + [1.0]) == [-1.0] * 15 + [0.0]
    model.reset(TASK)
    assert grippers([0.0]) == [0.0]


def test_a_step_is_the_models_motion(policy, image):
    model = OpenVLAInference(policy, "tabletop")
    raw, action = model.step(image, TASK)
    motion = policy.act(image, TASK).action
    assert np.array_equal(np.concatenate(list(raw.values())), motion)
    assert np.allclose(action["rot_axangle"], euler_to_axis_angle(motion[3:6]))
    again, _ = model.step(image)
    assert np.array_equal(again["world_vector"], raw["world_vector"])
    with pytest.raises(ValueError, match="task_description"):
        OpenVLAInference(policy, "tabletop").step(image)
    with pytest.raises(NotImplementedError, match="google_robot"):
        OpenVLAInference(policy, policy_setup="panda")
    assert OpenVLAInference(policy, policy_setup="google_robot").unnorm_key == "fractal20220817_data"


def test_liberos_gripper_is_the_other_way_round():
    action = np.array([0.1, 0, 0, 0, 0, 0, 0.75])
    assert libero.normalize_gripper_action(action, binarize=False)[-1] == 0.5
    for opened, closed in [(0.0, 1.0), (0.2, 1.0), (0.5, 0.0), (0.75, -1.0), (1.0, -1.0)]:
        action[-1] = opened
        turned = libero.invert_gripper_action(libero.normalize_gripper_action(action))
        assert turned[-1] == closed and turned[:6].tolist() == [0.1, 0, 0, 0, 0, 0] and action[-1] == opened
    chunk = np.tile(action, (8, 1))
    assert libero.invert_gripper_action(libero.normalize_gripper_action(chunk))[:, -1].tolist() == [-1.0] * 8


def test_liberos_pictures_are_turned_by_half_a_turn():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    turned = libero.get_libero_image({"agentview_image": picture})
    assert turned.flags.c_contiguous and np.array_equal(turned[0, 0], picture[1, 2])
    assert np.array_equal(libero.get_libero_wrist_image({"robot0_eye_in_hand_image": turned}), picture)


def test_liberos_quaternions_keep_their_sign():
    half = np.sqrt(0.5)
    assert np.allclose(libero.quat2axisangle(np.array([0, 0, half, half])), [0, 0, np.pi / 2])
    assert np.allclose(libero.quat2axisangle(np.array([0, 0, -half, -half])), [0, 0, -3 * np.pi / 2])
    assert np.array_equal(libero.quat2axisangle(np.array([0, 0, 0, 1.0])), [0, 0, 0])


def test_liberos_scripts_get_an_action_or_a_list(policy, image):
    cfg = SimpleNamespace(model_family="openvla", unnorm_key="tabletop", num_open_loop_steps=8)
    action = libero.get_action(cfg, policy, {"full_image": image, "state": np.zeros(8)}, TASK.capitalize(), processor=None)
    assert np.array_equal(action, policy.act(image, TASK).action)
    table = Tabletop("language", size=240)
    table.reset(137)
    state = np.array(json.loads((EXAMPLE / "tabletop-state.json").read_text()))
    with OpenVLA(EXAMPLE / "tabletop-oft.gguf", device="cpu") as oft:
        obs = {"full_image": image, "wrist_image": table.wrist_image, "state": state, "task_description": TASK}
        chunk = libero.get_vla_action(SimpleNamespace(), oft, None, obs, TASK, None, use_film=False)
        wanted = oft.act(image, TASK, wrist=[table.wrist_image], state=state).actions
        assert isinstance(chunk, list) and np.array_equal(chunk, wanted)
