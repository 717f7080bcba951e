"""Agents: rewards, outcomes, what is saved and goes on, the alarm, relabelling. Networks of 8 units."""

import functools
import json
import math
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium.spaces import Box
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import evaluate, figures, loop, record, relabel
from agents.agent import act, load_agent, make_agent, save_agent
from agents.callbacks import EpisodeLog, read_lines, reward_hacking
from agents.config import AgentConfig
from agents.environments import AgentReward, make_task_env
from agents.replay import FrameStore, TracedReplayBuffer, load_transitions, open_frames
from agents.rewards import agent_reward, load_scorer, shaping
from agents.train import main, train, worth
from tests.clock import ClockReader
from tests.synthetic import write_dataset
from training import collect, scenes
from training.config import TrainConfig
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.datasets import open_dataset
from vlm_reward.sb3 import VLMRewardVecEnv

SMALL = {"net_width": 8, "net_layers": 1, "batch_size": 8, "eval_episodes": 2}
TINY = SMALL | {"learning_starts": 20}


class Door(gym.Env):
    """Five steps; the third succeeds, the later ones do not. Reward 0, 1, 2, ...; the frame tells the time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012
    observation_space = Box(-10, 10, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)
    render_mode = "rgb_array"
    time, episode = 0, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        observation = np.array([self.time, self.episode], np.float32)
        return observation, self.time - 1.0, False, self.time == 5, {"success": self.time == 3}

    def render(self):
        frame = np.zeros((4, 4, 3), np.uint8)
        frame[0, 0] = 0, self.episode, self.time
        return frame


def run_door(config, steps=6, frames=None):
    """Rewards, dones and infos of one door."""
    if config.scored_by:
        options = {"transform": shaping(config), "processes": False, "keep_frames": frames is not None}
        venv = VLMRewardVecEnv.from_env_fns([Door], ClockReader(), "0", **options)
    else:
        venv = DummyVecEnv([Door])
    door = AgentReward(venv, config, config.scored_by is not None, frames)
    door.reset()
    return [door.step(np.zeros((1, 1), np.float32))[1:] for _ in range(steps)]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "open-sesame"}, "open-sesame"),
        ({"timesteps": 0}, "timesteps must be at least 1, got 0"),
        ({"horizon": 501}, r"horizon must be in \[1, 500\]"),
        ({"reward": "x", "transform": "potential"}, "prefers no policy"),
        ({"reward": "x", "monitor": "y"}, "logged anyway"),
        ({"reward": "sparse", "add": "dense"}, "need a learned reward, not 'sparse'"),
        ({"keep_frames": True}, "keep_frames needs"),
        ({"algo": "ppo", "buffer": "x"}, "ppo forgets"),
        ({"learning_rate": -1.0}, r"learning_rate must be above 0, got -1\.0"),
        ({"gamma": 1.5}, r"gamma must be in \(0, 1\], got 1\.5"),
        ({"tau": 7.0}, r"tau must be in \(0, 1\]"),
        ({"clip_range": -1.0}, "clip_range must be above 0"),
        ({"algo": "ppo", "gradient_steps": 4, "tau": 0.01}, "tau, gradient_steps are settings of sac"),
        ({"epochs": 5}, "epochs are settings of ppo and mean nothing to sac"),
        ({"reward": "dense", "cameras": ("corner",)}, "need frames: a learned reward, or --monitor"),
        ({"reward": "sparse", "score_every": 3}, "need frames"),
        ({"reward": "sparse", "best_by": "learned"}, "needs a learned return"),
        ({"reward": "dense", "approach_weight": 0.5}, "approach_weight need frames"),
        ({"reward": "x", "reward_scale": -1.0}, r"must be finite and above 0, got -1\.0"),
        ({"reward": "x", "reward_scale": math.nan}, "must be finite"),
        ({"reward": "dense", "over_views": "median"}, "over_views, .* need frames"),
        ({"reward": "x", "add_weight": 0.1}, "give --add sparse or dense"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AgentConfig(**settings)


def test_settings_survive_json_and_name_the_run(tmp_path):
    config = AgentConfig(reward="siglip2-tiny/triplet", transform="difference", cameras=("corner",), seed=3)
    assert AgentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.reward_label == "siglip2-tiny/triplet, difference, corner"
    robust = replace(config, over_views="median", cameras=(), gamma=0.95)
    assert robust.reward_label == "siglip2-tiny/triplet, difference, median, gamma 0.95"
    fast = replace(config, envs=4, gradient_steps=2)
    assert fast.reward_label == "siglip2-tiny/triplet, difference, corner, 0.5 updates a step"
    assert replace(fast, gradient_steps=4).reward_label == config.reward_label
    assert (
        replace(config, reward_scale=10.0).reward_label
        == "siglip2-tiny/triplet, difference, scale 10, corner"
    )
    assert (
        str(config.folder) == "runs/agents/drawer-close-v3/siglip2-tiny-triplet-difference-corner/sac-seed3"
    )
    assert (config.setting("net_layers"), replace(config, net_layers=2).setting("net_layers")) == (3, 2)
    assert replace(config, algo="ppo").setting("normalize_obs") is True
    with pytest.raises(FileNotFoundError, match="no run in"):
        AgentConfig.of_run(tmp_path)


# Rewards and outcomes


def test_what_the_agent_sees():
    learned, own, success = np.array([0.5, -1.0]), np.array([7.0, 8.0]), np.array([True, False])
    see = functools.partial(agent_reward, learned=learned, env_reward=own, success=success)
    assert see(AgentConfig()).tolist() == [7, 8]
    assert see(AgentConfig(reward="sparse")).tolist() == [1, 0]
    assert see(AgentConfig(reward="x", reward_scale=10)).tolist() == [5, -10]
    assert see(AgentConfig(reward="x", add="sparse", add_weight=2)).tolist() == [2.5, -1]


def test_an_outcome_is_that_of_the_whole_episode():
    steps = run_door(AgentConfig(reward="sparse", horizon=5))
    assert [float(reward[0]) for reward, _, _ in steps] == [0, 0, 1, 0, 0, 0]
    assert [info[0]["is_success"] for _, _, info in steps] == [False, False, True, True, True, False]
    outcome = {"learned_return": None, "env_return": 10.0, "success": True, "length": 5}
    assert [info[0].get("outcome") for _, _, info in steps] == [None] * 4 + [outcome, None]


def test_the_learned_return_is_unscaled_and_a_monitor_changes_nothing():
    score = [0.01, 0.02, 0.03, 0.04, 0.05, 0.11]  # the last is the next episode's
    scaled = run_door(AgentConfig(reward="x", reward_scale=10))
    np.testing.assert_allclose([float(reward[0]) for reward, _, _ in scaled], np.array(score) * 10, rtol=1e-5)
    watched = run_door(AgentConfig(monitor="x"))
    assert [float(reward[0]) for reward, _, _ in watched] == [0, 1, 2, 3, 4, 0]
    for steps in (scaled, watched):
        outcome = steps[4][2][0]["outcome"]
        assert outcome["learned_return"] == pytest.approx(sum(score[:5]))
        assert outcome["env_return"] == 10


def test_frames_of_a_transition_are_of_one_episode(tmp_path):
    model: Any = SimpleNamespace(
        camera_spec=CameraSpec(("a",), 4, 4),
        crops=None,
        look=lambda frames: frames,
        image_size=4,
        encoder=SimpleNamespace(resample="bilinear"),
    )
    store = FrameStore(tmp_path, model)
    steps = run_door(AgentConfig(monitor="x", keep_frames=True), 6, store)
    store.close()
    frames, spec, crops = open_frames(tmp_path)
    assert spec.cameras == ("a",)
    assert crops is None
    rows = [info[0]["frame_rows"] for _, _, info in steps]
    seen = [tuple(frames[row, 0, 0, 0, 1:].tolist() for row in pair) for pair in rows]
    assert seen[0] == ([0, 0], [0, 1])
    assert seen[4] == ([0, 4], [0, 5])  # episode 0 ends with its own frame
    assert seen[5] == ([1, 0], [1, 1])
    assert len(frames) == 8
    assert "frames" not in steps[0][2][0]
    FrameStore(tmp_path, model, rows=3).close()
    assert len(open_frames(tmp_path)[0]) == 3


# Transitions and agents, saved and loaded


def test_a_full_buffer_is_saved_oldest_first_and_fits_another_number_of_environments(tmp_path):
    spaces = Box(-9, 9, (2,), np.float32), Box(-1, 1, (1,), np.float32)
    buffer = TracedReplayBuffer(3, *spaces, n_envs=1)
    for i in range(4):
        info = {"env_reward": float(i), "success": i == 3, "frame_rows": (i, i + 1)}
        ended = np.array([i == 3])
        buffer.add(*np.full((2, 1, 2), i), np.zeros((1, 1)), np.array([10 * i]), ended, [info])
    buffer.save(tmp_path / "replay.npz")
    assert load_transitions(tmp_path / "replay.npz")["rewards"].tolist() == [10, 20, 30]
    two = TracedReplayBuffer(8, *spaces, n_envs=2)
    two.load(tmp_path / "replay.npz")  # 3 transitions in pairs: the oldest is left out
    assert (two.size(), two.rewards[0].tolist(), two.after[0].tolist()) == (1, [20, 30], [3, 4])
    assert (two.dones[0].tolist(), two.success[0].tolist()) == ([0, 1], [False, True])
    (tmp_path / "replay.npz").write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match="is damaged, or holds no transitions"):
        two.load(tmp_path / "replay.npz")


@pytest.mark.parametrize("algo", ["sac", "ppo"])
def test_a_saved_agent_comes_back_whole_and_nothing_is_unpickled(algo, tmp_path, monkeypatch):
    own = {"ppo": {"rollout_steps": 16, "epochs": 1}, "sac": {"learning_starts": 20}}[algo]
    config = AgentConfig(algo=algo, envs=1, normalize_obs=True, **SMALL, **own)
    door = AgentReward(DummyVecEnv([Door]), config, False, None)
    agent = make_agent(config, door)
    agent.learn(64)
    save_agent(agent, tmp_path, frame_rows=5)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr("stable_baselines3.common.save_util.json_to_data", refuse)
    again = load_agent(config, tmp_path, AgentReward(DummyVecEnv([Door]), config, False, None))
    observation = np.array([3, 1], np.float32)
    np.testing.assert_array_equal(act(agent, observation), act(again, observation))
    assert (again.num_timesteps, again._n_updates) == (64, agent._n_updates)
    normalizer = agent.get_vec_normalize_env().obs_rms
    assert again.get_vec_normalize_env().obs_rms.mean == pytest.approx(normalizer.mean)
    assert normalizer.mean[0] > 1
    if algo == "sac":
        assert again.log_ent_coef.item() == agent.log_ent_coef.item() != pytest.approx(np.log(0.1))
        assert again.ent_coef_optimizer.param_groups[0]["params"][0] is again.log_ent_coef
        moments = [a.critic.optimizer.state_dict()["state"][0]["exp_avg"] for a in (agent, again)]
        assert torch.equal(*moments)
    with pytest.raises(ValueError, match="damaged, or not this agent's"):
        load_agent(replace(config, net_width=9), tmp_path, door)


# The alarm


def episodes(*levels: float) -> list[float]:
    """20 episodes about each level, with noise of deviation 1."""
    noise = np.random.default_rng(0).normal(size=(len(levels), 20))
    return (np.array(levels)[:, None] + noise).ravel().tolist()


def test_a_learned_return_that_rises_alone_is_called_hacking():
    none = [0.0] * 80
    message = reward_hacking(episodes(0, 2, 4, 6), episodes(45, 35, 25, 15), none)
    assert message is not None
    assert "since episode 0" in message
    assert "success from 0% to 0%" in message
    assert reward_hacking(episodes(0, 2, 4, 6), episodes(15, 25, 35, 45), none) is None
    assert reward_hacking(episodes(0, 2, 4, 6), episodes(9, 9, 9, 9), [0.0] * 60 + [0.5] * 20) is None
    assert reward_hacking(episodes(0, 0, 0, 0), episodes(45, 35, 25, 15), none) is None
    assert reward_hacking(episodes(0, 2, 4, 6), episodes(9, 9, 9, 9), [1.0] * 80) is None  # solved
    assert reward_hacking([0.0, 9.0], [0.0, 0.0], [0, 0], 20) is None  # too early to say


def test_hacking_that_begins_late_is_noticed():
    learned, true = episodes(0, 2, 4, 6, 8, 10), episodes(0, 20, 40, 60, 30, 20)
    message = reward_hacking(learned, true, [0] * 120)
    assert message is not None
    assert "since episode 60" in message
    with pytest.raises(ValueError, match="one length are needed, got 120, 120, 3"):
        reward_hacking(learned, true, [0, 0, 0])


def test_the_log_warns_once_and_drops_what_was_not_saved(tmp_path, capsys):
    config = AgentConfig(reward="x", hacking_window=4, **TINY)
    door = AgentReward(DummyVecEnv([Door]), config, False, None)
    agent = make_agent(config, door)
    log = EpisodeLog(tmp_path, 0, config)
    agent.set_logger(Logger(None, []))
    log.init_callback(agent)
    for i in range(16):
        outcome = {"learned_return": float(i), "env_return": float(-i), "success": False, "length": 5}
        log.num_timesteps, log.locals = 5 * (i + 1), {"infos": [{"outcome": outcome}]}
        agent.num_timesteps = log.num_timesteps
        log._on_step()
    log.close()
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("warning: reward hacking at step 40?") == 1
    again = EpisodeLog(tmp_path, 50, config)
    assert [episode["step"] for episode in again.episodes] == list(range(5, 55, 5))
    again.close()
    assert len(read_lines(tmp_path / "episodes.jsonl")) == 10


@pytest.mark.parametrize(
    ("settings", "by"),
    [
        ({"reward": "x"}, "learned"),
        ({"reward": "x", "add": "sparse"}, "success"),
        ({"reward": "x", "transform": "difference"}, "success"),
        ({"reward": "x", "best_by": "success"}, "success"),
        ({"reward": "dense", "monitor": "x"}, "success"),
        ({"reward": "dense", "monitor": "x", "best_by": "learned"}, "learned"),
    ],
)
def test_the_best_agent_is_chosen_without_the_truth_where_the_reward_is_learned_alone(settings, by):
    assert AgentConfig(**settings).keeps_best_by == by


def test_what_the_best_agent_is_chosen_by(tmp_path):
    hacked = {"success": 0.0, "env_return": 10.0, "training_learned_return": 3.0}
    does_it = {"success": 0.5, "env_return": 5.0, "training_learned_return": 2.0}
    new = {"success": 0.0, "env_return": 0.0, "training_learned_return": None}
    rows = [new, hacked, does_it]
    assert max(rows, key=lambda row: worth("learned", row)) is hacked
    assert max(rows, key=lambda row: worth("success", row)) is does_it
    log = EpisodeLog(tmp_path, 0, AgentConfig(reward="x", hacking_window=2))
    assert log.learned_return() is None
    log.episodes = [{"learned_return": value} for value in (9.0, 1.0, 4.0)]
    assert log.learned_return() == 2.5
    log.episodes += [{"learned_return": None}]
    assert log.learned_return() is None
    log.close()


# Whole runs


def test_a_dense_run_renders_nothing_and_goes_on_after_ctrl_c(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("rendered")

    monkeypatch.setattr(CameraRig, "__init__", refuse)
    on_step = EpisodeLog._on_step

    def press_at_50(log):
        if log.num_timesteps == 50:
            signal.raise_signal(signal.SIGINT)
        return on_step(log)

    monkeypatch.setattr(EpisodeLog, "_on_step", press_at_50)
    config = AgentConfig(
        timesteps=200,
        horizon=50,
        eval_every=150,
        output=tmp_path / "run",
        results=tmp_path / "r.json",
        **TINY,
    )
    stopped = train(config)
    assert (stopped.interrupted, stopped.steps, stopped.row) == (True, 100, None)
    with pytest.raises(FileExistsError, match="go on with --resume"):
        train(config)
    with pytest.raises(ValueError, match="net_width: 8 then, 9 now"):
        train(replace(config, net_width=9, resume=True))
    done = train(replace(config, resume=True))
    assert (done.interrupted, done.steps) == (False, 200)
    assert [e["step"] for e in read_lines(tmp_path / "run" / "episodes.jsonl")] == [50, 100, 150, 200]
    assert [e["step"] for e in read_lines(tmp_path / "run" / "evaluations.jsonl")] == [200]
    transitions = load_transitions(tmp_path / "run" / "last" / "replay.npz")
    assert transitions["observations"].shape == (200, 39)
    assert np.flatnonzero(transitions["timeouts"]).tolist() == [49, 99, 149, 199]
    np.testing.assert_array_equal(transitions["rewards"], transitions["env_rewards"])
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert list(row) == [
        *("task", "reward", "algo", "seed", "steps"),
        *("success", "learned_return", "env_return", "rank_correlation", "episodes"),
    ]
    assert row == done.row
    assert row["learned_return"] is row["rank_correlation"] is None
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(replace(config, output=tmp_path / "other", resume=True))


@pytest.mark.slow
def test_ppo_learns_to_close_the_drawer_in_two_minutes(tmp_path):
    config = AgentConfig(algo="ppo", timesteps=12_000, output=tmp_path / "run", results=tmp_path / "r.json")
    done = train(config)
    assert done.row is not None
    assert done.row["success"] >= 0.5  # 0.8 when it was written; 0 without training


def test_a_learned_run_can_be_replayed_drawn_and_relabelled(tiny_adapter_dir, tmp_path, capsys):
    """Also against the first frame of each episode: relabelling must find the same ones again."""
    settings = {"timesteps": 60, "horizon": 20, "eval_every": 40, "transform": "difference", "envs": 2}
    config = AgentConfig(
        reward=str(tiny_adapter_dir),
        cameras=("corner",),
        start_weight=5.0,
        keep_frames=True,
        processes=False,
        hacking_window=2,
        output=tmp_path / "run",
        results=tmp_path / "r.json",
        **settings,
        **TINY,
    )
    done = train(config)
    assert done.row is not None
    assert -1 <= done.row["rank_correlation"] <= 1
    first = read_lines(tmp_path / "run" / "episodes.jsonl")
    assert len(first) == 2  # of 20 steps in 2 environments
    scored = [row["training_learned_return"] for row in read_lines(tmp_path / "run" / "evaluations.jsonl")]
    assert scored == [pytest.approx(np.mean([e["learned_return"] for e in first]))]  # one, after 60 steps

    evaluate.main(evaluate.EvaluateConfig(tmp_path / "run", episodes=2, video=tmp_path / "film.mp4"))
    printed = capsys.readouterr().out
    assert f"learned return    {done.row['learned_return']:.3g}" in printed
    assert (tmp_path / "film.mp4").stat().st_size > 1000
    figures.draw(figures.FiguresConfig((tmp_path / "run",), tmp_path / "figures" / "curves.png"))
    assert (tmp_path / "figures" / "curves.png").read_bytes()[1:4] == b"PNG"
    settings_file = tmp_path / "run" / "config.json"
    named = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(named | {"label": "a long name " * 20}))
    figures.draw(figures.FiguresConfig((tmp_path / "run",), tmp_path / "figures" / "long.png"))  # no warning
    settings_file.write_text(json.dumps(named))

    before = load_transitions(tmp_path / "run" / "last" / "replay.npz")
    options = relabel.RelabelConfig(
        tmp_path / "run",
        str(tiny_adapter_dir),
        tmp_path / "same.npz",
        transform="difference",
        start_weight=5.0,
    )
    learned, true = relabel.relabel_run(options)
    np.testing.assert_allclose(
        load_transitions(tmp_path / "same.npz")["rewards"], before["rewards"], atol=0.02
    )
    rows = read_lines(tmp_path / "run" / "episodes.jsonl")
    assert learned == pytest.approx([row["learned_return"] for row in rows], abs=0.02)
    assert true == pytest.approx([row["env_return"] for row in rows], rel=1e-4)
    plain, _ = relabel.relabel_run(replace(options, start_weight=None, output=tmp_path / "plain.npz"))
    assert np.abs(plain - learned).max() > 0.02
    full = {"before": np.array([40, 41]), "after": np.array([42, 43]), "dones": np.zeros(2)}
    with pytest.raises(ValueError, match="cannot be told for the oldest transitions"):
        relabel.first_frames(full, 2, 60)
    sparse = replace(
        options, reward="sparse", transform="raw", start_weight=None, output=tmp_path / "sparse.npz"
    )
    relabel.relabel_run(sparse)
    rewards = load_transitions(tmp_path / "sparse.npz")["rewards"]
    assert rewards.tolist() == before["success"].tolist()

    started = train(
        replace(
            AgentConfig(**TINY),
            timesteps=20,
            horizon=20,
            buffer=tmp_path / "same.npz",
            output=tmp_path / "next",
            results=tmp_path / "r.json",
        )
    )
    assert len(load_transitions(started.folder / "last" / "replay.npz")["rewards"]) == 80
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2


def test_what_an_agent_does_is_recorded_and_rendered(tmp_path):
    common: dict = {"task": "window-open-v3", "timesteps": 30, "horizon": 15, "eval_every": 30, **TINY}
    run = train(AgentConfig(**common, output=tmp_path / "run", results=tmp_path / "r.json")).folder
    files = {name: tmp_path / f"{name}.npz" for name in ("drawn", "drawn-again", "best")}
    rewards = {
        name: record.record(record.RecordConfig(run, file, episodes=3, explore=name != "best"))
        for name, file in files.items()
    }
    drawn, again, best = (np.load(file)["actions"] for file in files.values())
    assert drawn.shape == (3, 15, 4)
    assert np.abs(drawn).max() <= 1
    assert np.array_equal(drawn, again)  # one seed, the same draws
    assert np.abs(drawn - best).max() > 0.1

    scenes.main(scenes.Config(tmp_path / "scenes", size=28, actions=(files["drawn"],), workers=1))
    (shard,) = (tmp_path / "scenes").glob("*.npz")
    assert shard.stem == "000-window-open-v3"
    with np.load(shard) as stored:
        frames, state, episode = stored["frames"], stored["state"], stored["episode"]
    assert frames.shape == (3 * 12 * 2, 28, 28, 3)  # 12 moments of each episode, two views of each
    for number in range(
        3
    ):  # its rewards are those that the agent had, so the simulator was where it was then
        rendered = state[episode == number, scenes.STATE.index("reward")] * 10
        assert np.abs(rendered[:, None] - rewards["drawn"][number]).min(1).max() < 1e-5

    config = collect.Config("agent-rollouts", actions=(files["drawn"], files["best"]), size=28, workers=1)
    collect.collect(replace(config, dataset="agents-v0", data_root=tmp_path / "minari"))
    data = open_dataset(tmp_path / "minari" / "agents-v0")
    assert [e.seed for e in data.episodes] == [record.FIRST_SEED + i for i in (0, 1, 2)] * 2
    assert {(e.task, e.kind, e.length) for e in data.episodes} == {("window-open-v3", "agent", 16)}
    had = np.concatenate([rewards["best"], rewards["drawn"]])
    for number, chunk in enumerate(data.chunks()):
        assert chunk.frames.shape == (16, 3, 28, 28, 3)
        np.testing.assert_allclose(chunk.rewards[1:], had[number], rtol=1e-5)


def test_actions_of_a_held_out_task_are_refused(tmp_path):
    file = tmp_path / "actions.npz"
    np.savez(file, task="drawer-open-v3", seeds=np.arange(1), actions=np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match=r"training tasks alone, .*actions\.npz is of drawer-open-v3"):
        scenes.main(scenes.Config(tmp_path / "scenes", actions=(file,)))
    with pytest.raises(ValueError, match=r"training tasks alone, .*actions\.npz is of drawer-open-v3"):
        collect.collect(collect.Config("agent-rollouts", actions=(file,), data_root=tmp_path))
    file.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"holds no actions of agents\.record"):
        scenes.main(scenes.Config(tmp_path / "scenes", actions=(file,)))


class Processes:
    """In the place of subprocess.run: reads each command as its program would, and leaves what it would."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.fails = ""

    def __call__(self, command):
        _, _, module, *words = command
        configs = {"agents.train": AgentConfig, "agents.record": record.RecordConfig}
        configs |= {"training.collect": collect.Config, "training.train": TrainConfig}
        settings = tyro.cli(configs[module], args=words)
        if module == self.fails:
            return subprocess.CompletedProcess(command, 1)
        if module == "agents.train":
            row = {"task": settings.task, "reward": settings.reward, "algo": "ppo", "seed": settings.seed}
            row["steps"] = settings.timesteps
            evaluate.write_row(settings.results, row | {"success": 0.5, "rank_correlation": 0.25})
        if module == "training.train":
            self.learned_from = (settings.adapter, settings.rollouts)
        self.done.append(module)
        return subprocess.CompletedProcess(command, 0)


