"""How near the hand is to what a sentence names: a reward that looks for both in the patches of an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_reward.encoder import DualEncoder, portable_name
from vlm_reward.instructions import approach
from vlm_reward.reward_model import REACH, REACH_VERSION, RewardModel

NEAREST, FARTHEST = 0.01, 1.0
"""Metres: the score is 1 at the first or less, -1 at the second or more, linear in the logarithm between."""
_TYPICAL = math.log(0.15)  # of a distance in metres: where an untrained head begins
_OFFSET = 0.15  # of the image's half width: how finely a place is told within a patch
TABLE = ((-0.45, 0.35, 0.0), (0.45, 1.0, 0.45))
"""Corners of the box over Meta-World's table in which things are looked for, metres."""
STEP = 0.025
"""Metres between the places of it that are compared."""
SHARPNESS = 2.0
"""What the sum of the views' log-likelihoods is multiplied by before the softmax over places."""


class ReachHead(nn.Module):
    """Where in an image the hand is, where what a sentence names, and how far they are from each other.

    Both places are soft arg-maxes over the patches: the hand's has weights of its own, the thing's come from the
    inner product of patch and sentence. The distance is read from the patches there alone, and from the two
    places; so what else stands in a scene says nothing, once both are found.

    Args:
        patches: P of an image, a square grid.
        width: W of a patch.
        text_width: D of a sentence's embedding.
        asked: size of the inner product.
        kept: numbers that each place keeps of its patch.
        layers: of a transformer through which the patches go first, so that each knows of the others.
    """

    centres: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, patches: int, width: int, text_width: int, asked: int = 32, kept: int = 32, layers: int = 0
    ) -> None:
        super().__init__()
        if math.isqrt(patches) ** 2 != patches:
            raise ValueError(f"patches must be a square grid, got {patches}")
        self.sizes = {"patches": patches, "width": width, "text_width": text_width}
        self.sizes |= {"asked": asked, "kept": kept, "layers": layers}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                nhead=max(1, width // 64),
                dim_feedforward=2 * width,
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        if layers:
            self.position = nn.Parameter(torch.zeros(patches, width))
        self.asked, self.shown = nn.Linear(text_width, asked), nn.Linear(width, asked)
        self.hand, self.offsets = nn.Linear(width, 1), nn.Linear(width, 4)
        self.hand_kept, self.thing_kept = nn.Linear(width, kept), nn.Linear(width, kept)
        self.distance = nn.Sequential(
            nn.Linear(2 * kept + 7, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 1)
        )
        side = math.isqrt(patches)
        line = (torch.arange(side) + 0.5) / side * 2 - 1
        y, x = torch.meshgrid(-line, line, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).reshape(patches, 2), persistent=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @property
    def embedding_dim(self) -> int:
        """E, the size of what `look` gives."""
        kept = self.sizes["kept"] + 2
        return self.sizes["patches"] * (self.sizes["asked"] + kept) + kept

    def look(self, patches: torch.Tensor) -> torch.Tensor:
        """All that a sentence needs of an image: patches [M, P, W] -> float32 [M, E]."""
        patches = (patches.float() - self.mean) / self.std
        if self.layers:
            patches = patches + self.position
        for layer in self.layers:
            patches = layer(patches)
        offsets = _OFFSET * self.offsets(patches).unflatten(-1, (2, 2))
        places = self.centres[:, None] + offsets  # [M, P, 2 (hand, thing), 2]
        things = torch.cat([self.shown(patches), self.thing_kept(patches), places[:, :, 1]], -1)
        hands = torch.cat([self.hand_kept(patches), places[:, :, 0]], -1)
        hand = (self.hand(patches).softmax(1) * hands).sum(1)
        return torch.cat([things.flatten(1), hand], 1)

    def forward(
        self, looked: torch.Tensor, texts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images and sentences, one of each.

        Args:
            looked: [..., E], of `look`.
            texts: [..., D], unit norm; the leading dimensions are broadcast.

        Returns:
            The logarithm of the distance in metres [...]; where the hand is and where the thing, [..., 2] in
            [-1, 1] (right, up) of the image; and the logits of the thing's patch [..., P].
        """
        asked, kept, patches = (self.sizes[name] for name in ("asked", "kept", "patches"))
        things, hand = looked.split([looked.shape[-1] - kept - 2, kept + 2], -1)
        shown, values = things.unflatten(-1, (patches, -1)).split([asked, kept + 2], -1)
        query = self.asked(texts * math.sqrt(texts.shape[-1]))
        logits = (shown @ query[..., None])[..., 0] / math.sqrt(asked)
        thing = (logits.softmax(-1)[..., None, :] @ values)[..., 0, :]
        hand, at_hand = hand.split([kept, 2], -1)
        thing, at_thing = thing.split([kept, 2], -1)
        hand, at_hand = hand.expand_as(thing), at_hand.expand_as(at_thing)
        away = at_hand - at_thing
        far = away.norm(dim=-1, keepdim=True)
        seen = torch.cat([hand, thing, at_hand, at_thing, away, far], -1)
        return _TYPICAL + self.distance(seen)[..., 0], at_hand, at_thing, logits

    def save(self, file: Path) -> None:
        """Weights, as safetensors; the sizes go where `ReachModel` keeps its facts."""
        save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()}, file)


def triangulate(places: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
    """Where a point is that several views see: linear least squares.

    Args:
        places: [..., V, 2] in [-1, 1] (right, up), at least two views.
        projections: [V, 3, 4], of `vlm_reward.cameras.projections`.

    Returns:
        Metres, [..., 3].
    """
    rows = places[..., None] * projections[:, 2:] - projections[:, :2]  # [..., V, 2, 4]
    rows = rows.flatten(-3, -2)  # the inner product of each with (x, y, z, 1) is 0
    matrix, wanted = rows[..., :3], -rows[..., 3:]
    return torch.linalg.solve(matrix.mT @ matrix, matrix.mT @ wanted)[..., 0]


def agree(logits: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
    """Where all views together see a thing: the places over the table, weighted by their likelihood in all.

    Args:
        logits: [N, V, K, P], how likely each patch of a square grid is the thing's.
        projections: [V, 3, 4].

    Returns:
        Metres, [N, K, 3].
    """
    count, views, texts, patches = logits.shape
    side = math.isqrt(patches)
    line = [torch.arange(low, high + STEP / 2, STEP) for low, high in zip(*TABLE, strict=True)]
    places = torch.cartesian_prod(*line).to(logits)
    seen = torch.cat([places, torch.ones_like(places[:, :1])], 1) @ projections.mT  # [V, G, 3]
    seen = seen[..., :2] / seen[..., 2:] * seen.new_tensor((1, -1))
    likely = logits.log_softmax(-1)
    maps = likely.permute(1, 0, 2, 3).reshape(views, count * texts, side, side)
    found = nn.functional.grid_sample(maps, seen[:, :, None], padding_mode="border", align_corners=False)
    found = found[..., 0]  # [V, N K, G]
    outside = (seen.abs() > 1).any(-1)[:, None]
    found = torch.where(outside, maps.flatten(2).amin(-1, keepdim=True), found)
    weights = (SHARPNESS * found.sum(0)).softmax(-1)  # [N K, G]
    return (weights @ places).reshape(count, texts, 3)


class ReachModel(RewardModel):
    """Scores frames by how near the hand is to what a sentence names first, and by nothing else.

    With a `start_weight` of 1 all views are looked at together: the thing is where they agree that it was in the
    first frame of the episode, the hand where they see it now, and the score says how far from each other these
    places are. So no pose of the hand makes the thing look nearer; but a thing that moves is not followed. The
    score is then one for all views, of which it takes two at least.

    "open the green drawer" and "close the green drawer" have one score. So it is a reward of its own only where to
    be at a place is what is asked; else it is a part of an ensemble, beside models that know what is asked, in the
    place of asking them for the hand in words (their `approach_weight`). It knows the hand that it was trained
    with, Meta-World's, by the cameras of its `camera_spec`.

    Args:
        encoder: a SigLIP of fixed resolution, whose patches and sentences the head was trained with, frozen.
        head: see `ReachHead`.
        options: `camera_spec`, `crops`, `start_weight` (0 or 1), `metadata` and `dtype`, as of a `RewardModel`.
            For a start_weight the metadata have `projections`, of `vlm_reward.cameras.projections`, by camera.

    Example:
        >>> model = RewardModel.from_pretrained("siglip2-tiny-soup/reach")
        >>> model.score(frames, "open the drawer")  # 1 at 1 cm, 0 at 10 cm, -1 at 1 m: float32 [N, V]
    """

    one_space = False
    _reads_patches = True

    def __init__(self, encoder: DualEncoder, head: ReachHead, **options: Any) -> None:
        super().__init__(encoder, **options)
        found = encoder.patches, encoder.patch_width, encoder.embedding_dim
        wanted = tuple(head.sizes[name] for name in ("patches", "width", "text_width"))
        if found != wanted:
            raise ValueError(
                f"the head is of another backbone: patches, their width and that of sentences are {wanted}, "
                f"those of {encoder.name or 'the backbone'} {found}"
            )
        self.head = head.requires_grad_(False).to(encoder.device).eval()
        self.projections: torch.Tensor | None = None
        if not self.start_weight:
            return
        if self.start_weight != 1:
            raise ValueError(
                "a reach model looks at each frame alone (start_weight 0) or for the thing in the first (1), "
                f"got {self.start_weight}"
            )
        cameras = self.camera_spec.cameras if self.camera_spec else ()
        if len(cameras) < 2:
            raise ValueError(
                "to look for the thing in the first frame takes two views at least: got "
                f"{', '.join(cameras) or 'no cameras'}; with a start_weight of 0 one will do"
            )
        known = self.metadata.get("projections", {})
        if missing := set(cameras) - set(known):
            raise ValueError(
                f"there is no projection of {', '.join(sorted(missing))}, which a start_weight of 1 needs: train "
                "the model again with python -m training.reach, or take 0"
            )
        matrices = torch.tensor([known[camera] for camera in cameras], dtype=torch.float32)
        self.projections = matrices.to(encoder.device)

    @property
    def embedding_dim(self) -> int:
        """E of `embed`: what a sentence needs of an image, see `ReachHead.look`."""
        return self.head.embedding_dim

    @property
    def is_part(self) -> bool:
        """Whether it is saved without its backbone."""
        return True

    def with_approach_weight(self, approach_weight: float) -> "ReachModel":
        """Itself without one; ValueError else: it asks for nothing but the hand."""
        if approach_weight:
            raise ValueError(
                f"a reach model asks for nothing but the hand: approach_weight must be 0, got {approach_weight}"
            )
        return self

    def with_judge(self, judge: RewardModel) -> RewardModel:
        """Refused: how near the hand is says nothing of what is so."""
        raise ValueError("a reach model takes no judge: give one to a model that scores what is asked")

    def _like_this(self, **changed: Any) -> "ReachModel":
        own = ("camera_spec", "crops", "start_weight", "metadata")
        same = {name: changed.get(name, getattr(self, name)) for name in own}
        return ReachModel(self.encoder, self.head, **same, dtype=self.dtype)

    def _read(self, images: torch.Tensor, patches: torch.Tensor | None) -> torch.Tensor:
        assert patches is not None
        with torch.autocast(patches.device.type, enabled=False):  # places to a fraction of a pixel
            return self.head.look(patches)

    def _embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._embed_sentences([texts] if isinstance(texts, str) else [approach(t) or t for t in texts])

    def _compare(
        self, images: torch.Tensor, texts: Sequence[str], starts: torch.Tensor | None, *, each: bool
    ) -> torch.Tensor:
        said = self._embed_texts(texts).float()
        texts_of = said[:, None, None] if each else said
        if starts is None:
            far = self.head(images[:, :, None], texts_of)[0]
        else:
            assert self.projections is not None  # as there is a start_weight
            hand = triangulate(images[..., -2:], self.projections)
            thing = agree(self.head(starts[:, :, None], texts_of)[3], self.projections)
            far = (hand[:, None] - thing).norm(dim=-1).clamp(min=NEAREST).log()
            far = far[:, None].expand(-1, images.shape[1], -1)
        share = (far - math.log(NEAREST)) / math.log(FARTHEST / NEAREST)
        return 1 - 2 * share.clamp(0, 1)

    def _write(self, folder: Path, final: Path) -> None:
        self.head.save(folder / REACH)

    def _facts(self, final: Path) -> dict[str, Any]:
        own = {"format_version": REACH_VERSION, "backbone": portable_name(self.encoder.name, final)}
        return super()._facts(final) | own | {"reach": self.head.sizes}


def load_head(file: Path, sizes: Any) -> ReachHead:
    """The head in a file of `ReachHead.save`.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or not of these sizes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; copy or train it again")
    try:
        head = ReachHead(**sizes)
        head.load_state_dict(load_file(file))
    except Exception as error:  # safetensors', torch's and Python's own
        raise ValueError(f"{file} is damaged ({error}); train it again: python -m training.reach") from error
    return head
