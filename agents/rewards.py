"""From settings to a scorer of frames, and from its scores to the reward that an agent sees."""

import numpy as np

from agents.config import AgentConfig
from vlm_reward.cameras import CameraSpec
from vlm_reward.reward_model import RewardModel, auto_device
from vlm_reward.transforms import GoalBaseline, Shaping, difference, potential, raw

LoadedScorer = RewardModel | GoalBaseline


def load_scorer(config: AgentConfig) -> LoadedScorer | None:
    """The model that scores frames, reduced to `config.cameras`; None when nothing is scored.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it was not trained on one of the cameras; the sentence is empty or too long; goal-baseline of
            a model that scores against the episode's first frame.
    """
    if config.scored_by is None:
        return None
    try:
        model = RewardModel.from_pretrained(config.scored_by, device=auto_device(config.device))
    except FileNotFoundError as error:
        if config.scored_by != config.reward or "/" in config.reward:
            raise
        raise FileNotFoundError(f"{error} A reward is also dense, sparse or zero-shot.") from error
    if config.start_weight is not None:  # first: it decides how few cameras a reach model may have
        model = model.with_start_weight(config.start_weight)
    model = model.with_cameras(config.cameras or (model.camera_spec or CameraSpec()).cameras)
    model.embed_text([config.sentence])
    if config.approach_weight is not None:
        model = model.with_approach_weight(config.approach_weight)
    if config.transform == "goal-baseline":
        return GoalBaseline(model, config.baseline, config.baseline_strength)
    return model


def model_of(scorer: LoadedScorer) -> RewardModel:
    """The model inside a scorer that `load_scorer` made."""
    return scorer.model if isinstance(scorer, GoalBaseline) else scorer


def shaping(config: AgentConfig) -> Shaping:
    """Scores to the learned reward. A model that only watches shows its plain score."""
    if config.transform == "potential":
        return potential(config.gamma)
    return difference if config.transform == "difference" else raw


def agent_reward(
    config: AgentConfig, learned: np.ndarray | None, env_reward: np.ndarray, success: np.ndarray
) -> np.ndarray:
    """What the agent sees, float32 [N], from the learned reward [N], the task's own [N] and success [N]."""
    own = {"none": 0.0, "sparse": success, "dense": env_reward}
    if not config.learned:
        return np.asarray(own[config.reward], np.float32)
    assert learned is not None
    return np.asarray(config.reward_scale * learned + config.add_weight * own[config.add], np.float32)
