"""The table, from Python."""

import pathlib

import numpy as np
import pytest
from openvla_gguf import InputError, OpenVLA, Tabletop
from PIL import Image

EXAMPLE = pathlib.Path(__file__).parents[2] / "example"


def test_a_scene_is_that_of_its_seed():
    # `tabletop play --suite language --seed 137 --size 240 --picture example/tabletop.png`, by example/run
    table = Tabletop("language", size=240)
    image, instruction = table.reset(137)
    assert instruction == "put eggplant into pot"
    assert np.array_equal(image, np.asarray(Image.open(EXAMPLE / "tabletop.png").convert("RGB")))
    assert np.array_equal(table.wrist_image, np.asarray(Image.open(EXAMPLE / "tabletop-wrist.png").convert("RGB")))
    assert table.state.shape == (8,) and not table.done


def test_the_expert_succeeds_and_who_does_nothing_does_not():
    table = Tabletop()
    table.reset(3)
    rewards = []
    while not table.done and len(rewards) < 40:
        image, reward, done = table.step(table.expert())
        rewards.append(reward)
    assert done and rewards == [0.0] * (len(rewards) - 1) + [1.0] and image.shape == (224, 224, 3)
    before, _ = table.reset(3)
    after, reward, done = table.step([0, 0, 0, 0, 0, 0, 1])
    assert np.array_equal(before, after) and (reward, done) == (0.0, False)


def test_the_example_acts_on_it():
    table = Tabletop("language", size=240)
    with OpenVLA(EXAMPLE / "tabletop.gguf", "tabletop", device="cpu") as policy:
        image, instruction = table.reset(137)
        for _ in range(40):
            image, _, done = table.step(policy.act(image, instruction).action)
            if done:
                break
    assert done, "example/tabletop.gif shows it"


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda: Tabletop("kitchen"), "base, visual"),
        (lambda: Tabletop(size=8), "16 to 2048"),
        (lambda: Tabletop().step([0.0] * 6), "seven are wanted"),
        (lambda: Tabletop().step([0.0, float("nan"), 0, 0, 0, 0, 0]), r"action\[1\] is NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, word):
    with pytest.raises(InputError, match=word):
        wrong()
    with pytest.raises(OverflowError):
        Tabletop().reset(-1)
