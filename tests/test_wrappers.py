"""Wrappers: each reward is the score of the right frame, in every auto-reset mode; bad input is refused."""

import functools
import multiprocessing
import os
import signal
from contextlib import closing

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import CloudpickleWrapper

from tests.clock import Clock, ClockReader, by_episode, clocks, singles, three_views
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.envs import make_env
from vlm_reward.reward_model import RewardModel
from vlm_reward.transforms import RunningNorm, chain, difference, mix, potential, raw
from vlm_reward.wrappers import (
    CaptureFrames,
    CaptureSettings,
    VLMRewardWrapper,
    VLMVectorRewardWrapper,
)

# One environment


def test_reward_is_the_score_of_the_frame_after_the_step_and_reset_scores_the_first():
    env = VLMRewardWrapper(Clock(1), ClockReader(), "0")
    _, info = env.reset()
    assert info["score"] == pytest.approx(1.0)
    assert info["instruction"] == "0"
    assert "env_reward" not in info
    _, reward, _, _, info = env.step(np.zeros(1, np.float32))
    assert type(reward) is float
    assert reward == info["score"] == pytest.approx(1.01)
    assert info["env_reward"] == 10
    assert info["reward_per_view"].shape == (1,)
    assert "frames" not in info
    env.reset()
    *_, info = env.step(np.zeros(1, np.float32))
    assert info["score"] == pytest.approx(1.11)


def test_views_are_scored_apart_and_averaged_and_frames_kept_on_request():
    def two_views(env):
        frame = env.unwrapped.render()
        other = frame.copy()
        other[0, 0, 0] = 5
        return np.stack([frame, other])

    env = VLMRewardWrapper(
        Clock(1, render_mode=None), ClockReader(), "0", frames_fn=two_views, keep_frames=True
    )
    _, info = env.reset()
    np.testing.assert_allclose(info["reward_per_view"], [1, 5])
    assert info["score"] == pytest.approx(3)
    first = info["frames"]
    assert (first.shape, first.dtype) == ((2, 4, 4, 3), np.uint8)
    *_, info = env.step(np.zeros(1, np.float32))
    np.testing.assert_array_equal(first[0, 0, 0], [1, 0, 0])  # a copy: the next step leaves it
    np.testing.assert_array_equal(info["frames"][1, 0, 0], [5, 0, 1])


@pytest.mark.parametrize(("over_views", "expected"), [("mean", 14.0), ("median", 2.0)])
def test_the_median_of_the_views_is_none_that_stands_alone(over_views, expected):
    views: dict = {"frames_fn": three_views, "over_views": over_views}
    env = VLMRewardWrapper(Clock(1, render_mode=None), ClockReader(), "0", **views)
    _, info = env.reset()
    np.testing.assert_allclose(info["reward_per_view"], [1, 2, 39])
    assert info["score"] == pytest.approx(expected)
    assert env.step(np.zeros(1, np.float32))[1] == pytest.approx(expected + 0.01)
    envs = VLMVectorRewardWrapper.from_env_fns(
        [lambda: Clock(1, render_mode=None)], ClockReader(), "0", processes=False, **views
    )
    assert envs.reset()[1]["score"][0] == pytest.approx(expected)


def test_transforms_see_the_previous_score_of_the_same_episode_and_the_ends():
    transform = chain(potential(0.5), mix(env_weight=1.0))
    for terminates, last in ((True, -0.01 + 20), (False, 0.5 * 0.02 - 0.01 + 20)):
        env = VLMRewardWrapper(Clock(0, 2, terminates=terminates), ClockReader(), "0", transform=transform)
        env.reset()
        first = env.step(np.zeros(1, np.float32))[1]
        assert first == pytest.approx(0.5 * 0.01 - 0 + 10)
        assert env.step(np.zeros(1, np.float32))[1] == pytest.approx(last)
        env.reset()
        assert env.step(np.zeros(1, np.float32))[1] == pytest.approx(0.5 * 0.11 - 0.1 + 10)


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("hold", [0, 0, 0.03, 0.03, 0.03, 0.06, 0.06, 0.08]),
        ("interpolate", [0, 0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.08]),
    ],
)
def test_score_every_third_step_and_the_last(between, expected):
    clock = Clock(0, 8)
    env = VLMRewardWrapper(clock, ClockReader(), "0", score_every=3, between=between, keep_frames=True)
    env.reset()
    steps = [env.step(np.zeros(1, np.float32)) for _ in range(8)]
    np.testing.assert_allclose([step[1] for step in steps], expected, atol=1e-6)
    assert clock.renders == 1 + 3
    assert ["frames" in step[4] for step in steps] == [False, False, True, False, False, True, False, True]
    _, info = env.reset()
    assert info["score"] == pytest.approx(0.1)
    assert env.step(np.zeros(1, np.float32))[1] == pytest.approx(0.1)  # no pace left from the episode before


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version.*")
@pytest.mark.filterwarnings("ignore:.*Not able to test alternative render modes.*")
def test_a_wrapped_clock_passes_gymnasiums_checker():
    check_env(VLMRewardWrapper(Clock(0, 100), ClockReader(), "0", keep_frames=True))