def test_the_loop_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    processes = Processes()
    monkeypatch.setattr(loop.subprocess, "run", processes)
    monkeypatch.setattr(
        loop, "run_jobs", lambda function, jobs, **_: [function(job) for job in jobs] and None
    )
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    tasks, home = ("window-close-v3", "push-v3"), tmp_path / "loop"
    cfg = loop.LoopConfig(tasks=tasks, rollouts=("test/squares-v0",), output=home)
    with pytest.raises(FileNotFoundError, match="no model 'nosuch'"):
        loop.main(replace(cfg, reward="nosuch"))
    with pytest.raises(FileNotFoundError, match=r"or make it: python -m training\.collect train-rollouts"):
        loop.main(cfg)
    write_dataset(tmp_path)
    processes.fails = "training.train"
    with pytest.raises(RuntimeError, match=r"failed: python -m training.train .*--adapter"):
        loop.main(cfg)
    before = len(processes.done)
    assert processes.done == [*["agents.train", "agents.record"] * 2, "training.collect"]
    processes.fails = ""
    assert loop.main(cfg) == home / "0" / "adapter"
    assert processes.done[before:] == ["training.train", *["agents.train", "agents.record"] * 2]
    theirs = home / "0" / "rollouts" / "agent-rollouts-v0"
    assert processes.learned_from == (cfg.reward, ("test/squares-v0", str(theirs)))
    assert loop.main(cfg)
    assert len(processes.done) == before + 5
    assert "window-close-v3               50%, 0.25               50%, 0.25" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"begun with other settings \(timesteps: 30000 then, 10 now\)"):
        loop.main(replace(cfg, timesteps=10))


