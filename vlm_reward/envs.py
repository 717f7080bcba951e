# mujoco ships no type stubs
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
"""Single-task Meta-World environments without the traps of the raw classes, and their scripted experts."""

import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.spaces import Box
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, ML1_ARGS_KWARGS
from metaworld.policies import ENV_POLICY_MAP

from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.tasks import check_task

Kind = Literal["expert", "random", "noisy", "mixed", "wander", "miss", "goal"]
KINDS: tuple[Kind, ...] = get_args(Kind)

WORKSPACE = ((-0.5, 0.4, 0.05), (0.5, 1.0, 0.5))
"""Corners of the box that the hand can be in, metres: Meta-World's bounds of the mocap body, of most tasks."""
FINGERS = np.array((0.0, 0.0, -0.045))
"""From the hand, which an observation tells of, to between its fingertips, metres."""
MAX_EPISODE_STEPS = 500
"""Meta-World raises when stepped further."""


class MetaWorldTask(gym.Env):
    """One Meta-World v3 task with everything in its observation, and frames that match it.

    Against the raw class: the goal is visible and the observation space admits it; each reset draws a new
    object placement and goal from the seed (raw `reset(seed=)` is ignored); the first observation and frame
    show the state after the reset (11 raw tasks are wrong there by up to 20 cm); actions beyond [-1, 1]
    are clipped, not extrapolated; the reward is always "v2" (in [0, 10]).

    Args:
        task: a Meta-World name such as `drawer-open-v3`.
        seed: seed of the first reset that is given none.
        random_hand_start: draw the gripper's start from +-10 cm about the task's own at each reset.

    The observation is float64 [39]: hand (3), gripper opening, objects (14), the same 18 one step before,
    goal (3). The action is float32 [4] in [-1, 1]: a hand displacement (1 = 1 cm) and gripper effort.
    `info` has `success` (bool: at this step) beside Meta-World's own metrics. Episodes do not end by
    themselves: see `make_env`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012 (Gymnasium's own form)
    render_mode = "rgb_array"

    def __init__(self, task: str, seed: int | None = None, *, random_hand_start: bool = False) -> None:
        self.task = check_task(task)
        self._first_seed = seed
        self._random_hand_start = random_hand_start
        env: Any = ALL_V3_ENVIRONMENTS[task](reward_function_version="v2")
        options = dict(ML1_ARGS_KWARGS[task]["kwargs"])
        options.pop("task_id")
        env._set_task_inner(**options)
        env._set_task_called, env._partially_observable = True, False
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        # Meta-World clips observations to this space, whose goal bounds are wrong: keep the hand's alone.
        low, high = env.sawyer_observation_space.low.copy(), env.sawyer_observation_space.high.copy()
        low[36:], high[36:] = -np.inf, np.inf
        self.observation_space = env.sawyer_observation_space = Box(low, high, dtype=np.float64)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        self._env = env
        self._hand_start = np.array(env.hand_init_pos, dtype=np.float64)
        self._rig: CameraRig | None = None

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model."""
        return self._env.model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's data."""
        return self._env.data

    @property
    def metaworld(self) -> Any:
        """The raw Meta-World environment."""
        return self._env

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode. The same seed gives the same placement, goal, hand start and observation."""
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        super().reset(seed=seed)
        env = self._env
        if seed is not None:
            env.np_random = np.random.default_rng(self.np_random.integers(2**63))
            mujoco.mj_resetData(env.model, env.data)  # nothing of an earlier episode reaches this one
        for _ in range(100):
            env.hand_init_pos = self._draw_hand_start()
            try:
                env.reset()
                self.forward()
                observation, _, _ = self.observe()
                env._prev_obs = observation[:18]
                return observation, {"success": False}
            except ValueError as error:  # sweep-into: some hand starts leave its reward no margin
                if "margin" not in str(error):
                    raise
        raise RuntimeError(f"{self.task}: no valid placement in 100 draws")

    def _draw_hand_start(self) -> np.ndarray:
        if not self._random_hand_start:
            return self._hand_start.copy()
        start = self._hand_start + self.np_random.uniform(-0.1, 0.1, 3)
        return np.clip(start, self._env.mocap_low, self._env.mocap_high)

    def forward(self) -> None:
        """Bring all positions up to date with the state, goal markers included."""
        mujoco.mj_forward(self.model, self.data)
        for name, position in self._env._target_site_config:
            self._env._set_pos_site(name, position)

    def observe(self) -> tuple[np.ndarray, float, dict[str, Any]]:
        """Observation, reward and info of the state as it stands, as if the step before had shown the same."""
        env = self._env
        current = env._get_curr_obs_combined_no_goal()
        observation = self._clip(np.hstack((current, current, env._get_pos_goal())))
        reward, info = env.evaluate_state(observation, np.zeros(4, np.float32))
        return observation, float(reward), info | {"success": bool(info["success"])}

    def snapshot(self) -> np.ndarray:
        """What MuJoCo needs to show this moment again: float64, positions and the mocap body's pose."""
        return np.concatenate([self.data.qpos, self.data.mocap_pos.ravel(), self.data.mocap_quat.ravel()])

    def restore(self, snapshot: np.ndarray) -> None:
        """Show a moment of the current episode again. For rendering: velocities stay as they are."""
        data = self.data
        position, mocap, _ = np.split(snapshot, np.cumsum([data.qpos.size, data.mocap_pos.size]))
        data.qpos[:] = position
        data.mocap_pos[:] = mocap.reshape(data.mocap_pos.shape)
        self.forward()

    def _clip(self, observation: np.ndarray) -> np.ndarray:
        space: Any = self.observation_space
        return np.clip(observation, space.low, space.high)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step of 12.5 ms x 1 action. Never terminates by itself."""
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if not np.isfinite(action).all():
            raise ValueError(f"the action must be finite, got {action}")
        observation, reward, _, _, info = self._env.step(action)
        info["success"] = bool(info["success"])
        return observation, float(reward), False, False, info

    def render(self) -> np.ndarray:
        """The default camera's view: uint8 [224, 224, 3], upright."""
        if self._rig is None:
            self._rig = CameraRig(self, CameraSpec(("corner",)))
        return self._rig.render()[0]

    def close(self) -> None:
        """Free the renderer."""
        if self._rig is not None:
            self._rig.close()
            self._rig = None
        self._env.close()