# Many environments


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    "options",
    [
        {"transform": raw},
        {"transform": difference, "score_every": 2},
        {"transform": chain(potential(0.9), mix(env_weight=0.1)), "score_every": 3, "between": "interpolate"},
    ],
    ids=["raw", "difference held", "potential interpolated"],
)
def test_vector_rewards_are_those_of_single_environments_in_every_autoreset_mode(mode, options):
    """Episode, step and sentence are in each score: any frame of another episode would show."""
    count, steps = 3, 14
    options = {"instruction": by_episode, "keep_frames": True, **options}
    envs = VLMVectorRewardWrapper.from_env_fns(
        clocks(count), ClockReader(), processes=False, autoreset_mode=mode, **options
    )
    expected = [iter(log) for log in singles(count, 2 * steps, **options)]
    actions = np.zeros((count, 1), np.float32)
    _, infos = envs.reset()
    for i in range(count):
        check_info(infos, i, next(expected[i])[1])
    for _ in range(steps):
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        ended = terminated | truncated
        for i in range(count):
            reward, info = next(expected[i])
            if reward is None:  # the reset that NEXT_STEP makes instead of a step
                assert mode == AutoresetMode.NEXT_STEP
                assert rewards[i] == 0
                check_info(infos, i, info)
                continue
            assert rewards[i] == pytest.approx(reward, abs=1e-5)
            assert infos["env_reward"][i] == info["env_reward"]
            if ended[i] and mode == AutoresetMode.SAME_STEP:
                check_info(infos["final_info"], i, info)
                assert infos["final_info"]["frames"][i, 0, 0, 0, 1] == infos["final_obs"][i][1]
                info = next(expected[i])[1]
            check_info(infos, i, info)
            if "frames" in info:
                np.testing.assert_array_equal(infos["frames"][i, 0, 0, 0], observations[i])
        if ended.any() and mode == AutoresetMode.DISABLED:
            _, infos = envs.reset(options={"reset_mask": ended})
            for i in np.flatnonzero(ended):
                check_info(infos, i, next(expected[i])[1])
            np.testing.assert_array_equal(infos["_score"], ended)
    envs.close()


def check_info(infos, i, info):
    assert infos["score"][i] == pytest.approx(info["score"], abs=1e-5)
    assert infos["_score"][i]
    np.testing.assert_allclose(infos["reward_per_view"][i], info["reward_per_view"], atol=1e-5)


def test_all_environments_are_scored_in_one_call():
    model = ClockReader()
    envs = VLMVectorRewardWrapper.from_env_fns(
        clocks(2), model, "0", processes=False, autoreset_mode=AutoresetMode.SAME_STEP
    )
    envs.reset()
    for _ in range(3):
        envs.step(np.zeros((2, 1), np.float32))
    # The first ends after two steps: its last frame and its next first one go together.
    assert model.batches == [2, 2, 3, 3]


def test_normalisation_sees_steps_alone_not_resets():
    norm = RunningNorm()
    envs = VLMVectorRewardWrapper.from_env_fns(
        clocks(2), ClockReader(), "0", processes=False, transform=chain(raw, norm)
    )
    envs.reset()
    for _ in range(3):
        envs.step(np.zeros((2, 1), np.float32))
    assert norm.stats.count == 5  # the third call resets the first environment