def test_the_loop_trains_on_training_tasks_alone():
    with pytest.raises(ValueError, match="button-press-wall-v3 is held out"):
        loop.LoopConfig(tasks=("push-v3", "button-press-wall-v3"))
    with pytest.raises(ValueError, match="reward must be a checkpoint"):
        loop.LoopConfig(reward="dense")


def test_a_row_replaces_the_one_with_its_key(tmp_path):
    file = tmp_path / "results" / "rows.json"
    row = {"task": "b", "reward": "dense", "algo": "sac", "seed": 0, "steps": 9, "success": 0.5}
    for change in ({}, {"task": "a"}, {"success": 1.0}, {"seed": 1}, {"steps": 10}):
        evaluate.write_row(file, row | change)
    rows = json.loads(file.read_text())
    assert [(r["task"], r["seed"], r["steps"], r["success"]) for r in rows] == [
        ("a", 0, 9, 0.5),
        ("b", 0, 9, 1.0),
        ("b", 0, 10, 0.5),
        ("b", 1, 9, 0.5),
    ]
    file.write_text("{}")
    evaluate.write_row(file, row)
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is not a list of results"):
        evaluate.write_row(file, row)


def test_a_summary_ranks_episodes_by_both_returns():
    made = [
        evaluate.Episode(success, np.array([true]), np.array([learned]))
        for success, true, learned in [
            (True, 3.0, 0.3),
            (False, 1.0, 0.1),
            (False, 2.0, 0.2),
            (True, 4.0, 0.0),
        ]
    ]
    assert evaluate.summarise(made) == {
        "success": 0.5,
        "learned_return": pytest.approx(0.15),
        "env_return": 2.5,
        "rank_correlation": pytest.approx(-0.2),
        "episodes": 4,
    }


