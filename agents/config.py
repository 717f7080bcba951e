"""Settings of an agent's run. Hyper-parameters not given are the algorithm's, known to work on Meta-World."""

import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vlm_reward.envs import MAX_EPISODE_STEPS
from vlm_reward.similarity import OverViews
from vlm_reward.tasks import check_task, instruction

Transform = Literal["raw", "difference", "potential", "goal-baseline"]
BestBy = Literal["learned", "success"]

SAC_DEFAULTS: dict[str, Any] = {
    "envs": 1,
    "learning_rate": 3e-4,
    "batch_size": 256,
    "net_width": 256,
    "net_layers": 3,
    "ent_coef": "auto_0.1",
    "normalize_obs": False,
    "normalize_reward": False,
}
"""Three layers of 256: two are too few for most of Meta-World. The reward's scale is left to `ent_coef`."""
PPO_DEFAULTS: dict[str, Any] = {
    "envs": 4,
    "learning_rate": 3e-4,
    "batch_size": 128,
    "net_width": 256,
    "net_layers": 2,
    "ent_coef": "0.0",
    "normalize_obs": True,
    "normalize_reward": True,
}
"""PPO wants observations and returns of unit scale, and several environments."""
DEFAULTS = {"sac": SAC_DEFAULTS, "ppo": PPO_DEFAULTS}
ITS_OWN = {
    "sac": ("tau", "train_freq", "gradient_steps", "learning_starts"),
    "ppo": ("rollout_steps", "epochs", "gae_lambda", "clip_range"),
}
"""Settings that mean nothing to the other."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """From frames to the reward that an agent sees."""

    instruction: str | None = None
    """What the robot should do; the task's sentence when not given (of a dataset: each episode's own)."""
    transform: Transform = "raw"
    """Scores to reward: the score; its difference to the step before; potential-based shaping of what
    `--add` gives; or the score regularised by the sentence `--baseline`."""
    baseline: str = "a robot arm at a table"
    """With goal-baseline: the scene without the goal."""
    baseline_strength: float = 0.5
    """With goal-baseline: 0 is the plain score, 1 looks along the line from baseline to goal alone."""
    start_weight: float | None = None
    """How much it counts that a frame is unlike the first of its episode (vlm_reward.similarity.toward); 0 for
    not. The checkpoint's own when not given."""
    approach_weight: float | None = None
    """How much it counts that the hand is at what the sentence names (vlm_reward.instructions); 0 for not. The
    checkpoint's own when not given."""
    over_views: OverViews = "mean"
    """Score of a frame: the mean of its views, or their median: no higher than what two of three say."""
    add: Literal["none", "sparse", "dense"] = "none"
    """Add the environment's own reward to the learned one."""
    add_weight: float = 1.0
    """Weight of what `--add` adds."""
    reward_scale: float = 1.0
    """The agent sees the learned reward times this; logs and results do not."""
    device: Literal["auto", "cpu"] = "auto"
    """Where the reward model runs; the agent is small and stays on the CPU."""


