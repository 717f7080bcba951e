"""How near the hand is to what a sentence names: a reward that looks for both in the patches of an image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_reward.encoder import DualEncoder, portable_name
from vlm_reward.instructions import approach
from vlm_reward.reward_model import FINDER, REACH, REACH_VERSION, RewardModel

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
        self.register_buffer("centres", _centres(math.isqrt(patches)), persistent=False)
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


class _Residual(nn.Module):
    """Two convolutions whose result is added; none at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(second.weight)
        norms = (nn.GroupNorm(8, channels) for _ in range(2))
        self.layers = nn.Sequential(next(norms), nn.GELU(), first, next(norms), nn.GELU(), second)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.layers(images)


class Finder(nn.Module):
    """Where in an image the thing is that a sentence names, to a fraction of a patch.

    The patches of a backbone know what stands where, but no finer than they are wide. So they are joined with the
    pixels by convolutions, a U-Net of three levels (Ronneberger et al. 2015, arXiv 1505.04597) with a layer of a
    transformer at the lowest, which gives each *cell* of 4 x 4 pixels a vector; its inner product with the
    sentence says how likely the thing is there.

    Args:
        image_size: S of the backbone's images, pixels, a multiple of 8.
        patches: P of an image, a square grid.
        width: W of a patch.
        text_width: D of a sentence's embedding.
        asked: A, size of the inner product.
    """

    centres: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, image_size: int, patches: int, width: int, text_width: int, asked: int = 32) -> None:
        super().__init__()
        if image_size % 8 or math.isqrt(patches) ** 2 != patches:
            raise ValueError(
                "images must have a multiple of 8 pixels a side and patches be a square grid, got "
                f"{image_size} and {patches}"
            )
        self.sizes = {"image_size": image_size, "patches": patches, "width": width}
        self.sizes |= {"text_width": text_width, "asked": asked}
        low, fine, coarse, high = 24, 48, 96, 64
        self.stem = nn.Sequential(
            nn.Conv2d(3, low, 4, 2, 1), nn.GELU(), nn.Conv2d(low, fine, 4, 2, 1), _Residual(fine)
        )
        self.down = nn.Conv2d(fine, coarse, 4, 2, 1)
        self.patch = nn.Conv2d(width, coarse, 1)
        self.position = nn.Parameter(torch.zeros(coarse, image_size // 8, image_size // 8))
        self.middle = nn.Sequential(_Residual(coarse), _Residual(coarse))
        self.layer = nn.TransformerEncoderLayer(
            coarse,
            nhead=4,
            dim_feedforward=2 * coarse,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        self.up, self.skip = nn.Conv2d(coarse, high, 1), nn.Conv2d(fine, high, 1)
        self.last = nn.Sequential(
            _Residual(high), nn.GroupNorm(8, high), nn.GELU(), nn.Conv2d(high, asked, 1)
        )
        self.asked = nn.Linear(text_width, asked)
        self.register_buffer("centres", _centres(image_size // 4), persistent=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @property
    def embedding_dim(self) -> int:
        """E, the size of what `look` gives: cells x A."""
        return len(self.centres) * self.sizes["asked"]

    def look(self, pixels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """All that a sentence needs of an image.

        Args:
            pixels: float [M, 3, S, S], as the backbone takes them.
            patches: [M, P, W], what it gives.

        Returns:
            float32 [M, E].
        """
        patches = (patches.float() - self.mean) / self.std
        side = math.isqrt(patches.shape[1])
        fine = self.stem(pixels.float())
        coarse = self.down(fine)
        seen = self.patch(patches.mT.unflatten(-1, (side, side)))
        coarse = coarse + nn.functional.interpolate(seen, coarse.shape[-2:], mode="bilinear") + self.position
        coarse = self.middle(coarse)
        tokens = self.layer(coarse.flatten(2).mT)
        coarse = self.up(tokens.mT.unflatten(-1, coarse.shape[-2:]))
        joined = nn.functional.interpolate(coarse, fine.shape[-2:], mode="bilinear") + self.skip(fine)
        return self.last(joined).flatten(2).mT.flatten(1)

    def forward(self, looked: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """How likely each cell is the thing's.

        Args:
            looked: [..., E], of `look`.
            texts: [..., D], unit norm; the leading dimensions are broadcast.

        Returns:
            Logits [..., cells], row by row from the upper left.
        """
        asked = self.sizes["asked"]
        query = self.asked(texts * math.sqrt(texts.shape[-1]))
        return (looked.unflatten(-1, (-1, asked)) @ query[..., None])[..., 0] / math.sqrt(asked)


def _centres(side: int) -> torch.Tensor:
    """Middles of a square grid's cells, row by row from the upper left: [side^2, 2] in [-1, 1] (right, up)."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-line, line, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


Part = TypeVar("Part", ReachHead, Finder)


def save_weights(module: nn.Module, file: Path) -> None:
    """Weights, as safetensors; the sizes go where `ReachModel` keeps its facts."""
    save_file({name: value.contiguous().cpu() for name, value in module.state_dict().items()}, file)


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
    first frame of the episode (`locate`), the hand where they see it now, and the score says how far from each
    other these places are. So no pose of the hand makes the thing look nearer; but a thing that moves is not
    followed. The score is then one for all views, of which it takes two at least.

    "open the green drawer" and "close the green drawer" have one score. So it is a reward of its own only where to
    be at a place is what is asked; else it is a part of an ensemble, beside models that know what is asked, in the
    place of asking them for the hand in words (their `approach_weight`). It knows the hand that it was trained
    with, Meta-World's, by the cameras of its `camera_spec`.

    Args:
        encoder: a SigLIP of fixed resolution, whose patches and sentences the head was trained with, frozen.
        head: see `ReachHead`.
        finder: see `Finder`; without one the head looks for the thing in the first frame, too.
        options: `camera_spec`, `crops`, `start_weight` (0 or 1), `metadata` and `dtype`, as of a `RewardModel`.
            For a start_weight the metadata have `projections`, of `vlm_reward.cameras.projections`, by camera.

    Example:
        >>> model = RewardModel.from_pretrained("siglip2-tiny-soup/reach")
        >>> model.score(frames, "open the drawer")  # 1 at 1 cm, 0 at 10 cm, -1 at 1 m: float32 [N, V]
    """

    one_space = False
    _reads_patches = True

    def __init__(
        self, encoder: DualEncoder, head: ReachHead, finder: Finder | None = None, **options: Any
    ) -> None:
        super().__init__(encoder, **options)
        found = encoder.patches, encoder.patch_width, encoder.embedding_dim
        for name, module in (("head", head), ("finder", finder)):
            wanted = (
                tuple(module.sizes[size] for size in ("patches", "width", "text_width")) if module else found
            )
            if found != wanted:
                raise ValueError(
                    f"the {name} is of another backbone: patches, their width and that of sentences are {wanted}, "
                    f"those of {encoder.name or 'the backbone'} {found}"
                )
        self.head = head.requires_grad_(False).to(encoder.device).eval()
        self.finder = finder and finder.requires_grad_(False).to(encoder.device).eval()
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
        return ReachModel(self.encoder, self.head, self.finder, **same, dtype=self.dtype)

    def embed_start(self, frames: np.ndarray | torch.Tensor) -> np.ndarray:
        """First frames, as `score` and `compare` take them: float32 [N, V, D'], what finder or head look for."""
        self._check_frames(frames)
        if self.finder is None:
            return self.embed(frames)
        images: Any = self.look(frames)
        images = images.reshape(-1, *images.shape[2:])
        parts = []
        with torch.inference_mode():
            for first in range(0, len(images), 32):
                pixels = self.encoder.preprocess(images[first : first + 32])
                with self._inference():
                    patches = self.encoder.encode_patches(pixels)[1]
                parts.append(self.finder.look(pixels, patches).cpu())
        return torch.cat(parts).reshape(*frames.shape[:2], -1).numpy()

    def _start_width(self, width: int) -> int:
        return width if self.finder is None else self.finder.embedding_dim

    def locate(self, frames: np.ndarray | torch.Tensor, text: str | Sequence[str]) -> np.ndarray:
        """Where the thing is that a sentence names, seen in all views together.

        Args:
            frames: uint8 [N, V, H, W, 3], as `score` takes them.
            text: one sentence for all, or N of them.

        Returns:
            float32 [N, 3], metres in the coordinates of `projections`: for Meta-World's those of its simulator.

        Raises:
            ValueError: a start_weight of 0, which knows no places; and as `score`.
        """
        if self.projections is None:
            raise ValueError("only a start_weight of 1 knows where things are: model.with_start_weight(1)")
        starts = torch.as_tensor(self.embed_start(frames), device=self.encoder.device)
        with torch.inference_mode():
            texts = self._embed_texts([text] if isinstance(text, str) else text).float()
            return self._things(starts, texts[:, None, None])[:, 0].cpu().numpy()

    def _things(self, starts: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Places [N, K, 3] of what texts name, [K, D] or one for each of N, [N, 1, 1, D]."""
        assert self.projections is not None  # as there is a start_weight
        starts = starts[:, :, None]
        logits = self.head(starts, texts)[3] if self.finder is None else self.finder(starts, texts)
        return agree(logits, self.projections)

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
            thing = self._things(starts, texts_of)
            assert self.projections is not None
            hand = triangulate(images[..., -2:], self.projections)
            far = (hand[:, None] - thing).norm(dim=-1).clamp(min=NEAREST).log()
            far = far[:, None].expand(-1, images.shape[1], -1)
        share = (far - math.log(NEAREST)) / math.log(FARTHEST / NEAREST)
        return 1 - 2 * share.clamp(0, 1)

    def _write(self, folder: Path, final: Path) -> None:
        save_weights(self.head, folder / REACH)
        if self.finder is not None:
            save_weights(self.finder, folder / FINDER)

    def _facts(self, final: Path) -> dict[str, Any]:
        own = {"format_version": REACH_VERSION, "backbone": portable_name(self.encoder.name, final)}
        sizes = {"reach": self.head.sizes} | (
            {"finder": self.finder.sizes} if self.finder is not None else {}
        )
        return super()._facts(final) | own | sizes


def load_weights(kind: type[Part], file: Path, sizes: Any) -> Part:
    """A module of these sizes with the weights in a file of `save_weights`.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or not of these sizes.
    """
    again = "python -m training.reach" if kind is ReachHead else "python -m training.find"
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; copy or train it again")
    try:
        module = kind(**sizes)
        module.load_state_dict(load_file(file))
    except Exception as error:  # safetensors', torch's and Python's own
        raise ValueError(f"{file} is damaged ({error}); train it again: {again}") from error
    return module