def test_an_evaluation_depends_on_its_seeds_alone():
    def still(observation):
        return np.zeros(4, np.float32)

    env = make_task_env("reach-v3", 10)
    assert env.observation_space.contains(env.reset(seed=1)[0])
    ends = [evaluate.run_episode(still, env, seed).true[-1] for seed in (5, 6, 5)]
    assert ends[0] == ends[2] != ends[1]


def test_a_curve_averages_the_episodes_between_its_edges(tmp_path):
    lines = [{"step": step, "env_return": value} for step, value in [(10, 1), (20, 3), (21, 8)]]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    curve = figures.curve(tmp_path, "env_return", np.array([0, 20, 40, 60]))
    np.testing.assert_array_equal(curve, [2, 8, np.nan])


def test_cameras_that_the_model_does_not_know_are_refused(tiny_adapter_dir):
    config = AgentConfig(reward=str(tiny_adapter_dir), cameras=("corner3",))
    scorer = load_scorer(config)
    assert scorer is not None
    assert scorer.camera_spec == CameraSpec(("corner3",), 32, 32)
    with pytest.raises(ValueError, match="not trained on camera topview"):
        load_scorer(replace(config, cameras=("topview",)))
    blurred = load_scorer(replace(config, transform="goal-baseline", baseline_strength=1.0))
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), dtype=np.uint8)
    assert not np.allclose(blurred.score(frames, "push"), scorer.score(frames, "push"), atol=0.01)