@dataclass(frozen=True)
class AgentConfig(RewardConfig):
    """Train an agent on one Meta-World task, on the reward of your choice."""

    algo: Literal["sac", "ppo"] = "sac"
    """sac learns from far fewer steps; ppo needs far less computation a step."""
    task: str = "drawer-close-v3"
    """One of the 50 Meta-World tasks (vlm_reward.tasks)."""
    reward: str = "dense"
    """dense (the task's own), sparse (1 at each step that succeeds), zero-shot (the bare backbone), or a
    checkpoint: a folder, a name under checkpoints/ such as siglip2-tiny/triplet+order+start, or a Hub id."""
    timesteps: int = 100_000
    """Environment steps, over all environments; ppo makes whole rollouts, so up to one more."""
    seed: int = 0
    """Of the networks, the exploration and the episodes."""

    backbone: str = "siglip2-tiny"
    """What `--reward zero-shot` scores with."""
    cameras: tuple[str, ...] = ()
    """Views to score, out of the model's; all of them when not given. Rendering costs most of a step."""
    score_every: int = 1
    """Render and score each k-th step, and hold the score between."""
    monitor: str | None = None
    """With dense or sparse reward: a checkpoint whose score is logged as the learned return, unused."""

    horizon: int = 150
    """Steps of an episode; it is truncated, never terminated."""
    envs: int | None = None
    """Environments side by side: 1 for sac, 4 for ppo."""
    processes: bool | None = None
    """An own process for each environment; when not given, where there are several and frames to render."""
    threads: int = 1
    """Threads of PyTorch in the main process; small networks gain nothing from more."""

    learning_rate: float | None = None
    """Of all networks: 3e-4."""
    batch_size: int | None = None
    """Transitions a gradient step: 256 for sac, 128 for ppo."""
    net_width: int | None = None
    """Units of a hidden layer: 256."""
    net_layers: int | None = None
    """Hidden layers: 3 for sac, 2 for ppo."""
    ent_coef: str | None = None
    """Weight of the entropy: auto_0.1 for sac (learned, from 0.1 on), 0.0 for ppo; or a number."""
    normalize_obs: bool | None = None
    """Bring observations to mean 0 and variance 1 (ppo: yes)."""
    normalize_reward: bool | None = None
    """Divide the reward by the deviation of the discounted return (ppo: yes)."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.005
    """sac: how far the target networks move a gradient step."""
    train_freq: int = 1
    """sac: steps of each environment between two rounds of training."""
    gradient_steps: int = 1
    """sac: gradient steps a round."""
    learning_starts: int = 3_000
    """sac: steps of random actions before training begins."""
    buffer_size: int | None = None
    """sac: transitions kept; all of the run when not given."""
    rollout_steps: int = 512
    """ppo: steps of each environment between two rounds of training."""
    epochs: int = 10
    """ppo: passes over the transitions a round."""
    gae_lambda: float = 0.95
    """ppo: bias against variance of the advantages."""
    clip_range: float = 0.2
    """ppo: how far the policy may move a round."""

    eval_every: int = 10_000
    """Evaluate, and save, every so many steps."""
    eval_episodes: int = 20
    """Episodes of an evaluation; their placements are the same each time."""
    best_by: BestBy | None = None
    """Which agent is kept as `best`, at the evaluations: the one whose last `hacking_window` episodes of training
    had the highest learned return, which takes no true reward; or the one that succeeds most often. learned
    for a learned reward alone, else success."""
    hacking_window: int = 20
    """Episodes in each of the windows that the reward-hacking warning compares, and `best_by` learned."""
    keep_frames: bool = False
    """sac: keep every frame, at the model's resolution, so that agents.relabel can score them again; with a
    learned reward or --monitor, and --score-every 1."""
    buffer: Path | None = None
    """sac: start with the transitions of this file (a run's last/replay.npz, or one of agents.relabel)."""
    output: Path | None = None
    """Folder of the run; runs/agents/<task>/<reward>/<algo>-seed<seed> when not given."""
    results: Path = Path("runs/agents/agents.json")
    """JSON rows; the run's row is added at its end, or replaced. The README's: agents/results/agents.json."""
    label: str | None = None
    """Name of the reward in the results; made of the settings above when not given."""
    resume: bool = False
    """Go on where the run in `output` stopped; a larger --timesteps prolongs it."""
    overwrite: bool = False
    """Replace the run in `output`."""

    def __post_init__(self) -> None:
        check_task(self.task)
        at_least_one = ("timesteps", "score_every", "threads", "train_freq", "rollout_steps", "epochs")
        optional = ("envs", "batch_size", "net_width", "net_layers", "buffer_size")
        for name in (*at_least_one, *optional, "gradient_steps", "eval_every", "eval_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("gamma", "tau", "gae_lambda"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not self.clip_range > 0:
            raise ValueError(f"clip_range must be above 0, got {self.clip_range}")
        of_frames = (self.instruction, self.start_weight, self.approach_weight, self.over_views)
        plain = (None, None, None, "mean")
        if not self.scored_by and (self.cameras or self.score_every > 1 or of_frames != plain):
            raise ValueError(
                "cameras, over_views, score_every, instruction, start_weight and approach_weight need frames: a "
                "learned reward, or --monitor"
            )
        for algo, names in ITS_OWN.items():
            given = [name for name in names if getattr(self, name) != getattr(AgentConfig, name)]
            if given and algo != self.algo:
                raise ValueError(f"{', '.join(given)} are settings of {algo} and mean nothing to {self.algo}")
        if not (math.isfinite(self.reward_scale) and self.reward_scale > 0):
            raise ValueError(f"reward_scale must be finite and above 0, got {self.reward_scale}")
        if not 1 <= self.horizon <= MAX_EPISODE_STEPS:
            raise ValueError(f"horizon must be in [1, {MAX_EPISODE_STEPS}], got {self.horizon}")
        if self.best_by == "learned" and not self.scored_by:
            raise ValueError("best_by learned needs a learned return: a learned reward, or --monitor")
        if self.hacking_window < 2:
            raise ValueError(f"hacking_window must be at least 2, got {self.hacking_window}")
        automatic = self.algo == "sac" and str(self.ent_coef).startswith("auto")
        if self.ent_coef is not None and not automatic:
            try:
                float(self.ent_coef)
            except ValueError:
                raise ValueError(
                    f"ent_coef must be a number, for sac also auto or auto_<first value>; got {self.ent_coef!r}"
                ) from None
        if self.learned and self.monitor:
            raise ValueError("monitor is for --reward dense or sparse: a learned reward is logged anyway")
        if self.add == "none" and self.add_weight != 1:
            raise ValueError("add_weight is the weight of what --add adds: give --add sparse or dense, too")
        if not self.learned and (self.add != "none" or self.transform != "raw" or self.reward_scale != 1):
            raise ValueError(f"add, transform and reward_scale need a learned reward, not {self.reward!r}")
        if self.transform == "potential" and self.add == "none":
            raise ValueError(
                "a potential alone prefers no policy (its return is the same for all): give --add sparse or dense"
            )
        if self.keep_frames and (self.algo != "sac" or not self.scored_by or self.score_every > 1):
            raise ValueError(
                "keep_frames needs --algo sac, frames (a learned reward, or --monitor) and --score-every 1"
            )
        if self.buffer and self.algo != "sac":
            raise ValueError("buffer needs --algo sac: ppo forgets its transitions")

    @property
    def learned(self) -> bool:
        """Whether the agent learns from a model's score."""
        return self.reward not in ("dense", "sparse")

    @property
    def scored_by(self) -> str | None:
        """The model that scores frames, as reward or to be watched; None: nothing is rendered."""
        if not self.learned:
            return self.monitor
        return self.backbone if self.reward == "zero-shot" else self.reward

    @property
    def keeps_best_by(self) -> BestBy:
        """`best_by` or its default."""
        alone = self.learned and self.transform == "raw" and self.add == "none"
        return self.best_by or ("learned" if alone else "success")

    @property
    def sentence(self) -> str:
        """`instruction` or the task's."""
        return instruction(self.task) if self.instruction is None else self.instruction

    @property
    def reward_label(self) -> str:
        """How results name the reward: `dense`, `siglip2-tiny/triplet, difference, corner`."""
        if self.label:
            return self.label
        parts = [self.reward]
        if self.learned:
            parts += [f'"{self.sentence}"'] if self.sentence != instruction(self.task) else []
            parts += [self.transform] if self.transform != "raw" else []
            parts += [f"start {self.start_weight:g}"] if self.start_weight is not None else []
            parts += [f"approach {self.approach_weight:g}"] if self.approach_weight is not None else []
            parts += [f"scale {self.reward_scale:g}"] if self.reward_scale != 1 else []
            parts += [f"+{self.add}"] if self.add != "none" else []
            parts += ["+".join(self.cameras)] if self.cameras else []
            parts += [self.over_views] if self.over_views != "mean" else []
        parts += [f"gamma {self.gamma:g}"] if self.gamma != AgentConfig.gamma else []
        if self.algo == "sac":
            updates = self.gradient_steps / (self.train_freq * self.setting("envs"))
            parts += [f"{updates:g} updates a step"] if updates != 1 else []
        return ", ".join(parts)

    @property
    def folder(self) -> Path:
        """`output` or its default."""
        if self.output is not None:
            return self.output
        name = re.sub(r"[^\w.+-]+", "-", self.reward_label).strip(".-")
        return Path("runs", "agents", self.task, name, f"{self.algo}-seed{self.seed}")

    def setting(self, name: str) -> Any:
        """A hyper-parameter as given, else the algorithm's own."""
        value = getattr(self, name)
        return DEFAULTS[self.algo][name] if value is None else value

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AgentConfig":
        """The inverse of `to_dict`; ValueError for a field of another version."""
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        paths = {key: Path(values[key]) for key in ("buffer", "output", "results") if values.get(key)}
        return cls(**{**values, **paths, "cameras": tuple(values.get("cameras", ()))})

    @classmethod
    def of_run(cls, folder: Path) -> "AgentConfig":
        """The settings of the run in `folder`; FileNotFoundError when there is none."""
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"no run in {folder}: there is no {file}")
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged or of another version ({error})") from error

    def protocol(self) -> dict[str, Any]:
        """The settings that decide the result: what a resumed run may not change."""
        apart = ("timesteps", "output", "results", "label", "resume", "overwrite", "threads", "device")
        loose = (
            "eval_every",
            "eval_episodes",
            "best_by",
            "hacking_window",
            "processes",
            "buffer",
            "buffer_size",
        )
        return {key: value for key, value in self.to_dict().items() if key not in (*apart, *loose)}
