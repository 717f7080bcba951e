"""The six objectives: which frames each needs, which functions it sums, and whose hyper-parameters.

`OBJECTIVES` is the table. A new objective is one pure function, one row, one test.

>>> objective = OBJECTIVES["triplet"]
>>> loss = objective({"early": early, "late": late}, text, text_id, **objective.preset("paper"))
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.objectives import frames as _frames
from training.objectives.contrastive import info_nce, r3m_language, tcn, tcn_text
from training.objectives.frames import PAIR, TRANSITION, TRIPLE, FrameDraw
from training.objectives.ranking import triplet
from training.objectives.value import vip

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Term",
    "find_objective",
    "info_nce",
    "r3m_language",
    "tcn",
    "tcn_text",
    "triplet",
    "vip",
]


@dataclass(frozen=True)
class Term:
    """One pure function of an objective and the embeddings it takes, in order: names of frames, or `text`."""

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]

    @property
    def hyper(self) -> tuple[str, ...]:
        """Keyword hyper-parameters of the function."""
        parameters = inspect.signature(self.function).parameters.values()
        apart = ("text_id", "generator")
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in apart)

    def __call__(
        self, tensors: Mapping[str, Tensor], text_id: Tensor, generator: torch.Generator | None, **hyper: Any
    ) -> Tensor:
        known = inspect.signature(self.function).parameters
        extra = {"text_id": text_id, "generator": generator} | hyper
        return self.function(
            *(tensors[name] for name in self.inputs), **{key: extra[key] for key in extra if key in known}
        )


@dataclass(frozen=True)
class Objective:
    """A sum of pure functions of the embeddings of named frames and of the instruction.

    Attributes:
      name: as in the paper's tables.
      frames: names of the frames that each sample needs, in order of time.
      terms: the functions whose sum is the loss.
      draw: how the frames lie in time (`training.objectives.frames`).
      paper: hyper-parameters of arXiv 2512.20675; what it leaves open is as its equations are printed.
      official: hyper-parameters of the code that the objective's own authors published.
    """

    name: str
    frames: tuple[str, ...]
    terms: tuple[Term, ...]
    draw: FrameDraw
    paper: Mapping[str, Any]
    official: Mapping[str, Any]

    @property
    def hyper(self) -> tuple[str, ...]:
        """Names of all hyper-parameters, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.hyper))

    def preset(self, name: str) -> dict[str, Any]:
        """A copy of the preset `paper` or `official`; any other name is a ValueError."""
        if name not in _frames.PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_frames.PRESETS)}, got {name!r}")
        return dict(self.paper if name == "paper" else self.official)

    def __call__(
        self,
        frames: Mapping[str, Tensor],
        text: Tensor,
        text_id: Tensor,
        *,
        generator: torch.Generator | None = None,
        **hyper: Any,
    ) -> Tensor:
        """The loss of a batch of B samples.

        Args:
          frames: embeddings of the named frames, float [B, D] each; further names are ignored.
          text: embeddings of the instructions, float [B, D].
          text_id: int64 [B], equal where the instructions are.
          generator: draws the negatives; without it they are the samples that follow in the batch.
          **hyper: hyper-parameters, usually a preset's; what is left out has the function's own default.

        Returns:
          Loss, scalar, at least float32.

        Raises:
          ValueError: a frame or the whole batch is missing, shapes differ, or a hyper-parameter is unknown.
        """
        if missing := [name for name in self.frames if name not in frames]:
            raise ValueError(
                f"{self.name} needs frames {', '.join(self.frames)}; missing {', '.join(missing)}"
            )
        if unknown := [name for name in hyper if name not in self.hyper]:
            raise ValueError(f"{self.name} has no {', '.join(unknown)}; it has {', '.join(self.hyper)}")
        if text.ndim != 2 or len(text) == 0:
            raise ValueError(f"text must be [B, D] with B at least 1, got {tuple(text.shape)}")
        for name in self.frames:
            if frames[name].shape != text.shape:
                raise ValueError(
                    f"{name} must be {tuple(text.shape)} as text is, got {tuple(frames[name].shape)}"
                )
        if text_id.shape != text.shape[:1]:
            raise ValueError(f"text_id must be [{len(text)}], got {tuple(text_id.shape)}")
        tensors = {"text": text, **frames}
        return torch.stack([term(tensors, text_id, generator, **hyper) for term in self.terms]).sum()

    def draw_timesteps(
        self, length: int, n: int, generator: np.random.Generator, *, preset: str = "paper"
    ) -> np.ndarray:
        """Timesteps of `n` samples, int64 [n, len(frames)]; see `frames.draw_timesteps`."""
        drawn = _frames.draw_timesteps(self.draw, length, n, generator, preset=preset)
        return drawn[:, [self.draw.names.index(name) for name in self.frames]]

    def draw_group(
        self, length: int, count: int, generator: np.random.Generator, *, preset: str = "paper"
    ) -> np.ndarray:
        """Timesteps to encode once, int64 [count]; see `frames.draw_group`."""
        return _frames.draw_group(self.draw, length, count, generator, preset=preset)

    def group_samples(
        self,
        timesteps: Tensor,
        lengths: Tensor,
        *,
        preset: str = "paper",
        max_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Indices of the frames of each sample among encoded ones; see `frames.group_samples`."""
        samples = _frames.group_samples(
            self.draw, timesteps, lengths, preset=preset, max_samples=max_samples, generator=generator
        )
        return {name: samples[name] for name in (*self.frames, "trajectory")}


# The paper names neither similarity, temperature, gamma nor value scale: the scores it evaluates are cosines,
# its equations have no temperature, gamma is that of the original code.
_PAPER_CONTRASTIVE = {"similarity": "cosine", "temperature": 1.0, "num_negatives": 3, "mask_same_text": False}
_PAPER_CONTRASTIVE |= {"include_self": False}
_OFFICIAL_R3M = _PAPER_CONTRASTIVE | {"similarity": "negative_l2", "include_self": True}
_PAPER_VALUE = {"similarity": "cosine", "gamma": 0.98, "value_scale": 1.0, "weight_log_term": True}
_PAPER_VALUE |= {"num_negatives": 3, "mask_same_text": False, "include_self": False}
# LIV's code: its value terms with a text and an image goal are VIP-text and VIP for unit-norm embeddings.
_OFFICIAL_VALUE = _PAPER_VALUE | {"value_scale": None, "weight_log_term": False, "include_self": True}
_PAPER_INFO_NCE = {"temperature": 1.0, "num_candidates": 3, "include_positive": False, "symmetric": False}
_OFFICIAL_INFO_NCE = {"temperature": 1.0, "num_candidates": None, "include_positive": True, "symmetric": True}

_VIP = Term(vip, ("initial", "current", "next", "goal"))
_VIP_TEXT = Term(vip, ("initial", "current", "next", "text"))


def _objective(
    name: str,
    draw: FrameDraw,
    terms: tuple[Term, ...],
    *,
    paper: Mapping[str, Any],
    official: Mapping[str, Any],
) -> Objective:
    frames = tuple(frame for frame in draw.names if any(frame in term.inputs for term in terms))
    return Objective(
        name, frames, terms, draw, MappingProxyType(dict(paper)), MappingProxyType(dict(official))
    )


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            _objective(
                "triplet",
                PAIR,
                (Term(triplet, ("text", "early", "late")),),
                paper={"margin": 0.3, "similarity": "cosine", "reduction": "sum"},
                official={"margin": 0.3, "similarity": "cosine", "reduction": "mean"},
            ),
            _objective(
                "tcn_text",
                PAIR,
                (Term(tcn_text, ("text", "early", "late")),),
                paper=_PAPER_CONTRASTIVE,
                official=_OFFICIAL_R3M,
            ),
            _objective(
                "r3m",
                TRIPLE,
                (
                    Term(tcn, ("early", "middle", "late")),
                    Term(r3m_language, ("text", "early", "middle", "late")),
                ),
                paper=_PAPER_CONTRASTIVE | {"symmetric": False, "all_pairs": False},
                official=_OFFICIAL_R3M | {"symmetric": True, "all_pairs": True},
            ),
            _objective("vip_text", TRANSITION, (_VIP_TEXT,), paper=_PAPER_VALUE, official=_OFFICIAL_VALUE),
            _objective(
                "vip_text+vip", TRANSITION, (_VIP_TEXT, _VIP), paper=_PAPER_VALUE, official=_OFFICIAL_VALUE
            ),
            _objective(
                "liv",
                TRANSITION,
                (_VIP_TEXT, _VIP, Term(info_nce, ("goal", "text"))),
                paper=_PAPER_VALUE | _PAPER_INFO_NCE,
                official=_OFFICIAL_VALUE | _OFFICIAL_INFO_NCE,
            ),
        )
    }
)


def find_objective(name: str) -> Objective:
    """The row of `OBJECTIVES` with this name; a ValueError with close matches if there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    close = difflib.get_close_matches(name, OBJECTIVES, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}{hint}")