def test_a_reward_may_count_the_hand_at_what_the_sentence_names(tiny_adapter_dir):
    config = AgentConfig(reward=str(tiny_adapter_dir), cameras=("corner",), approach_weight=0.5)
    assert config.reward_label.endswith(", approach 0.5, corner")
    scorer = load_scorer(config)
    assert scorer.approach_weight == 0.5
    plain = load_scorer(replace(config, approach_weight=None))
    assert plain.approach_weight == 0
    said, there = plain.embed_text([config.sentence, "touch the green drawer"])
    both = said + 0.5 * there
    np.testing.assert_allclose(
        scorer.embed_text([config.sentence])[0], both / np.linalg.norm(both), atol=1e-6
    )


def test_a_camera_that_is_not_there_costs_no_earlier_run(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "state.json").write_text("{}")
    config = AgentConfig(reward="zero-shot", cameras=("nosuch",), output=tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"no camera named nosuch in .*; it has topview, corner"):
        train(config)
    with pytest.raises(FileNotFoundError, match=r"no transitions at .*nosuch\.npz"):
        train(replace(config, reward="dense", cameras=(), buffer=tmp_path / "nosuch.npz"))
    assert (tmp_path / "last" / "state.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "open-sesame"], "unknown Meta-World task 'open-sesame'"),
        (["--reward", "no/such/checkpoint"], "error: no model 'no/such/checkpoint'"),
        (["--reward", "dens"], "A reward is also dense, sparse or zero-shot."),
        (["--ent-coef", "much"], "ent_coef must be a number, for sac also auto"),
    ],
)
def test_errors_of_the_command_line_are_short(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["train", *arguments, "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert message in f"{stop.value} {capsys.readouterr().err}"
    assert not (tmp_path / "run" / "last").exists()