class TerminateOnSuccess(gym.Wrapper):
    """End the episode at the first step whose info says success."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), terminated or info["success"], truncated, info


def make_env(
    task: str,
    seed: int | None = None,
    *,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    random_hand_start: bool = False,
    terminate_on_success: bool = False,
) -> gym.Env:
    """A ready Gymnasium environment of one Meta-World task; see `MetaWorldTask`.

    Args:
        task: one of `vlm_reward.tasks.all_tasks()`.
        seed: seed of the first reset that is given none.
        max_episode_steps: truncate after so many steps, 1 to 500.
        random_hand_start: draw the gripper's start at each reset, +-10 cm.
        terminate_on_success: end the episode at its first success.

    Raises:
        ValueError: unknown task, or a step limit out of range.
    """
    if not 1 <= max_episode_steps <= MAX_EPISODE_STEPS:
        raise ValueError(f"max_episode_steps must be in [1, {MAX_EPISODE_STEPS}], got {max_episode_steps}")
    env: gym.Env = MetaWorldTask(task, seed, random_hand_start=random_hand_start)
    if terminate_on_success:
        env = TerminateOnSuccess(env)
    return gym.wrappers.TimeLimit(env, max_episode_steps)


def expert_policy(task: str) -> Callable[[np.ndarray], np.ndarray]:
    """The scripted expert of a task: observation [39] -> action float32 [4], clipped to [-1, 1]."""
    policy = ENV_POLICY_MAP[check_task(task)]()

    def act(observation: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():  # Meta-World warns of actions beyond [-1, 1] on each step
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")
            return np.clip(policy.get_action(observation), -1.0, 1.0).astype(np.float32)

    return act


def behaviour(
    task: str, kind: Kind, generator: np.random.Generator
) -> Callable[[int, np.ndarray], np.ndarray]:
    """How an episode acts: (step, observation [39]) -> action float32 [4] in [-1, 1].

    `expert`: the scripted policy. `random`: uniform actions, each held for 5 steps (so that the hand gets
    somewhere). `noisy`: the expert plus Gaussian noise of a standard deviation drawn from [0.3, 1.5].
    `mixed`: the expert up to a step drawn from [5, 60], then random. `wander`: the same, but then the hand goes
    to points drawn in all of its workspace, 40 steps each: where an agent that hacks a reward may end. `miss`: the
    expert that takes the object to be 8 to 15 cm beside or above where it is, and goes through the motions there.
    `goal`: the hand goes to where the goal is marked, or up to some 5 cm beside it, and leaves the object alone:
    demonstrations end with the hand there.
    """
    expert = expert_policy(task)
    noise = generator.uniform(0.3, 1.5)
    departure = int(generator.integers(5, 61))
    aside = np.zeros(3)
    if kind == "miss":
        way = generator.normal(size=3)
        aside = generator.uniform(0.08, 0.15) * np.append(way[:2], abs(way[2])) / np.linalg.norm(way)
    astray = {"random": 0, "goal": 0, "mixed": departure, "wander": departure}.get(kind, sys.maxsize)
    held = np.zeros(4, np.float32)

    def beside_the_goal(observation: np.ndarray) -> np.ndarray:
        aside = generator.normal(0, generator.choice([0.01, 0.03]), 3)
        return observation[36:39] + aside - FINGERS

    def act(step: int, observation: np.ndarray) -> np.ndarray:
        nonlocal held
        if step >= astray and kind in ("wander", "goal"):
            if (step - astray) % (40 if kind == "wander" else 20) == 0:
                place = generator.uniform(*WORKSPACE) if kind == "wander" else beside_the_goal(observation)
                held = np.append(place, generator.uniform(-1, 1))
            toward = 10 * (held[:3] - observation[:3])
            return np.clip(np.append(toward, held[3]), -1, 1).astype(np.float32)
        if step >= astray:
            if (step - astray) % 5 == 0:
                held = generator.uniform(-1, 1, 4).astype(np.float32)
            return held
        seen = observation.copy()
        seen[4:7] += aside
        action = expert(seen)
        if kind == "noisy":
            action = action + noise * generator.normal(size=4)
        return np.clip(action, -1, 1).astype(np.float32)

    return act
