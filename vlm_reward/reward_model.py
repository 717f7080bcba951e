"""Frames and a sentence to scores: the model that users load, call, save and share."""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi

from vlm_reward._card import chosen, model_card
from vlm_reward.cameras import CameraSpec, Crop, cut, named_crops
from vlm_reward.encoder import (
    ADAPTER_CONFIG,
    DualEncoder,
    check_device,
    local_folder,
    locate,
    portable_name,
    read_adapter_config,
    write_folder,
)
from vlm_reward.instructions import approach
from vlm_reward.preprocess import resize
from vlm_reward.similarity import cosine, keep, reached, toward

METADATA = "vlm_reward.json"
JUDGE = "judge"
"""Folder of the judge within that of the adapter."""
REACH = "reach.safetensors"
"""File of a `vlm_reward.reach.ReachHead`."""
FINDER = "finder.safetensors"
"""File of a `vlm_reward.reach.Finder`, beside it."""
# Plain; with a start_weight; a judge; an approach_weight; crops; members; an approach_weight of all of them; a
# head that tells how near the hand is (since 9 with layers, since 10 with a finder). An older library would
# overlook what came later.
FORMAT_VERSION, START_VERSION, JUDGE_VERSION, APPROACH_VERSION, CROP_VERSION = range(1, 6)
ENSEMBLE_VERSION, ASKED_VERSION, REACH_VERSION = 6, 7, 10
_TEXT_CACHE = 4096  # sentences; 3 MB at 192 dimensions