def test_spawned_workers_give_the_same_and_their_death_is_an_error():
    def run(envs) -> list[np.ndarray]:
        envs.reset()
        return [envs.step(np.zeros((2, 1), np.float32))[1] for _ in range(6)]

    options = {"instruction": by_episode, "autoreset_mode": AutoresetMode.SAME_STEP}
    here = VLMVectorRewardWrapper.from_env_fns(clocks(2), ClockReader(), processes=False, **options)
    there = VLMVectorRewardWrapper.from_env_fns(clocks(2), ClockReader(), **options)
    np.testing.assert_allclose(run(there), run(here), atol=1e-6)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("vlm-reward-")]
    workers = there.unwrapped.processes
    os.kill(workers[1].pid, signal.SIGKILL)
    workers[1].join()
    with pytest.raises(RuntimeError, match=r"worker 1 \(killed by SIGKILL\) died"):
        run(there)
    assert not any(worker.is_alive() for worker in workers)
    there.close()


# Bad input


@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_nan_from_the_environment_is_an_error_that_names_it(fault):
    env = VLMRewardWrapper(Clock(fault=fault), ClockReader(), "0")
    env.reset()
    env.step(np.zeros(1, np.float32))
    with pytest.raises(
        ValueError, match="environment 0 gave NaN in its observation, or a reward that is not"
    ):
        env.step(np.zeros(1, np.float32))
    envs = VLMVectorRewardWrapper.from_env_fns(
        [Clock, functools.partial(Clock, fault=fault)], ClockReader(), "0", processes=False
    )
    envs.reset()
    envs.step(np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match="environment 1 gave NaN"):
        envs.step(np.zeros((2, 1), np.float32))


def test_a_transform_that_gives_nan_is_an_error():
    env = VLMRewardWrapper(Clock(), ClockReader(), "0", transform=lambda step: step.score * np.nan)
    env.reset()
    with pytest.raises(FloatingPointError, match="the reward transform gave NaN"):
        env.step(np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("env", "options", "error", "match"),
    [
        ({}, {}, ValueError, "not a Meta-World task with a known sentence: give an instruction"),
        ({}, {"instruction": ""}, ValueError, "the text is empty"),
        ({}, {"instruction": 3}, TypeError, "instruction must be a string or a function .*, got 3"),
        ({"render_mode": None}, {}, ValueError, "gives no frames: make it with render_mode='rgb_array'"),
        ({}, {"cameras": ("corner",)}, TypeError, "needs a MuJoCo environment"),
        ({}, {"cameras": "corner", "frames_fn": gym.Env.render}, ValueError, "give cameras or frames_fn"),
        ({}, {"score_every": 0}, ValueError, "score_every must be an integer of at least 1, got 0"),
        ({}, {"between": "spline"}, ValueError, r"between must be one of .*, got 'spline'"),
        ({}, {"over_views": "mode"}, ValueError, r"over_views must be one of .*, got 'mode'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(env, options, error, match):
    if match[:3] != "not":
        options = {"instruction": "0", **options}
    with pytest.raises(error, match=match):
        VLMRewardWrapper(Clock(**env), ClockReader(), **options)
    with pytest.raises(error, match=match):
        VLMVectorRewardWrapper.from_env_fns(
            [functools.partial(Clock, **env)], ClockReader(), processes=False, **options
        )


def test_a_name_in_place_of_a_model_or_of_cameras_says_what_to_give():
    with pytest.raises(TypeError, match=r"RewardModel\.from_pretrained\('siglip2-tiny'\)"):
        VLMRewardWrapper(Clock(), "siglip2-tiny", "0")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"a tuple of names, such as \('track',\)"):
        CameraSpec("track")  # pyright: ignore[reportArgumentType]


def test_a_mujoco_environment_without_cameras_is_seen_by_its_render(tiny_backbone_dir):
    model = RewardModel.from_pretrained(tiny_backbone_dir)
    with closing(gym.make("Reacher-v5", render_mode="rgb_array", width=48, height=40)) as plain:
        env = VLMRewardWrapper(plain, model, "reach for the red ball")
        env.reset(seed=0)
        reward = env.step(env.action_space.sample())[1]
        own = model.score(plain.render()[None, None], "reach for the red ball")
    assert reward == pytest.approx(own.item(), abs=1e-6)
    with pytest.raises(ValueError, match="gives no frames: make it with render_mode='rgb_array'"):
        VLMRewardWrapper(gym.make("Reacher-v5"), model, "reach for the red ball")


def test_bad_frames_and_instructions_are_refused_at_the_first_reset():
    def reset(**options):
        VLMRewardWrapper(Clock(), ClockReader(), **{"instruction": "0", **options}).reset()

    with pytest.raises(ValueError, match=r"frames_fn must give uint8 .*, got float64 \(4, 4, 3\)"):
        reset(frames_fn=lambda env: np.zeros((4, 4, 3)))
    with pytest.raises(TypeError, match="the instruction function must return a string, got 7"):
        reset(instruction=lambda env: 7)
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) first"):
        VLMRewardWrapper(Clock(), ClockReader(), "0").env.frame_shape()


def test_vector_environments_without_capture_are_refused():
    with pytest.raises(TypeError, match=r"must be wrapped in CaptureFrames: use .*from_env_fns"):
        VLMVectorRewardWrapper(SyncVectorEnv([Clock]), ClockReader(), "0")


def test_frames_must_have_one_shape():
    def small(env):
        return env.unwrapped.render()[: 4 - env.unwrapped.which]

    envs = VLMVectorRewardWrapper.from_env_fns(
        clocks(2), ClockReader(), "0", processes=False, frames_fn=small
    )
    with pytest.raises(ValueError, match=r"one shape, got \[\(1, 4, 4, 3\), \(1, 3, 4, 3\)\]"):
        envs.reset()


def open_in_worker(pipe) -> None:
    settings = CaptureSettings("0", None, CameraSpec(), None, 1)
    pipe.send(str(CaptureFrames(Clock()).open_capture(CloudpickleWrapper(settings))))


def test_a_forked_worker_is_refused():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=open_in_worker, args=(theirs,))
    worker.start()
    assert ours.poll(20)
    assert "this worker was forked" in ours.recv()
    worker.join()


