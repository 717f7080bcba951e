"""Several reward models asked at once: what they agree on counts, what one alone sees in a scene is outvoted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_reward._card import chosen
from vlm_reward.encoder import portable_name
from vlm_reward.reward_model import ASKED_VERSION, ENSEMBLE_VERSION, RewardModel, embed_together


class Ensemble(RewardModel):
    """The weighted mean of the scores of several models of the same cameras.

    Models whose backbones were trained apart err apart in a scene that none of them knows. It is used like any
    `RewardModel`, of which `from_pretrained` gives it by its name, and costs what its members cost together.

    Args:
        members: two or more; each with its own resolution, crops, start_weight and judge.
        weights: one of each, above 0: the share of its score. Scaled to sum to 1.
        approach_weight: of each member, in the place of its own; None leaves them theirs.
        names: what `RewardModel.from_pretrained` finds the members by; needed to save it. An ensemble that a
            `with_...` method changed has none: it cannot be saved, for its members are saved as they are.
        metadata: JSON-ready facts to save with it.

    Raises:
        ValueError: fewer than two members, ensembles among them, a name given twice, other cameras than the
            first one's, weights that do not fit.
    """

    one_space = False

    def __init__(
        self,
        members: Sequence[RewardModel],
        weights: Sequence[float],
        *,
        approach_weight: float | None = None,
        names: Sequence[str] = (),
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if len(members) < 2:
            raise ValueError(f"an ensemble needs two members or more, got {len(members)}")
        if len(weights) != len(members) or not all(0 < weight < np.inf for weight in weights):
            raise ValueError(f"give {len(members)} weights above 0, one of each member, got {list(weights)}")
        if len(set(names)) != len(names):
            raise ValueError(f"each member counts once, got {', '.join(names)}")
        if any(isinstance(member, Ensemble) for member in members):
            raise ValueError("an ensemble takes models, not other ensembles: give it their members")
        spec = members[0].camera_spec
        if any(member.camera_spec != spec for member in members):
            raise ValueError("the members of an ensemble must have been trained with the same cameras")
        if approach_weight is not None:
            members = _asked(members, approach_weight)
        super().__init__(
            members[0].encoder,
            camera_spec=spec,
            start_weight=max(member.start_weight for member in members),
            approach_weight=max(member.approach_weight for member in members),
            metadata=metadata,
            dtype=members[0].dtype,
        )
        self.members, self.names = tuple(members), tuple(names)
        self._asked = approach_weight
        self.weights = [float(weight / sum(weights)) for weight in weights]

    def look(self, frames: Any) -> Any:
        """Whole frames at `image_size`, of which each member takes what it looks at: uint8 [..., V, S, S, 3]."""
        return super().look(frames)

    def embed(self, frames: np.ndarray | torch.Tensor, batch_size: int | None = None) -> np.ndarray:
        """The members' image embeddings, one behind the other, for `compare`: float32 [N, V, sum of D]."""
        return super().embed(frames, batch_size)

    @property
    def image_size(self) -> int:
        """Side of frames that lose nothing of what some member sees, pixels."""
        sides = [next(iter(member.crops.values())).side if member.crops else 1.0 for member in self.members]
        sizes = [member.image_size for member in self.members]
        return max(round(size / side) for size, side in zip(sizes, sides, strict=True))

    @property
    def sees_parts(self) -> bool:
        """Whether some member does."""
        return any(member.sees_parts for member in self.members)

    def with_small_frames(self) -> "Ensemble":
        """This ensemble: what `look` gives are whole images, of which each member takes its own part."""
        return self

    def embed_start(self, frames: np.ndarray | torch.Tensor) -> np.ndarray:
        """First frames, as `score` and `compare` take them: those of the members, one behind the other."""
        return np.concatenate([member.embed_start(frames) for member in self.members], axis=-1)

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """The members' text embeddings, one behind the other: float32 [T, sum of D]."""
        return np.concatenate([member.embed_text(texts) for member in self.members], axis=-1)

    def with_cameras(self, cameras: Sequence[str]) -> "Ensemble":
        """As `RewardModel.with_cameras`."""
        return self._of([member.with_cameras(cameras) for member in self.members])

    def with_start_weight(self, start_weight: float) -> "Ensemble":
        """As `RewardModel.with_start_weight`, of each member but reach models."""
        return self._of([m.with_start_weight(start_weight) if m.one_space else m for m in self.members])

    def with_approach_weight(self, approach_weight: float) -> "Ensemble":
        """As `RewardModel.with_approach_weight`, of each member but reach models."""
        return self._of(_asked(self.members, approach_weight))

    def with_any_views(self) -> "Ensemble":
        """As `RewardModel.with_any_views`."""
        return self._of([member.with_any_views() for member in self.members])

    def with_judge(self, judge: RewardModel) -> RewardModel:
        """Refused: the members have their own."""
        raise ValueError("an ensemble takes no judge: give one to its members")

    def _of(self, members: Sequence[RewardModel]) -> "Ensemble":
        return Ensemble(members, self.weights, metadata=self.metadata)

    def _embed_frames(self, frames: np.ndarray | torch.Tensor, batch_size: int | None) -> torch.Tensor:
        alike: dict[Any, list[int]] = {}
        for place, member in enumerate(self.members):
            crops = tuple((member.crops or {}).items())
            alike.setdefault((id(member.encoder), crops, member.dtype), []).append(place)
        parts: dict[int, torch.Tensor] = {}
        for places in alike.values():
            embedded = embed_together([self.members[place] for place in places], frames, batch_size)
            parts |= zip(places, embedded, strict=True)
        return torch.cat([parts[place] for place in range(len(self.members))], dim=-1)

    def _start_width(self, width: int) -> int:
        return sum(self._start_widths)

    def _compare(
        self, images: torch.Tensor, texts: Sequence[str], starts: torch.Tensor | None, *, each: bool
    ) -> torch.Tensor:
        own = images.split(self._widths, dim=-1)
        began: Sequence[torch.Tensor | None] = [None] * len(self.members)
        if starts is not None:
            began = [
                start if member.start_weight else None
                for member, start in zip(self.members, starts.split(self._start_widths, dim=-1), strict=True)
            ]
        return torch.stack(
            [
                weight * member._compare(image, texts, start, each=each)
                for member, weight, image, start in zip(self.members, self.weights, own, began, strict=True)
            ]
        ).sum(0)

    @property
    def _widths(self) -> list[int]:
        return [member.embedding_dim for member in self.members]

    @property
    def _start_widths(self) -> list[int]:
        return [member._start_width(width) for member, width in zip(self.members, self._widths, strict=True)]

    def _write(self, folder: Path, final: Path) -> None:
        if len(self.names) != len(self.members):
            raise ValueError("an ensemble is saved by the names of its members, unchanged: give names")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """As `RewardModel.push_to_hub`; ValueError where a member is a folder of this machine."""
        if local := [name for name in self.names if Path(portable_name(name, Path(repo_id))).is_absolute()]:
            raise ValueError(
                f"nobody else can load {', '.join(local)}: push the members first, load them by Hub id"
            )
        return super().push_to_hub(repo_id, **options)

    def _facts(self, final: Path) -> dict[str, Any]:
        names = [portable_name(name, final) for name in self.names]
        own = {"format_version": ENSEMBLE_VERSION, "camera_spec": super()._facts(final)["camera_spec"]}
        own |= {
            "start_weight": self.start_weight,
            "members": dict(zip(names, self.weights, strict=True)),
        }
        if self._asked is not None:
            own |= {"format_version": ASKED_VERSION, "approach_weight": self._asked}
        facts = {key: value for key, value in self.metadata.items() if key not in own}
        return own | facts | ({"evaluation": chosen(facts["evaluation"])} if "evaluation" in facts else {})


def _asked(members: Sequence[RewardModel], approach_weight: float) -> list[RewardModel]:
    """Members, of which those that can also ask for the hand in words; a reach model asks for nothing else."""
    return [m.with_approach_weight(approach_weight) if m.one_space else m for m in members]
