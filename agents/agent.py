"""Stable-Baselines3 agents by our settings: made, saved, and loaded without unpickling anything.

A saved agent is a folder: `model.zip` (Stable-Baselines3's own format), `state.json` (steps, updates,
statistics of the normalisation) and, to go on learning, `replay.npz`. Only the weights in `model.zip` are read
here. `SAC.load("model.zip")` would unpickle what else is in it: do that with files of your own alone.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from agents.config import AgentConfig
from agents.replay import TracedReplayBuffer, load_transitions

Agent = SAC | PPO
STATISTICS = ("obs_rms", "ret_rms")


def make_agent(config: AgentConfig, venv: VecEnv, steps: int = 0) -> Agent:
    """An untrained agent; what it draws depends on the seed and on `steps`, those done before.

    Raises:
        ValueError: an `ent_coef` that is none.
    """
    setting = config.setting
    if setting("normalize_obs") or setting("normalize_reward"):
        venv = VecNormalize(
            venv,
            norm_obs=setting("normalize_obs"),
            norm_reward=setting("normalize_reward"),
            gamma=config.gamma,
        )
    seed = int(np.random.SeedSequence([config.seed, steps]).generate_state(1)[0] // 2)  # room for env numbers
    common: dict[str, Any] = {
        "learning_rate": setting("learning_rate"),
        "batch_size": setting("batch_size"),
        "gamma": config.gamma,
        "policy_kwargs": {"net_arch": [setting("net_width")] * setting("net_layers")},
        "seed": seed,
        "device": "cpu",
    }
    if config.algo == "ppo":
        return PPO(
            "MlpPolicy",
            venv,
            n_steps=config.rollout_steps,
            n_epochs=config.epochs,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=float(setting("ent_coef")),
            **common,
        )
    coefficient = setting("ent_coef")
    given = len(load_transitions(config.buffer)["rewards"]) if config.buffer else 0
    return SAC(
        "MlpPolicy",
        venv,
        buffer_size=config.buffer_size or config.timesteps + venv.num_envs + given,
        learning_starts=config.learning_starts,
        tau=config.tau,
        train_freq=config.train_freq,
        gradient_steps=config.gradient_steps,
        ent_coef=coefficient if coefficient.startswith("auto") else float(coefficient),
        replay_buffer_class=TracedReplayBuffer,
        **common,
    )


def save_agent(agent: Agent, folder: Path, **facts: Any) -> None:
    """Write `model.zip` and `state.json`, the latter with `facts` too, to an existing folder."""
    agent.save(folder / "model.zip")
    state: dict[str, Any] = {"steps": agent.num_timesteps, "updates": agent._n_updates, **facts}
    if (normalizer := agent.get_vec_normalize_env()) is not None:
        state["normalization"] = {
            name: {"mean": np.asarray(s.mean).tolist(), "var": np.asarray(s.var).tolist(), "count": s.count}
            for name in STATISTICS
            if isinstance(s := getattr(normalizer, name, None), RunningMeanStd)
        }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a saved agent; FileNotFoundError or ValueError when it is missing or damaged."""
    file = folder / "state.json"
    if not file.is_file():
        raise FileNotFoundError(f"no saved agent: there is no {file}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from error


def load_agent(config: AgentConfig, folder: Path, venv: VecEnv) -> Agent:
    """The agent that `save_agent` wrote, with its optimizers and normalisation, on `venv`.

    Raises:
        FileNotFoundError: none there.
        ValueError: damaged, or of another architecture than `config` says.
    """
    state = read_state(folder)
    agent = make_agent(config, venv, state["steps"])
    try:
        _, parameters, variables = load_from_zip_file(folder / "model.zip", device="cpu", load_data=False)
        agent.set_parameters(parameters)
    except (ValueError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / 'model.zip'} is damaged, or not this agent's ({error})") from error
    if isinstance(agent, SAC) and agent.log_ent_coef is not None:
        with torch.no_grad():  # in place: the optimizer holds this very tensor
            agent.log_ent_coef.copy_((variables or {})["log_ent_coef"])
    agent.num_timesteps, agent._n_updates = state["steps"], state["updates"]
    normalizer = agent.get_vec_normalize_env()
    if normalizer is not None:
        for name, stored in state["normalization"].items():
            statistics = getattr(normalizer, name)
            statistics.mean, statistics.var = np.array(stored["mean"]), np.array(stored["var"])
            statistics.count = stored["count"]
    return agent


def act(agent: Agent, observation: np.ndarray, *, explore: bool = False) -> np.ndarray:
    """The agent's best action, float32 [4], for an observation [39] as the environment gives it.

    With `explore` one drawn as in training, from PyTorch's global generator.
    """
    normalizer = agent.get_vec_normalize_env()
    seen: Any = observation if normalizer is None else normalizer.normalize_obs(observation)
    return agent.predict(seen, deterministic=not explore)[0]