# MuJoCo and a real model


@pytest.fixture
def model(tiny_adapter_dir):
    import torch

    from vlm_reward.reward_model import RewardModel

    return RewardModel.from_pretrained(tiny_adapter_dir, dtype=torch.float32)


def test_meta_world_is_scored_by_the_models_cameras_and_the_tasks_sentence(model):
    env = VLMRewardWrapper(make_env("drawer-open-v3", seed=0), model)
    _, info = env.reset(seed=0)
    assert info["instruction"] == "open the green drawer"
    with CameraRig(env, model.camera_spec) as rig:
        for _ in range(2):
            _, reward, _, _, info = env.step(np.ones(4, np.float32))
            scores = model.score(rig.render()[None], "open the green drawer")[0]
            np.testing.assert_allclose(info["reward_per_view"], scores, atol=1e-6)
            assert reward == pytest.approx(scores.mean(), abs=1e-6)
    env.close()


def test_vector_meta_world_equals_single(model):
    fns = [functools.partial(make_env, "drawer-open-v3", seed, max_episode_steps=2) for seed in range(2)]
    options = {"transform": difference}
    envs = VLMVectorRewardWrapper.from_env_fns(fns, model, processes=False, **options)
    envs.reset()
    rewards = np.array([envs.step(np.ones((2, 4), np.float32))[1] for _ in range(2)])
    envs.close()
    for i, make in enumerate(fns):
        env = VLMRewardWrapper(make(), model, **options)
        env.reset()
        alone = [env.step(np.ones(4, np.float32))[1] for _ in range(2)]
        np.testing.assert_allclose(rewards[:, i], alone, atol=1e-5)
        env.close()


@pytest.mark.filterwarnings("ignore:.*not within the observation space.*")
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.* value is -?infinity.*")
@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version.*")
@pytest.mark.filterwarnings("ignore:.*Not able to test alternative render modes.*")
def test_wrapped_meta_world_passes_gymnasiums_checker(model):
    env = VLMRewardWrapper(make_env("drawer-open-v3", seed=0), model)
    check_env(env, skip_render_check=True)
    env.close()


