"""The package as its users meet it, on the repository's example models."""

import io
import json
import os
import pathlib
import pickle
import threading

import numpy as np
import openvla_gguf
import pytest
from openvla_gguf import Action, Chunk, InputError, OpenVLA, OpenVLAError
from PIL import Image

EXAMPLE = pathlib.Path(__file__).parents[2] / "example"
TASK = "put eggplant into pot"
# What openvla-run prints of the same file, picture and instruction.
TOKENS = [799, 545, 545, 799, 799, 799, 544]


@pytest.fixture(scope="module")
def policy():
    with OpenVLA(EXAMPLE / "tabletop.gguf", "tabletop", device="cpu") as policy:
        yield policy


@pytest.fixture(scope="module")
def oft():
    with OpenVLA(str(EXAMPLE / "tabletop-oft.gguf"), device="cpu", threads=1) as policy:
        yield policy


@pytest.fixture(scope="module")
def array():
    return np.asarray(Image.open(EXAMPLE / "tabletop.png").convert("RGB"))


def seen(name):
    return np.asarray(Image.open(EXAMPLE / name).convert("RGB"))


def state():
    return json.loads((EXAMPLE / "tabletop-state.json").read_text())


def test_every_kind_of_image_gives_the_same_motion(policy, array):
    path = EXAMPLE / "tabletop.png"
    with_alpha = Image.fromarray(array).convert("RGBA")
    wide = np.zeros((*array.shape[:2], 6), np.uint8)
    wide[:, :, ::2] = array
    for image in [
        array, np.asfortranarray(array), wide[:, :, ::2], path, str(path), path.read_bytes(), bytearray(path.read_bytes()),
        Image.open(path), with_alpha,
    ]:
        assert policy.act(image, TASK).tokens.tolist() == TOKENS


def test_an_action_has_what_the_program_prints(policy, array):
    action = policy.act(array, TASK)
    assert isinstance(action, Action)
    assert (action.action.dtype, action.action.shape) == (np.float64, (7,))
    assert action.tokens.dtype == np.int64
    assert action.unnorm_key == "tabletop"
    assert action.unconstrained == {"tokens": TOKENS, "all_actions": True}
    assert action.timing_ms["total"] > 0
    np.testing.assert_array_equal(policy.predict_action(image=array, instruction=TASK, unnorm_key="tabletop"), action.action)
    assert repr(action).startswith("Action([")
    action.action[0] = 1.0  # it is the caller's


def test_openvla_oft_gives_a_chunk(oft):
    front, wrist = seen("tabletop.png"), seen("tabletop-wrist.png")
    assert (oft.chunk, oft.cameras, oft.state_length) == (8, ["full_image", "wrist_image"], 8)
    chunk = oft.act(front, TASK, wrist=[wrist], state=state())
    assert isinstance(chunk, Chunk)
    assert chunk.actions.shape == chunk.normalized.shape == (8, 7)
    assert chunk.tokens is None
    by_name = oft.act({"wrist_image": wrist, "full_image": front}, TASK, state=np.array(state()))
    np.testing.assert_array_equal(by_name.actions, chunk.actions)
    np.testing.assert_array_equal(oft.predict_action(front, TASK, wrist=[wrist], state=state()), chunk.actions)
    swapped = oft.act({"wrist_image": front, "full_image": wrist}, TASK, state=state())
    assert np.abs(swapped.actions - chunk.actions).max() > 1e-3
    for wrong, words in [
        (lambda: oft.act(front, TASK, state=state()), "there are 1 pictures; the model has 2 cameras"),
        (lambda: oft.act(front, TASK, wrist=[wrist]), "the arm's state of 8 numbers is missing"),
        (lambda: oft.act(front, TASK, wrist=[wrist], state=[0.0]), "has 1 numbers, not 8"),
        (lambda: oft.act(front, TASK, wrist=[wrist], state=[float("nan")] * 8), "is NaN"),
        (lambda: oft.act({"full_image": front}, TASK, state=state()), "nothing of the camera `wrist_image`"),
        (lambda: oft.act({"full": front}, TASK, state=state()), "no camera `full`"),
    ]:
        with pytest.raises(InputError, match=words):
            wrong()
    with pytest.raises(OpenVLAError, match="nothing to draft"):
        OpenVLA(EXAMPLE / "tabletop-oft.gguf", draft="auto")


