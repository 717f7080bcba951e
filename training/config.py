"""Settings of a training run. The defaults are the protocol of the paper (arXiv 2512.20675, section 3)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_reward.cameras import CameraSpec


@dataclass(frozen=True)
class TrainConfig:
    """Finetune a backbone with LoRA on demonstrations, by one objective."""

    objective: str = "triplet"
    """One of training.objectives.OBJECTIVES: triplet, tcn_text, r3m, vip_text, vip_text+vip, liv."""
    preset: Literal["paper", "official"] = "paper"
    """Where the paper and the original code of an objective differ: whose choice."""
    hyper: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    """Keywords of the objective that replace the preset's, e.g. `--hyper margin 0.2 temperature 0.1`."""
    backbone: str = "siglip2-tiny"
    """Dual encoder: a name under checkpoints/, a folder or a Hub id (google/siglip2-base-patch16-224)."""
    adapter: str | None = None
    """An adapter of the backbone to go on from: a name under checkpoints/, a folder or a Hub id. Its rank, scale
    and layers are kept; its `start_weight` is not, give it. None starts from the backbone alone."""
    dataset: str = "vlm-reward/demos-paper-v0"
    """Demonstrations: a Minari id (python -m training.collect writes one), the folder of a Minari dataset with
    image observations, or a LeRobotDataset v3.0 folder."""
    views: tuple[str, ...] = ()
    """Cameras of a dataset of your own to take, in order; all of them when not given."""
    instruction: str | None = None
    """The sentence of all episodes, for a dataset of your own that stores none."""
    cameras: CameraSpec = field(default_factory=CameraSpec)
    """What a dataset of training.collect must have been recorded with; it is stored with the adapter."""
    split: Literal["paper", "strict", "none"] = "paper"
    """Tasks that a dataset of Meta-World may hold; `none` for any."""
    leave_out: tuple[str, ...] = ()
    """Tasks of the dataset to leave out, as stand-ins for the unseen: choose recipes on them."""
    kinds: tuple[str, ...] = ("expert",)
    """Kinds of trajectories to learn from; the others in the dataset are left out."""

    scenes: tuple[Path, ...] = ()
    """Folders of training.scenes, whose images are ordered by sentences beside the objective (training.order);
    none, as in the paper, when not given."""
    order_weight: float = 100.0
    """Of the loss that orders them."""
    order_groups: int = 8
    """Scenes in a batch."""
    order_images: int = 8
    """Images of each of them."""
    scene_starts: bool = False
    """Score the images of a scene against one of them, whichever, as those of an episode are scored against its
    first (`start_weight`): what is merely unlike it is then worth nothing."""
    contrast_weight: float = 0.0
    """Of a loss by which the score less that under the opposite task's sentence rises along a demonstration, for
    the pairs in vlm_reward.tasks.OPPOSITES, and orders scenes; 0, as in the paper, for none."""

    lesson_weight: float = 0.0
    """Of a loss by which an instruction lies between its outcome and "the hand is there", over many things that no
    scene shows (training.language.lessons); 0, as in the paper, for none."""
    wrong_weight: float = 0.0
    """Of a loss by which the score under the sentences of a batch's other trajectories may not rise along a
    demonstration; 0, as in the paper, for none."""
    start_weight: float = 0.0
    """How much a score counts that a frame is unlike the first of its episode: the cosine with the direction from
    the first frame, times this, to the sentence (vlm_reward.similarity.toward); 0, as in the paper, for not."""
    rollouts: tuple[str, ...] = ()
    """Minari ids or folders of rollouts of training tasks, random, sub-optimal and by agents (training.collect
    train-rollouts, agent-rollouts), ordered by their true reward beside the objective; none, as in the paper, when
    not given."""
    rollout_weight: float = 100.0
    """Of the loss that orders them."""
    rollout_margin: float = 0.0
    """By how much the score should rise for each unit of true reward (of 10 in Meta-World); 0 asks for the order
    alone, so that much reward and a little more are told apart alike."""

    sampler: Literal["paper", "grouped"] = "paper"
    """paper: each sample draws its own frames. grouped: few trajectories, samples formed among them."""
    samples: int = 50_000
    """Samples in an epoch, evenly over trajectories."""
    epochs: int = 5
    """Passes over the samples."""
    batch_size: int = 32
    """Samples in a batch of the paper's sampler, over all processes."""
    group_trajectories: int = 8
    """Trajectories in a batch of the grouped sampler."""
    group_frames: int = 8
    """Frames of each of them."""
    max_steps: int | None = None
    """End (and anneal the learning rate) after this many steps instead of `epochs`."""
    validation_fraction: float = 0.1
    """Part of the trajectories held back for validation; 0 for none."""
    validation_seed: int = 0
    """Which are held back: the same for all seeds unless changed."""
    validate_every: int | None = None
    """Validate every so many steps beside the end of each epoch."""
    select: Literal["voc", "voc+listening"] = "voc"
    """What the kept adapter is best in: validation VOC, as in the paper; or the mean of it and of how often the
    right sentence of ten scores highest at the end of a held-back trajectory (with `contrast_weight`, and of
    the VOC of contrasts). Finetuning raises the first and lowers the second."""
    save_every: int = 500
    """Save the training state every so many steps beside each validation."""

    learning_rate: float | None = None
    """Peak of AdamW; the paper's when not given: 1e-4, for liv 1e-5."""
    final_learning_rate: float = 1e-6
    """End of the cosine decay."""
    weight_decay: float = 0.01
    """Of AdamW (the paper names none; this is PyTorch's default)."""
    lora_rank: int = 16
    """r of LoRA, on both towers."""
    lora_alpha: int = 32
    """Scale of LoRA."""
    lora_targets: tuple[str, ...] = ("attention", "mlp")
    """Which layers LoRA adapts."""
    head: bool = False
    """Train SigLIP's pooling attention, too, which LoRA leaves alone (not in the paper): it decides what of an
    image the embedding tells."""
    augment: bool = False
    """Small shifts and brightness changes of the training frames (not in the paper)."""

    seed: int = 0
    """Of LoRA's start and of each draw."""
    output: Path | None = None
    """Folder of the adapter; runs/<backbone>/<objective>/<preset>-seed<seed> when not given."""
    resume: bool = False
    """Go on where the run in `output` stopped, to the same weights as if it had not."""
    overwrite: bool = False
    """Replace the run in `output`."""
    cache: Path | None = None
    """Folder of the frame caches; $VLM_REWARD_CACHE or ~/.cache/vlm-reward when not given."""
    tensorboard: bool = True
    """Write scalars to <output>/tensorboard."""
    threads: int | None = None
    """CPU threads of PyTorch; its own choice when not given."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; weights and loss stay float32. auto: bfloat16 where the hardware has it."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu: do not use an accelerator that is there."""

    def __post_init__(self) -> None:
        for name in (
            "samples",
            "epochs",
            "batch_size",
            "group_trajectories",
            "group_frames",
            "save_every",
            "lora_rank",
            "order_groups",
            "order_images",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "validate_every", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        weights = (
            "order_weight",
            "contrast_weight",
            "lesson_weight",
            "wrong_weight",
            "start_weight",
            "rollout_weight",
        )
        for name in (*weights, "rollout_margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.scene_starts and not (self.scenes and self.start_weight):
            raise ValueError("scene_starts needs scenes, and a start_weight")
        if self.scene_starts and self.contrast_weight:
            raise ValueError(
                "scene_starts scores against one image, contrast_weight against a sentence: choose"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    @property
    def peak_learning_rate(self) -> float:
        """The paper's: 1e-4, for LIV 1e-5, unless `learning_rate` is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if self.objective == "liv" else 1e-4

    @property
    def folder(self) -> Path:
        """`output` or its default."""
        if self.output is not None:
            return self.output
        return Path("runs", Path(self.backbone).name, self.name, f"{self.preset}-seed{self.seed}")

    @property
    def name(self) -> str:
        """What is learned: the objective, and what was put beside it."""
        beside = {"order": self.scenes or self.rollouts, "contrast": self.contrast_weight}
        beside |= {
            "lesson": self.lesson_weight,
            "wrong": self.wrong_weight,
            "start": self.start_weight and not self.scene_starts,
            "starts": self.scene_starts,
            "head": self.head,
        }
        beside |= {"margin": self.rollout_margin and self.rollouts}
        return "+".join([self.objective, *(name for name, value in beside.items() if value)])

    def protocol(self) -> dict[str, Any]:
        """JSON-ready settings that decide the result: all but where it is written and how fast it runs."""
        apart = ("output", "resume", "overwrite", "cache", "tensorboard", "threads", "device", "save_every")
        fields = {key: value for key, value in asdict(self).items() if key not in apart}
        fields |= {"cameras": self.cameras.to_dict(), "learning_rate": self.peak_learning_rate}
        fields["scenes"] = [str(folder) for folder in self.scenes] or None
        fields["rollouts"] = self.rollouts or None
        for new in ("adapter", "head"):  # as in runs before there was one
            if not fields[new]:
                del fields[new]
        later_ones = (
            "scene_starts",
            "contrast_weight",
            "lesson_weight",
            "wrong_weight",
            "start_weight",
            "rollout_margin",
        )
        for later in later_ones:  # as in runs before there was one
            fields[later] = getattr(self, later) or None
        fields["rollout_weight"] = self.rollout_weight if self.rollouts else None
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
