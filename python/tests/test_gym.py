"""The table as gymnasium's users meet it."""

import warnings

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

import openvla_gguf.gym  # noqa: E402
from gymnasium.utils.env_checker import check_env  # noqa: E402
from openvla_gguf import Tabletop  # noqa: E402


def test_gymnasium_finds_nothing_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized.*")  # meters are not
        check_env(gymnasium.make("openvla/Tabletop-v0", size=64, render_mode="rgb_array").unwrapped)


def test_a_seed_is_the_tables():
    env = gymnasium.make("openvla/Tabletop-v0", suite="language", size=64)
    observation, info = env.reset(seed=137)
    image, instruction = Tabletop("language", size=64).reset(137)
    assert np.array_equal(observation["image"], image)
    assert observation["instruction"] == info["instruction"] == instruction


def test_an_episode_ends_at_success_or_is_cut_off():
    env = gymnasium.make("openvla/Tabletop-v0", size=64)
    env.reset(seed=3)
    done = False
    while not done:
        _, reward, done, truncated, info = env.step(env.unwrapped.table.expert())
        assert not truncated
    assert reward == 1.0 and info["is_success"]
    env.reset(seed=3)
    steps = 0
    while not truncated:
        _, reward, done, truncated, _ = env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
        assert not done and reward == 0.0
        steps += 1
    assert steps == openvla_gguf.gym.STEPS


def test_whatever_is_done_observations_are_in_their_space():
    env = gymnasium.make("openvla/Tabletop-v0", size=16)
    env.action_space.seed(0)
    for seed in range(20):
        env.reset(seed=seed)
        over = False
        while not over:
            observation, _, done, truncated, _ = env.step(env.action_space.sample())
            assert observation in env.observation_space
            over = done or truncated