def test_sessions_draft_and_give_the_same_tokens(array):
    with OpenVLA(EXAMPLE / "tabletop.gguf", draft="auto") as policy, policy.session("arm-1") as arm:
        assert arm.name == "arm-1"
        for _ in range(3):
            assert arm.act(array, TASK).tokens.tolist() == TOKENS


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((8, 8, 3), np.float32), "float32.*astype"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((3, 8, 8), np.uint8), "transpose"),
        (np.zeros((8, 8, 4), np.uint8), r"\[:, :, :3\]"),
        (np.zeros((8, 8), np.uint8), "repeat"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"image\[0\]"),
        (np.zeros((0, 8, 3), np.uint8), "empty|0"),
        (np.zeros((), np.uint8), "not an image"),
        (Image.new("F", (8, 8)), "mode F"),
        (Image.new("I;16", (8, 8)), "mode I;16"),
        (b"not a picture", "image"),
        (b"", "image"),
    ],
)
def test_what_is_no_picture_is_refused(policy, image, words):
    with pytest.raises(InputError, match=words) as caught:
        policy.act(image, TASK)
    assert isinstance(caught.value, ValueError)


def test_what_is_no_image_at_all_is_a_type_error(policy):
    for image in [None, 3, [1, 2], object(), io.BytesIO(b"")]:
        with pytest.raises(TypeError, match="image"):
            policy.act(image, TASK)
    with pytest.raises(TypeError):
        policy.act(np.zeros((8, 8, 3), np.uint8), 3)
    with pytest.raises(FileNotFoundError, match="no-such.png"):
        policy.act("no-such.png", TASK)
    with pytest.raises(InputError, match="OpenVLA-OFT"):
        policy.act(np.zeros((8, 8, 3), np.uint8), TASK, state=[0.0])


def test_errors_carry_their_hint(policy, array):
    with pytest.raises(InputError, match="no statistics named `bridge`") as caught:
        policy.act(array, TASK, unnorm_key="bridge")
    assert caught.value.hint == "this model has: tabletop"
    with pytest.raises(InputError, match="too long"):
        policy.act(array, "again and " * 5000)
    with pytest.raises(FileNotFoundError, match="none.gguf"):
        OpenVLA("none.gguf")
    with pytest.raises(OpenVLAError):
        OpenVLA(EXAMPLE / "tabletop.png")
    with pytest.raises(InputError, match="tabletop"):
        OpenVLA(EXAMPLE / "tabletop.gguf", "other")
    with pytest.raises(InputError, match="device"):
        OpenVLA(EXAMPLE / "tabletop.gguf", device="cuda:x")
    with pytest.raises(OpenVLAError, match="no device `cuda`"):
        OpenVLA(EXAMPLE / "tabletop.gguf", device="cuda")
    with pytest.raises(InputError, match="threads"):
        OpenVLA(EXAMPLE / "tabletop.gguf", threads=0)
    with pytest.raises(OverflowError):
        OpenVLA(EXAMPLE / "tabletop.gguf", threads=-1)


def test_a_closed_policy_says_so(array):
    policy = OpenVLA(EXAMPLE / "tabletop.gguf")
    arm = policy.session()
    policy.close()
    policy.close()
    for act in [policy.act, arm.act]:
        with pytest.raises(OpenVLAError, match="closed"):
            act(array, TASK)
    assert policy.unnorm_keys == ["tabletop"]


def test_threads_take_turns_and_the_interpreter_goes_on(policy, array):
    results, turns = [], []
    threads = [threading.Thread(target=lambda: results.append(policy.act(array, TASK).tokens.tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        turns.append(1)
    for thread in threads:
        thread.join()
    assert results == [TOKENS] * 4
    assert len(turns) > 10


def test_a_child_that_was_forked_is_told_to_open_its_own(policy, array):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            policy.act(array, TASK)
        except OpenVLAError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"opened by another process" in os.read(read, 1000)


def test_it_is_not_pickled(policy):
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(policy)


def test_the_version_is_the_crate_s():
    manifest = (EXAMPLE.parent / "Cargo.toml").read_text()
    assert f'version = "{openvla_gguf.__version__}"' in manifest