def test_gym_make(tiny_adapter_dir):
    assert sum(name.startswith("vlm-reward/") for name in gym.registry) == 50  # by importing the module
    env = gym.make(
        "vlm_reward.wrappers:vlm-reward/drawer-open-v3",
        model=str(tiny_adapter_dir),
        seed=0,
        transform=difference,
    )
    observation, info = env.reset(seed=0)
    assert observation.shape == (39,)
    assert info["instruction"] == "open the green drawer"
    _, reward, _, _, after = env.step(np.zeros(4, np.float32))
    assert reward == pytest.approx(after["score"] - info["score"], abs=1e-6)
    env.close()
    processes = gym.make_vec(
        "vlm-reward/drawer-open-v3",
        num_envs=1,
        vectorization_mode="async",
        vector_kwargs={"context": "spawn"},
        model=str(tiny_adapter_dir),
    )
    processes.reset(seed=0)
    processes.close()
    with pytest.raises(ValueError, match="render_mode must be 'rgb_array', got 'human'"):
        gym.make("vlm-reward/drawer-open-v3", model=str(tiny_adapter_dir), render_mode="human")


def test_frames_unlike_the_checkpoints_are_refused(model):
    env = make_env("reach-v3")
    for cameras in (("corner",), CameraSpec(("corner", "corner3"), 64, 64)):
        with pytest.raises(ValueError, match="the model was trained on other frames"):
            VLMRewardWrapper(env, model, cameras=cameras)
    full = CameraSpec(("corner", "corner3"), 32, 32, profile="full")
    with pytest.raises(ValueError, match="profile: fast against full"):
        VLMRewardWrapper(env, model, cameras=full)
    with pytest.raises(ValueError, match=r"too long|truncat|tokens"):
        VLMRewardWrapper(env, model, "press the button " * 20)
    with pytest.raises(ValueError, match=r"trained on frames \(2, 32, 32, 3\) .*gives \(1, 4, 4, 3\)"):
        VLMRewardWrapper(Clock(), model, "press the button").reset()
    model.camera_spec = None
    with pytest.raises(ValueError, match="no camera named nowhere"):
        VLMRewardWrapper(env, model, cameras=("nowhere",))
    env.close()


def test_without_a_renderer_the_error_says_what_to_install(model, monkeypatch):
    def broken(*_):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(RuntimeError, match=r"MuJoCo cannot render .*apt-get install"):
        VLMRewardWrapper(make_env("reach-v3"), model)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_each_score_is_against_the_first_frame_of_its_own_episode(mode):
    """Which environment and which episode cancel: what is left is the step, in every auto-reset mode."""
    count = 3
    envs = VLMVectorRewardWrapper.from_env_fns(
        clocks(count), ClockReader(start_weight=1.0), "0", processes=False, autoreset_mode=mode
    )
    observations, infos = envs.reset()
    np.testing.assert_allclose(infos["score"], 0, atol=1e-6)
    ends = 0
    for _ in range(14):
        observations, rewards, terminated, truncated, infos = envs.step(np.zeros((count, 1), np.float32))
        ended = terminated | truncated
        ends += ended.sum()
        for i in range(count):
            same = ended[i] and mode == AutoresetMode.SAME_STEP
            after = infos["final_obs"][i] if same else observations[i]
            assert rewards[i] == pytest.approx(after[2] / 100, abs=1e-5)
            assert infos["score"][i] == pytest.approx(observations[i][2] / 100, abs=1e-5)
        if ended.any() and mode == AutoresetMode.DISABLED:
            envs.reset(options={"reset_mask": ended})
    assert ends > count
    envs.close()


def test_a_real_model_scores_against_the_first_frame_in_the_wrapper(tiny_adapter_dir):
    from vlm_reward.reward_model import RewardModel

    model = RewardModel.from_pretrained(tiny_adapter_dir).with_start_weight(0.5)
    with_first = VLMRewardWrapper(make_env("drawer-open-v3", seed=0), model, keep_frames=True)
    _, info = with_first.reset(seed=0)
    first, text = info["frames"], info["instruction"]
    np.testing.assert_allclose(
        info["reward_per_view"], model.score(first[None], text, start=first)[0], atol=1e-6
    )
    for _ in range(3):
        *_, info = with_first.step(with_first.action_space.sample())
    by_hand = model.score(info["frames"][None], text, start=first)[0]
    np.testing.assert_allclose(info["reward_per_view"], by_hand, atol=1e-5)
    assert np.abs(by_hand - model.with_start_weight(0).score(info["frames"][None], text)[0]).max() > 0.01
    with_first.close()