class RewardModel:
    """Scores frames by a sentence: the cosine of the two embeddings, for each view.

    With a `start_weight`, the cosine with the direction from the episode's first frame to the sentence. With a
    judge, too, that rises where what is asked is still to be done, and falls where it is so from the start.

    A bare backbone is the zero-shot model. An adapter folder holds LoRA weights and names its backbone; it is
    merged into the weights when loaded, and can be saved again all the same.

    Args:
        encoder: a dual encoder; one that is still being trained is scored as it is at each call.
        camera_spec: what the frames it was trained on look like, or None when it does not matter.
        start_weight: how much a score counts that a frame is unlike the first of its episode, see
            `vlm_reward.similarity.toward`; above 0, `score` needs to know the first frames.
        judge: a model of the same cameras that tells from all views of the first frame whether what is asked is
            so already (`vlm_reward.similarity.reached`), and then scores to keep it so (`keep`). Only with a
            start_weight.
        approach_weight: how much a sentence counts that asks for the hand at what the instruction names ("touch
            the drawer", see `vlm_reward.instructions.approach`), beside the instruction itself: a score is that
            of y + a * y', the two embeddings, made unit again. 0 is the instruction alone.
        crops: the part of each camera's image that it looks at, by the name of the camera, one and the same side
            for all; the rest is not seen. None for whole images. Only with a camera_spec.
        metadata: JSON-ready facts to save with it: objective, preset, seed, train_tasks, ... Its rows in the
            result of `eval.benchmark` under the key `evaluation` become the figures of the model card.
        dtype: of the arithmetic (autocast; weights stay float32, so that saving loses nothing, and
            embeddings are normalised in float32). None picks by the device, see `auto_dtype`.

    Example:
        >>> model = RewardModel.from_pretrained("siglip2-tiny/triplet+order+wrong+start+judge")
        >>> scores = model.score(frames, "open the drawer", start=frames[0])  # uint8 [N, V, H, W, 3] -> [N, V]
    """

    one_space = True
    """Whether `embed` and `embed_text` give vectors of one space, whose cosine is the score."""
    _reads_patches = False
    """Whether `_read` needs them."""

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        camera_spec: CameraSpec | None = None,
        start_weight: float = 0.0,
        judge: "RewardModel | None" = None,
        approach_weight: float = 0.0,
        crops: Mapping[str, Crop] | None = None,
        metadata: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, weight in (("start_weight", start_weight), ("approach_weight", approach_weight)):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be at least 0, got {weight}")
        if judge and not start_weight:
            raise ValueError("a judge looks at the first frame: give a start_weight, too")
        if crops is not None and camera_spec is None:
            raise ValueError("crops are of cameras: give a camera_spec, too")
        if crops is not None and camera_spec and (whole := set(camera_spec.cameras) - set(crops)):
            raise ValueError(f"there is no crop of camera {', '.join(sorted(whole))}")
        for name, (left, top, side) in (crops or {}).items():
            if not (left >= 0 and top >= 0 and 0 < side <= 1 and max(left, top) + side <= 1):
                raise ValueError(f"the crop of {name} leaves the image: left {left}, top {top}, side {side}")
        if len(sides := {crop[2] for crop in (crops or {}).values()}) > 1:
            raise ValueError(f"crops must have one side, got {', '.join(map(str, sorted(sides)))}")
        self.encoder = encoder
        self.camera_spec = camera_spec
        self.start_weight = start_weight
        self.approach_weight = approach_weight
        self.judge = judge
        self.crops = named_crops(crops)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.dtype = dtype or auto_dtype(encoder.device)
        self._texts: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "RewardModel":
        """Load a backbone, an adapter with its backbone, or an ensemble with its members.

        Args:
            path_or_hub_id: an existing folder wins; then `checkpoints/<name>` of the checkout, such as
                "siglip2-tiny/triplet"; else it is a repository on the Hugging Face Hub.
            device: where to.
            dtype: of the arithmetic; None picks, see `auto_dtype`.
            revision: branch, tag or commit on the Hub, of the adapter if it is one; its backbone is loaded at
                the commit that it was trained on.
            local_files_only: never ask the Hub; HF_HUB_OFFLINE=1 does this for a whole process.

        Raises:
            FileNotFoundError: nothing is there, or a file of it or its backbone is missing; the Hub does not
                have it, or cannot be reached and the cache does not have it.
            ValueError: damaged, pickled, of another kind, or written by a newer version; this machine has no
                such device.
        """
        check_device(device)
        folder = locate(path_or_hub_id, revision=revision, local_files_only=local_files_only)
        metadata, spec, crops, weights = _read_metadata(folder)
        if names := metadata.get("members"):
            from vlm_reward.ensemble import Ensemble

            same: Any = {"device": device, "dtype": dtype, "local_files_only": local_files_only}
            members = [cls.from_pretrained(name, **same) for name in names]
            bare: dict[Any, DualEncoder] = {}  # which several members may read: kept and run once
            for member in members:
                if not member.encoder.has_adapter:
                    member.encoder = bare.setdefault(_source(member.encoder), member.encoder)
            approach = weights["approach_weight"] if "approach_weight" in metadata else None
            return Ensemble(
                members, list(names.values()), approach_weight=approach, names=list(names), metadata=metadata
            )
        judge = None
        if "reach" in metadata:
            from vlm_reward.reach import Finder, ReachHead, ReachModel, load_weights

            encoder = _backbone_of(folder, metadata.get("backbone"), None, local_files_only)
            encoder.requires_grad_(False).to(device).eval()
            head = load_weights(ReachHead, folder / REACH, metadata["reach"])
            finder = (
                load_weights(Finder, folder / FINDER, sizes) if (sizes := metadata.get("finder")) else None
            )
            same = {"camera_spec": spec, "crops": crops, "metadata": metadata, "dtype": dtype}
            return ReachModel(encoder, head, finder, **same, start_weight=weights["start_weight"])
        if (folder / ADAPTER_CONFIG).is_file():
            config: Any = read_adapter_config(folder)
            backbone = metadata.get("backbone") or config.base_model_name_or_path
            encoder = _backbone_of(folder, backbone, config.revision, local_files_only)
            if metadata.get("judge"):
                judge = cls.from_pretrained(
                    folder / JUDGE, device=device, dtype=dtype, local_files_only=local_files_only
                )
            encoder.load_adapter(folder)
            encoder.merge_lora()
        else:
            encoder = DualEncoder.from_pretrained(
                path_or_hub_id, revision=revision, local_files_only=local_files_only
            )
        encoder.requires_grad_(False).to(device).eval()
        model = cls(
            encoder,
            camera_spec=spec,
            judge=judge,
            crops=crops,
            metadata=metadata,
            dtype=dtype,
            **weights,
        )
        if encoder.has_adapter:  # merged, and kept apart as it was: no need to convert at each forward
            encoder.model.to(model.dtype)
        return model

    def score(
        self,
        frames: np.ndarray | torch.Tensor,
        text: str | Sequence[str],
        batch_size: int | None = None,
        *,
        start: np.ndarray | torch.Tensor | None = None,
    ) -> np.ndarray:
        """Score each view of each timestep in one batched forward.

        Args:
            frames: uint8 [N, V, H, W, 3], upright, views in the order of `camera_spec`. H and W are free.
            text: one sentence for all, or N of them, one a timestep.
            start: where the episode began, if `start_weight` is above 0 (else it is not looked at): its first
                frame, uint8 [V, H, W, 3], for all timesteps, or [N, V, H, W, 3], one a timestep; or what
                `embed_start` gave for it, [V, D'] or [N, V, D'], which saves embedding it again.
            batch_size: images a forward at most; None takes 256 on a GPU and 32 on a CPU, where the
                activations of more fall out of its caches.

        Returns:
            float32 [N, V] in [-1, 1].

        Raises:
            ValueError: wrong dtype or shape, no frames, another number of views than cameras or of sentences
                than timesteps, a sentence that is empty or too long, no start where one is needed.
            FloatingPointError: the model gave NaN or infinity.
        """
        self._check_frames(frames)
        if not isinstance(text, str) and len(text) != len(frames):
            raise ValueError(f"give one text or one a timestep, got {len(text)} for {len(frames)} timesteps")
        with torch.inference_mode():
            texts = [text] if isinstance(text, str) else text
            images = self._embed_frames(frames, batch_size)
            starts = self._starts(start, images) if self.start_weight else None
            return self._compare(images, texts, starts, each=True)[..., 0].cpu().numpy()

    def compare(
        self, images: np.ndarray, texts: Sequence[str], starts: np.ndarray | None = None
    ) -> np.ndarray:
        """Scores under several sentences of frames that are embedded already.

        Args:
            images: what `embed` gave, [N, V, D].
            texts: K sentences, all asked of each frame.
            starts: what `embed_start` gave for the frame their episode began with, [V, D'], or [N, V, D'], one a
                timestep; as in `score`.

        Returns:
            float32 [N, V, K] in [-1, 1].
        """
        with torch.inference_mode():
            embedded = torch.as_tensor(images, device=self.encoder.device)
            began = self._starts(starts, embedded) if self.start_weight else None
            return self._compare(embedded, texts, began, each=False).cpu().numpy()

    def _compare(
        self, images: torch.Tensor, texts: Sequence[str], starts: torch.Tensor | None, *, each: bool
    ) -> torch.Tensor:
        """Scores [N, V, K] of images [N, V, D] under K texts; `each`: one a timestep, or one for all; K is 1."""

        def said(model: RewardModel) -> torch.Tensor:
            embedded = model._embed_texts(texts)
            return embedded[:, None, None] if each else embedded

        images, size = images[:, :, None], images.shape[-1]
        if starts is None:
            return cosine(images, said(self)).clamp(-1, 1)
        starts = starts[:, :, None]
        scores = cosine(images, toward(said(self), starts[..., :size], self.start_weight)).clamp(-1, 1)
        if self.judge is None:
            return scores
        seen = cosine(starts[..., size:], said(self.judge)).mean(1, keepdim=True)  # all views show one scene
        return keep(scores, reached(seen))

    def embed(self, frames: np.ndarray | torch.Tensor, batch_size: int | None = None) -> np.ndarray:
        """Image embeddings: float32 [N, V, D], unit norm. Arguments and errors are those of `score`."""
        self._check_frames(frames)
        with torch.inference_mode():
            return self._embed_frames(frames, batch_size).cpu().numpy()

    def embed_start(self, frames: np.ndarray | torch.Tensor) -> np.ndarray:
        """First frames, as `score` and `compare` take them: float32 [N, V, D'], what `embed` gives and, behind it,
        what it gives of the judge, if there is one.
        """
        own = self.embed(frames)
        return np.concatenate([own, self.judge.embed(frames)], axis=-1) if self.judge else own

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Text embeddings: float32 [T, D], unit norm. Each unique sentence is computed once and kept."""
        with torch.inference_mode():
            return self._embed_texts(texts).cpu().numpy()

    @property
    def embedding_dim(self) -> int:
        """D of `embed`."""
        return self.encoder.embedding_dim

    @property
    def image_size(self) -> int:
        """S, the side of what `look` gives, pixels."""
        return self.encoder.image_size

    @property
    def is_part(self) -> bool:
        """Whether it is saved without its backbone, as an adapter is."""
        return self.encoder.has_adapter

    @property
    def sees_parts(self) -> bool:
        """Whether it looks at parts of its cameras' images alone, so that other cameras are none for it."""
        return bool(self.crops)

    def look(self, frames: Any) -> Any:
        """What the model looks at: each view's crop, at the model's resolution.

        Frames kept so are a fraction of the size; `model.with_small_frames()` takes them.

        Args:
            frames: uint8 [..., V, H, W, 3], as `score` takes them.

        Returns:
            uint8 [..., V, S, S, 3], array or tensor as given.
        """
        if self.crops and self.camera_spec:
            frames = cut(frames, [self.crops[name] for name in self.camera_spec.cameras])
        return resize(frames, self.image_size, resample=self.encoder.resample)

    def with_small_frames(self) -> "RewardModel":
        """This model, which shares its weights, for frames that are what `look` gives."""
        return self._like_this(crops=None, judge=self.judge and self.judge.with_small_frames())

    def check_camera_spec(self, spec: CameraSpec) -> None:
        """Raise ValueError when frames rendered by `spec` differ in kind from those of the training."""
        difference = self.camera_spec.mismatch(spec) if self.camera_spec else ""
        if difference:
            raise ValueError(
                f"the model was trained on other frames (its cameras against yours: {difference}); "
                "render with model.camera_spec, take some of its cameras by model.with_cameras(...), or, for "
                "cameras of your own, take a bare backbone (siglip2-tiny) or retrain"
            )

    def with_cameras(self, cameras: Sequence[str]) -> "RewardModel":
        """This model, which shares its weights, for some of the cameras it was trained on: fewer frames to render.

        Without a `camera_spec` (a bare backbone) any cameras will do.

        Raises:
            ValueError: it was not trained on one of them.
        """
        spec = self.camera_spec or CameraSpec()
        if isinstance(cameras, str):
            cameras = (cameras,)
        if self.camera_spec and (foreign := set(cameras) - set(spec.cameras)):
            raise ValueError(
                f"{self.metadata.get('objective', 'the model')} was not trained on camera "
                f"{', '.join(sorted(foreign))}; it knows {', '.join(spec.cameras)}"
            )
        judge = self.judge and self.judge.with_cameras(cameras)
        return self._like_this(camera_spec=replace(spec, cameras=tuple(cameras)), judge=judge)

    def with_start_weight(self, start_weight: float) -> "RewardModel":
        """This model, which shares its weights, with another weight of the first frame; 0 does without it, and
        without a judge.
        """
        return self._like_this(start_weight=start_weight)

    def with_approach_weight(self, approach_weight: float) -> "RewardModel":
        """This model, which shares its weights, with another weight of "the hand is there"; 0 does without it."""
        return self._like_this(approach_weight=approach_weight)

    def with_judge(self, judge: "RewardModel") -> "RewardModel":
        """This model, which shares its weights, with another judge, or its first; see `training.judge`."""
        name = str(self.metadata.get("objective", "unknown")).removesuffix("+judge")
        without = ("evaluation", "validation")  # of the scores before
        facts = {key: value for key, value in self.metadata.items() if key not in without}
        return self._like_this(judge=judge, metadata=facts | {"objective": f"{name}+judge"})

    def with_any_views(self) -> "RewardModel":
        """This model, which shares its weights, for frames of whatever camera and number of views.

        One with crops then sees whole images, which it was not trained on.
        """
        return self._like_this(camera_spec=None, crops=None, judge=self.judge and self.judge.with_any_views())

    def _like_this(self, **changed: Any) -> "RewardModel":
        same: dict[str, Any] = {"camera_spec": self.camera_spec, "start_weight": self.start_weight}
        same["approach_weight"] = self.approach_weight
        same["judge"] = self.judge if changed.get("start_weight", self.start_weight) else None
        same |= {"crops": self.crops, "metadata": self.metadata}
        return RewardModel(self.encoder, **same | changed, dtype=self.dtype)

    def save_pretrained(self, path: str | Path, *, name: str | None = None) -> None:
        """Write an adapter folder (LoRA alone) or, without LoRA, a stand-alone backbone; with a model card.

        The adapter is one of PEFT's, the backbone one of transformers': either loads it without this package.
        The files are written beside and moved at the end: a failure leaves an earlier checkpoint as it was. A
        README.md that is there already stays.

        Args:
            path: the folder.
            name: what the model card calls it; the folder's name when not given.

        Raises:
            ValueError: an adapter into a backbone's folder, or the other way round; `metadata["evaluation"]` is
                not one checkpoint's rows of `eval.benchmark`.
            OSError: it could not be written, for example on a full disk.
        """
        self._save(Path(path), name or Path(path).name)

    def _save(self, final: Path, name: str) -> None:
        if self.judge:
            self.judge._save(final / JUDGE, f"{name}/{JUDGE}")
        with write_folder(final) as folder:
            self._write(folder, final)
            facts = self._facts(final)
            (folder / METADATA).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
            if not (final / "README.md").exists():
                (folder / "README.md").write_text(model_card(name, facts, self.is_part))

    def _write(self, folder: Path, final: Path) -> None:
        """The weights, to a folder that will be moved to `final`."""
        if self.encoder.has_adapter:
            self.encoder._write_adapter(folder, final)
        else:
            self.encoder._write_backbone(folder, final)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload reward model",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes; returns the commit's address. Log in first: `hf auth login`.

        Args:
            repo_id: owner/name; made if there is none. A README.md that it has already stays.
            commit_message: of the commit.
            private: of a new repository; None takes the owner's default.
            token: another one than that of the login.
            revision: branch, made if there is none; None is `main`.
            create_pr: open a pull request in place of a commit.

        Raises:
            ValueError: the adapter's backbone is a folder on this machine, which nobody else could load.
            OSError: the Hub cannot be reached or refuses.
        """
        backbone = portable_name(self.encoder.name, Path(repo_id))
        if self.is_part and Path(backbone).is_absolute():
            raise ValueError(
                f"the adapter's backbone is the local folder {backbone}: push the backbone first and load it "
                "by its Hub id"
            )
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / repo_id.rsplit("/", 1)[-1]
            self._save(folder, repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if api.file_exists(repo_id, "README.md", revision=revision):
                (folder / "README.md").unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit)

    def _facts(self, final: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {"format_version": FORMAT_VERSION}
        if self.encoder.has_adapter:
            facts["backbone"] = portable_name(self.encoder.name, final)
        facts["camera_spec"] = self.camera_spec.to_dict() if self.camera_spec else None
        if self.start_weight:
            facts |= {"format_version": START_VERSION, "start_weight": self.start_weight}
        if self.judge:
            facts |= {"format_version": JUDGE_VERSION, "judge": True}
        if self.approach_weight:
            facts |= {"format_version": APPROACH_VERSION, "approach_weight": self.approach_weight}
        if self.crops:
            facts |= {"format_version": CROP_VERSION, "crops": self.crops}
        facts |= {key: value for key, value in self.metadata.items() if key not in _OWN_KEYS}
        return facts | ({"evaluation": chosen(facts["evaluation"])} if "evaluation" in facts else {})

    def _check_frames(self, frames: np.ndarray | torch.Tensor) -> None:
        shape, kind = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
        if kind != "uint8" or len(shape) != 5 or shape[-1] != 3:
            hint = "; of one camera: frames[:, None]" if len(shape) == 4 else ""
            if kind.startswith("float"):
                hint += "; of values from 0 to 1: (255 * frames).round(), as uint8"
            raise ValueError(f"frames must be uint8 [N, V, H, W, 3], got {kind} {shape}{hint}")
        if 0 in shape:
            raise ValueError(f"frames are empty: got shape {shape}")
        if self.camera_spec and shape[1] != len(self.camera_spec.cameras):
            raise ValueError(
                f"frames have {shape[1]} views, but the model was trained with "
                f"{len(self.camera_spec.cameras)} cameras: {', '.join(self.camera_spec.cameras)}; "
                f"of some of them: model.with_cameras(({self.camera_spec.cameras[0]!r},))"
            )

    def _embed_frames(self, frames: np.ndarray | torch.Tensor, batch_size: int | None) -> torch.Tensor:
        """[N, V, H, W, 3] -> [N, V, D] on the model's device."""
        return embed_together([self], frames, batch_size)[0]

    def _read(self, images: torch.Tensor, patches: torch.Tensor | None) -> torch.Tensor:
        """What the encoder gives of M images -> what `embed` gives of each, [M, D]."""
        return images

    def _starts(self, start: np.ndarray | torch.Tensor | None, images: torch.Tensor) -> torch.Tensor:
        """`embed_start` [1 or N, V, D'] of the first frames of what is embedded as `images` [N, V, D]."""
        if start is None:
            raise ValueError(
                "this model scores a frame against the first of its episode: give start=the first frame, uint8 "
                "[V, H, W, 3], or do without by model.with_start_weight(0)"
            )
        if start.ndim >= 4:
            embedded = self.embed_start(start if start.ndim == 5 else start[None])
        else:
            embedded = start if start.ndim == 3 else start[None]
        embedded = torch.as_tensor(embedded, dtype=images.dtype, device=images.device)
        width = self._start_width(images.shape[-1])
        if embedded.shape[1:] != (images.shape[1], width) or len(embedded) not in (1, len(images)):
            raise ValueError(
                f"start must be one first frame or {len(images)}, of {images.shape[1]} views, uint8 "
                f"[..., V, H, W, 3] or what embed_start gave, [..., V, {width}], got shape {tuple(start.shape)}"
            )
        return embedded

    def _start_width(self, width: int) -> int:
        """D' of `embed_start`, where `embed` has a `width` of D."""
        return width * (2 if self.judge else 1)

    def _embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """T sentences -> [T, D] on the model's device; each with the hand at what it names, if that counts."""
        said = self._embed_sentences(texts)
        if not self.approach_weight:
            return said
        there = self._embed_sentences([approach(text) or text for text in texts])
        return torch.nn.functional.normalize(said + self.approach_weight * there, dim=-1)

    def _embed_sentences(self, texts: Sequence[str]) -> torch.Tensor:
        """T sentences -> [T, D], as they are; each unique one is computed once."""
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"texts must be a non-empty list of strings, got {texts!r}")
        if len(self._texts) > _TEXT_CACHE or self.encoder.trainable_parameters():
            self._texts.clear()  # weights in training change between calls
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            with self._inference():
                embeddings = _finite(self.encoder.encode_text(new), "text")
            self._texts.update(zip(new, embeddings, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode and autocast; training mode comes back."""
        training = self.encoder.training
        if training:
            self.encoder.eval()
        try:
            with torch.autocast(
                self.encoder.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
            ):
                yield
        finally:
            if training:
                self.encoder.train()


def auto_device(asked: str) -> str:
    """`auto` is a GPU where there is one, else the CPU; any other name is what was asked for."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def auto_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where it is faster: on GPUs that have it, and on CPUs with AVX512-BF16 or AMX; else float32.

    On one core of such a CPU (AMD EPYC) it embeds about twice the images a second. Scores move by less than
    0.02, see the tests; ask for float32 where differences between neighbouring frames matter more than speed.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public test
        if any(getattr(torch.cpu, name, bool)() for name in names):
            return torch.bfloat16
    return torch.float32


def embed_together(
    models: Sequence[RewardModel], frames: np.ndarray | torch.Tensor, batch_size: int | None
) -> list[torch.Tensor]:
    """`embed` of models of one encoder, crops and dtype, in one forward: [N, V, D] of each, on their device."""
    first = models[0]
    encoder = first.encoder
    step = batch_size or (256 if encoder.device.type == "cuda" else 32)
    if step < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    images: Any = first.look(frames) if first.crops else frames  # else resized below, a few at a time
    images = images.reshape(-1, *images.shape[2:])
    with_patches = any(model._reads_patches for model in models)
    parts = []
    with first._inference():
        for start in range(0, len(images), step):
            pixels = encoder.preprocess(images[start : start + step])
            seen = encoder.encode_patches(pixels) if with_patches else (encoder.encode_images(pixels), None)
            parts.append([model._read(*seen) for model in models])
    shape = (*frames.shape[:2], -1)
    return [_finite(torch.cat(part), "image").reshape(shape) for part in zip(*parts, strict=True)]


_WEIGHTS = ("start_weight", "approach_weight")
_OWN_KEYS = (
    "format_version",
    "backbone",
    "camera_spec",
    "judge",
    "crops",
    "members",
    "reach",
    "finder",
    *_WEIGHTS,
)


def _source(encoder: DualEncoder) -> tuple[Path | str, str | None]:
    """What two encoders have in common that are one: their folder, or the Hub's name and commit."""
    folder = local_folder(encoder.name)
    return folder.resolve() if folder else encoder.name, encoder.revision


def _backbone_of(
    folder: Path, backbone: str | None, revision: str | None, local_files_only: bool
) -> DualEncoder:
    """The backbone that the adapter in a folder names."""
    if not backbone:
        raise ValueError(f"adapter {folder} names no backbone in {METADATA} or {ADAPTER_CONFIG}")
    around = folder.resolve().parents[:2]  # a judge lies in its adapter, that in its backbone
    near = [up for up in around if up.name == backbone and (up / "config.json").is_file()]
    try:
        return DualEncoder.from_pretrained(
            near[0] if near else backbone, revision=revision, local_files_only=local_files_only
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the backbone of adapter {folder} is missing: {error}") from error


def members_of(folder: Path) -> list[str]:
    """The names of the members of an ensemble in a folder; none for any other model."""
    return list(_read_metadata(folder)[0].get("members", ()))


def read_crops(folder: Path) -> dict[str, Crop] | None:
    """The part of each camera's image that the backbone or adapter in a folder looks at; None for all of it."""
    return _read_metadata(folder)[2]


def _read_metadata(
    folder: Path,
) -> tuple[dict[str, Any], CameraSpec | None, dict[str, Crop] | None, dict[str, float]]:
    """`vlm_reward.json`, cameras, crops and weights of it; nothing without it: most backbones, PEFT's own."""
    path = folder / METADATA
    if not path.is_file():
        return {}, None, None, {}
    try:
        facts = json.loads(path.read_text())
        version = facts["format_version"]
        spec = CameraSpec.from_dict(facts["camera_spec"]) if facts.get("camera_spec") else None
        crops = named_crops(facts.get("crops"))
        weights = {name: float(facts.get(name, 0.0)) for name in _WEIGHTS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); copy or train the checkpoint again") from error
    if version not in range(FORMAT_VERSION, REACH_VERSION + 1):
        raise ValueError(
            f"{path} has format version {version}, this vlm-reward reads up to {REACH_VERSION}: upgrade "
            "vlm-reward"
        )
    return facts, spec, crops, weights


def _finite(embeddings: torch.Tensor, tower: str) -> torch.Tensor:
    if not torch.isfinite(embeddings).all():
        raise FloatingPointError(
            f"the {tower} tower gave NaN or infinity: its weights are damaged, or training diverged; load an "
            "earlier checkpoint, or try dtype=torch.float32"
        )
    return embeddings
