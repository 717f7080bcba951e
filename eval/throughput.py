"""How much faster than the plain way: rendering, scoring, stepping, training, as ratios of one run.

    python -m eval.throughput                                    # about two minutes
    python -m eval.throughput --adapter siglip2-tiny/triplet --figures score

    render   CameraRig.render of three views, profile `fast`, against MuJoCo's own flags (profile `full`)
    score    RewardModel.score of 8 environments x 3 views in one call, against one frame at a time through
             the Hugging Face processor and the model in float32 with its LoRA unmerged. Frames are 224
             pixels wide; both ways encode the sentence once.
    wrap     steps/s of VLMRewardWrapper, against step, render and score called by hand: its overhead.
             With three views and the finetuned model, as the next.
    vector   steps/s of VLMRewardVecEnv, 8 environments in processes of their own, against one wrapper, and
             against 8 wrappers that score one by one, in float32 with the LoRA unmerged.
    train    `python -m training.train` with the triplet loss, against a loop that encodes each image and the
             sentence of each sample separately, in float32, with an AdamW step every 32 samples. A sample is
             a sentence, an earlier and a later frame. The paper's sampler draws new frames for each sample,
             as the loop does: like against like, and the one with a target. The grouped sampler forms all
             pairs among a few frames: samples/s says how many pairs it learns from, images/s what they cost.

Both ways of a figure take turns, a few tenths of a second or a few steps each, and a ratio is the median of
the ratios of neighbouring turns, printed with the lowest and the highest: other load on the machine slows
both. The CPU ratio compares the processor time of this process, which other load hardly changes; with one
thread on an idle machine it is the same. Everything runs on the CPU. Starting, loading and first calls are
not counted, nor is the first step after training started.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import minari
import mujoco
import numpy as np
import torch
import transformers
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from transformers import AutoImageProcessor

from vlm_reward._jobs import replacing
from vlm_reward.cameras import DEFAULT_SIZE, CameraRig, CameraSpec
from vlm_reward.encoder import DualEncoder, locate
from vlm_reward.envs import make_env
from vlm_reward.reward_model import RewardModel
from vlm_reward.sb3 import VLMRewardVecEnv
from vlm_reward.tasks import HELD_OUT, instruction, train_tasks
from vlm_reward.wrappers import VLMRewardWrapper

ROOT = Path(__file__).resolve().parent.parent
TASK = HELD_OUT[0]
ENVIRONMENTS, BATCH, MARGIN = 8, 32, 0.3
DATASET = "throughput-v0"

Measure = Callable[[], dict[str, float]]
"""Do some work; what was done a second, by unit."""
CPU = "items a second of processor time"


Figures = Literal["render", "score", "wrap", "vector", "train"]


@dataclass(frozen=True)
class ThroughputConfig:
    """Measure the fast paths against the plain ones."""

    backbone: str = "siglip2-tiny"
    """Dual encoder to score and train: a name under checkpoints/, a folder or a Hub id."""
    adapter: str | None = None
    """LoRA adapter of this backbone to score with; a fresh one of the default size when not given."""
    figures: tuple[Figures, ...] = get_args(Figures)
    """What to measure."""
    threads: int = 1
    """CPU threads of PyTorch; with 1 software rendering has one, too, else as many as there are cores."""
    seconds: float = 20.0
    """Time for each of them, at least; `turns` are made however long they take."""
    turns: int = 3
    """Turns of each way, at least."""
    train_steps: int = 8
    """Steps in a turn of training, the first of which is not counted."""
    out: Path = Path("out/throughput.json")
    """The result."""

    @property
    def turn_seconds(self) -> float:
        """Time of a turn of rendering or scoring, at least."""
        return min(0.3, self.seconds)

    def __post_init__(self) -> None:
        if not self.figures:
            raise ValueError(f"nothing to measure: --figures needs one of {', '.join(get_args(Figures))}")
        for name, least in (("threads", 1), ("turns", 1), ("train_steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {self.seconds}")


@dataclass(frozen=True)
class Figure:
    """One line of the result.

    Args:
        figure: what was measured, such as `train/grouped`.
        unit: of `fast` and `plain`, the medians over the turns: items a second.
        ratio: median over the turns of fast / plain.
        low, high: the lowest and the highest ratio of a turn.
        cpu_ratio: as `ratio`, of processor time; None where other processes do the work.
        turns: of each way.
        target: the ratio to reach, or None.
    """

    figure: str
    unit: str
    fast: float
    plain: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float | None
    turns: int
    target: float | None


def main(cfg: ThroughputConfig) -> dict[str, Any]:
    """Measure, print a table, and return what was written to `cfg.out`: {"figures": [...], ...}.

    Raises:
        FileNotFoundError: no such backbone or adapter.
        ValueError: the adapter belongs to another backbone.
        RuntimeError: no renderer works, or training failed.
    """
    torch.set_num_threads(cfg.threads)
    if cfg.threads == 1:  # else Mesa's software renderer takes a thread for each core
        os.environ.setdefault("LP_NUM_THREADS", "0")
    began = time.monotonic()
    figures: list[Figure] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vlm-reward-throughput-") as scratch:
        if set(cfg.figures) - {"render"}:
            backbone, fresh = locate(cfg.backbone), Path(scratch) / "adapter"
            write_fresh_adapter(backbone, fresh)
        if "render" in cfg.figures:
            figures += render_figures(cfg)
        if "score" in cfg.figures:
            found, facts["score"] = score_figures(cfg, backbone, fresh)
            figures += found
        if "wrap" in cfg.figures:
            figures += wrap_figures(cfg, fresh)
        if "vector" in cfg.figures:
            figures += vector_figures(cfg, backbone, fresh)
        if "train" in cfg.figures:
            found, facts["train"] = train_figures(cfg, backbone, fresh, Path(scratch))
            figures += found
    result = {
        "figures": [asdict(figure) for figure in figures],
        "facts": facts,
        "command": shlex.join(["python", "-m", "eval.throughput", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "backbone": cfg.backbone,
        "adapter": cfg.adapter,
        "hardware": {
            "machine": platform.machine(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": cfg.threads,
            "load": [round(load, 2) for load in os.getloadavg()],
            "renderer": os.environ.get("MUJOCO_GL", ""),
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mujoco": mujoco.__version__,
        },
    }
    save(result, cfg.out)
    print(table(figures))
    print(f"{processor_name() or platform.machine()}, threads: {cfg.threads}; written to {cfg.out}")
    return result


def rate(work: Callable[[], object], items: int, unit: str, least: float = 0.0) -> Measure:
    """A measure of `work`, which does `items` a call: called once now, to warm up, and then for `least` s."""
    work()

    def measure() -> dict[str, float]:
        calls, began, used = 0, time.perf_counter(), time.process_time()
        while True:
            work()
            calls += 1
            if (elapsed := time.perf_counter() - began) >= least:
                done = items * calls
                return {unit: done / elapsed, CPU: done / max(time.process_time() - used, 1e-9)}

    return measure


def take_turns(ways: Mapping[str, Measure], seconds: float, turns: int) -> dict[tuple[str, str], np.ndarray]:
    """A B A B ... for `seconds` and at least `turns` each: (way, unit) -> float64 [turns], items a second."""
    rates: dict[tuple[str, str], list[float]] = {}
    done, began = 0, time.monotonic()
    while done < turns or time.monotonic() - began < seconds:
        for way, measure in ways.items():
            for unit, value in measure().items():
                rates.setdefault((way, unit), []).append(value)
        done += 1
    return {key: np.array(values) for key, values in rates.items()}


def compare(
    name: str,
    unit: str,
    rates: Mapping[tuple[str, str], np.ndarray],
    fast: str,
    plain: str,
    target: float | None = None,
) -> Figure:
    """The way `fast` against the way `plain`, by what `take_turns` returned."""
    ratios = rates[fast, unit] / rates[plain, unit]
    cpu = rates[fast, CPU] / rates[plain, CPU] if (fast, CPU) in rates else None
    return Figure(
        figure=name,
        unit=unit,
        fast=float(np.median(rates[fast, unit])),
        plain=float(np.median(rates[plain, unit])),
        ratio=float(np.median(ratios)),
        low=float(ratios.min()),
        high=float(ratios.max()),
        cpu_ratio=None if cpu is None else float(np.median(cpu)),
        turns=len(ratios),
        target=target,
    )


def render_figures(cfg: ThroughputConfig) -> list[Figure]:
    """Views a second of one scene, with two renderers of one environment."""
    env = make_env(TASK, 0)
    env.reset()
    # Both stay open until the end: freeing one context would break the other.
    rigs = {profile: CameraRig(env, CameraSpec(profile=profile)) for profile in ("fast", "full")}
    try:
        views = len(CameraSpec().cameras)
        ways = {
            profile: rate(rig.render, views, "views/s", least=cfg.turn_seconds)
            for profile, rig in rigs.items()
        }
        rates = take_turns(ways, cfg.seconds, cfg.turns)
    finally:
        for rig in rigs.values():
            rig.close()
        env.close()
    return [compare("render", "views/s", rates, "fast", "full", 8.0)]


def score_figures(cfg: ThroughputConfig, backbone: Path, fresh: Path) -> tuple[list[Figure], dict[str, Any]]:
    """Frames a second, and by how much the scores of both ways differ."""
    adapter = fresh if cfg.adapter is None else locate(cfg.adapter)
    model = RewardModel.from_pretrained(adapter)
    if not model.encoder.has_adapter:
        raise ValueError(f"{cfg.adapter} is a backbone, not an adapter; give it as --backbone")
    if locate(model.encoder.name).resolve() != backbone.resolve():
        raise ValueError(
            f"adapter {cfg.adapter} belongs to {model.encoder.name}, not to {cfg.backbone}; "
            "give that as --backbone"
        )
    views = len((model.camera_spec or CameraSpec()).cameras)
    frames = noise(ENVIRONMENTS, views, DEFAULT_SIZE)
    text = instruction(TASK)

    plain = DualEncoder.from_pretrained(backbone)
    plain.load_adapter(adapter)
    processor = AutoImageProcessor.from_pretrained(backbone, backend="pil")
    with torch.inference_mode():
        sentence = plain_text(plain, text)

    def one_frame_at_a_time() -> np.ndarray:
        with torch.inference_mode():
            flat = frames.reshape(-1, *frames.shape[2:])
            scores = [F.cosine_similarity(plain_image(plain, processor, f), sentence).item() for f in flat]
        return np.array(scores, np.float32).reshape(ENVIRONMENTS, views)

    model = model.with_start_weight(0)  # the plain way has none; it costs an embedding an episode
    difference = float(np.abs(model.score(frames, text) - one_frame_at_a_time()).max())
    count = ENVIRONMENTS * views
    ways = {
        "fast": rate(lambda: model.score(frames, text), count, "frames/s", least=cfg.turn_seconds),
        "plain": rate(one_frame_at_a_time, count, "frames/s", least=cfg.turn_seconds),
    }
    rates = take_turns(ways, cfg.seconds, cfg.turns)
    figure = compare("score", "frames/s", rates, "fast", "plain", 6.0)
    facts = {
        "environments": ENVIRONMENTS,
        "views": views,
        "dtype": str(model.dtype).removeprefix("torch."),
        "largest_difference_of_scores": difference,
    }
    return [figure], facts


def stepping(env: gym.Env, score: Callable[[], object] | None = None) -> Callable[[], None]:
    """Steps with random actions, and resets where an episode ends; `score` is called after each of both."""
    env.action_space.seed(0)
    env.reset(seed=0)

    def step() -> None:
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if score:
            score()
        if terminated or truncated:
            env.reset()
            if score:
                score()

    return step


def wrap_figures(cfg: ThroughputConfig, fresh: Path) -> list[Figure]:
    """Steps a second of the wrapper, and of what it cannot do without."""
    model = RewardModel.from_pretrained(fresh if cfg.adapter is None else cfg.adapter)
    spec = model.camera_spec or CameraSpec()
    wrapped = VLMRewardWrapper(make_env(TASK, 0), model, cameras=spec)
    bare, text = make_env(TASK, 0), instruction(TASK)
    bare.reset()
    rig = CameraRig(bare, spec)
    start = model.embed_start(rig.render()[None])

    def by_hand() -> None:
        model.score(rig.render()[None], text, start=start)

    try:
        ways = {
            "wrapper": rate(stepping(wrapped), 1, "steps/s", least=cfg.turn_seconds),
            "bare": rate(
                stepping(bare, by_hand),
                1,
                "steps/s",
                least=cfg.turn_seconds,
            ),
        }
        rates = take_turns(ways, cfg.seconds, cfg.turns)
    finally:
        wrapped.close()
        rig.close()
        bare.close()
    return [compare("wrap", "steps/s", rates, "wrapper", "bare", 0.9)]


def vector_figures(cfg: ThroughputConfig, backbone: Path, fresh: Path) -> list[Figure]:
    """Steps a second, over all environments, of 8 in one forward, of one, and of 8 one by one."""
    adapter = fresh if cfg.adapter is None else locate(cfg.adapter)
    model = RewardModel.from_pretrained(adapter)
    spec = model.camera_spec or CameraSpec()
    plain = DualEncoder.from_pretrained(backbone)
    plain.load_adapter(adapter)
    slow = RewardModel(
        plain.requires_grad_(False).eval(),
        camera_spec=spec,
        start_weight=model.start_weight,
        dtype=torch.float32,
    )
    one = VLMRewardWrapper(make_env(TASK, 0), model, cameras=spec)
    apart = [VLMRewardWrapper(make_env(TASK, seed), slow, cameras=spec) for seed in range(ENVIRONMENTS)]
    venv = VLMRewardVecEnv.from_env_fns(
        [partial(make_env, TASK, seed) for seed in range(ENVIRONMENTS)], model, cameras=spec
    )
    try:
        venv.action_space.seed(0)
        venv.reset()
        steps = [stepping(env) for env in apart]

        def together() -> None:
            venv.step(np.stack([venv.action_space.sample() for _ in range(ENVIRONMENTS)]))

        def one_by_one() -> None:
            for step in steps:
                step()

        least = cfg.turn_seconds
        ways = {
            "vector": rate(together, ENVIRONMENTS, "steps/s", least=least),
            "one": rate(stepping(one), 1, "steps/s", least=least),
            "apart": rate(one_by_one, ENVIRONMENTS, "steps/s", least=least),
        }
        rates = take_turns(ways, cfg.seconds, cfg.turns)
    finally:
        venv.close()
        for env in (one, *apart):
            env.close()
    figures = [
        compare("vector/one", "steps/s", rates, "vector", "one", 1.5),
        compare("vector/apart", "steps/s", rates, "vector", "apart", 2.5),
    ]
    return [replace(figure, cpu_ratio=None) for figure in figures]  # the workers' time is not in ours


def train_figures(
    cfg: ThroughputConfig, backbone: Path, fresh: Path, scratch: Path
) -> tuple[list[Figure], dict[str, Any]]:
    """Samples and images a second.

    Training is started anew for each turn and leaves behind when each step ended. Noise at the model's own
    resolution stands for demonstrations, so the loop is spared the resizing.
    """
    encoder = DualEncoder.from_pretrained(backbone)
    encoder.load_adapter(fresh, trainable=True)
    tasks = train_tasks()
    episodes = [noise(16, len(CameraSpec().cameras), encoder.image_size, seed) for seed in range(len(tasks))]
    spec = CameraSpec(height=encoder.image_size, width=encoder.image_size)
    write_dataset(scratch, tasks, episodes, spec)

    logs: dict[str, dict[str, Any]] = {}

    def training(sampler: str) -> Measure:
        def measure() -> dict[str, float]:
            log, step_seconds = run_training(cfg, backbone, spec, sampler, scratch)
            logs[sampler], done = log, log["result"]
            share = done["seconds"] / done["steps"] / step_seconds
            return {f"{unit}/s": done[f"{unit}_per_second"] * share for unit in ("samples", "images")}

        return measure

    samples = rate(plain_training(encoder, backbone, tasks, episodes), BATCH, "samples/s")

    def plain() -> dict[str, float]:
        rates = samples()
        return rates | {"images/s": 2 * rates["samples/s"]}

    ways = {"paper": training("paper"), "plain": plain, "grouped": training("grouped")}
    rates = take_turns(ways, cfg.seconds, cfg.turns)
    lines = (
        ("paper", "samples/s", 3.0),
        ("paper", "images/s", None),
        ("grouped", "samples/s", None),
        ("grouped", "images/s", None),
    )
    figures = [
        compare(f"train/{sampler}", unit, rates, sampler, "plain", target) for sampler, unit, target in lines
    ]
    facts: dict[str, Any] = {
        sampler: {"dtype": log["hardware"]["dtype"], "steps": log["result"]["steps"]}
        for sampler, log in logs.items()
    }
    return figures, facts


def run_training(
    cfg: ThroughputConfig, backbone: Path, spec: CameraSpec, sampler: str, scratch: Path
) -> tuple[dict[str, Any], float]:
    """Some steps of `training.train`, which evaluation may start but not import.

    Returns:
        Its train_log.json, and the mean seconds of a step after the first, by the times in its TensorBoard log.
    """
    output = scratch / sampler
    options = {
        "objective": "triplet",
        "sampler": sampler,
        "backbone": backbone.resolve(),
        "dataset": DATASET,
        "cameras.height": spec.height,
        "cameras.width": spec.width,
        "max-steps": cfg.train_steps,
        "validation-fraction": 0,
        "threads": cfg.threads,
        "device": "cpu",
        "cache": scratch / "cache",
        "output": output,
    }
    command = [sys.executable, "-m", "training.train", "--overwrite"]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    environment = os.environ | {"MINARI_DATASETS_PATH": str(scratch / "minari")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    events = EventAccumulator(str(output / "tensorboard")).Reload().Scalars("train/loss")
    step_seconds = (events[-1].wall_time - events[0].wall_time) / (events[-1].step - events[0].step)
    return json.loads((output / "train_log.json").read_text()), step_seconds


def plain_training(
    encoder: DualEncoder, backbone: Path, tasks: Sequence[str], episodes: Sequence[np.ndarray]
) -> Callable[[], None]:
    """Train on one batch, sample by sample; `episodes` are uint8 [T, V, S, S, 3], one for each task."""
    processor = AutoImageProcessor.from_pretrained(backbone, backend="pil")
    optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=1e-4, weight_decay=0.01)
    rng = np.random.default_rng(0)

    def batch() -> None:
        for _ in range(BATCH):
            number = int(rng.integers(len(tasks)))
            length, views = episodes[number].shape[:2]
            early, late = np.sort(rng.choice(length, 2, replace=False))
            text = plain_text(encoder, instruction(tasks[number]))
            scores = [
                F.cosine_similarity(
                    plain_image(encoder, processor, episodes[number][t, rng.integers(views)]), text
                )
                for t in (early, late)
            ]
            # The loss is a sum over samples; so is the gradient, and no more than one sample is kept at once.
            (MARGIN - scores[1] + scores[0]).relu().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return batch


def plain_image(encoder: DualEncoder, processor: Any, frame: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> [1, D], as the model's card on the Hub shows it."""
    return _tensor(encoder.model.get_image_features(**processor(images=frame, return_tensors="pt")))


def plain_text(encoder: DualEncoder, text: str) -> torch.Tensor:
    """One sentence -> [1, D] through the backbone's own tokenizer."""
    return _tensor(encoder.model.get_text_features(**encoder.tokenize([text])))


def _tensor(features: Any) -> torch.Tensor:
    return getattr(features, "pooler_output", features)


def write_fresh_adapter(backbone: Path, folder: Path) -> None:
    """An adapter of the default size that changes nothing yet: as fast as a trained one."""
    encoder = DualEncoder.from_pretrained(backbone)
    encoder.add_lora()
    RewardModel(encoder).save_pretrained(folder)


def noise(timesteps: int, views: int, size: int, seed: int = 0) -> np.ndarray:
    """Random frames uint8 [T, V, S, S, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (timesteps, views, size, size, 3), dtype=np.uint8)


def write_dataset(root: Path, tasks: Sequence[str], episodes: Sequence[np.ndarray], spec: CameraSpec) -> None:
    """A Minari dataset as training reads it, one episode a task, under `root`/minari."""
    data = root / "minari" / DATASET / "data"
    data.mkdir(parents=True)
    image = gym.spaces.Box(0, 255, (spec.height, spec.width, 3), np.uint8)
    spaces: dict[str, Any] = {"state": gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)}
    spaces |= dict.fromkeys(spec.cameras, image)
    storage = MinariStorage.new(
        data,
        gym.spaces.Dict(spaces),
        gym.spaces.Box(-1.0, 1.0, (4,), np.float32),
        data_format="hdf5",
        jpeg_encoding=False,
    )
    storage.update_episodes(_buffer(frames, spec) for frames in episodes)
    storage.update_episode_metadata(
        [
            {"task": t, "instruction": instruction(t), "kind": "expert", "seed": i, "success": True}
            for i, t in enumerate(tasks)
        ]
    )
    storage.update_metadata(
        {
            "dataset_id": DATASET,
            "minari_version": minari.__version__,
            "camera_spec": json.dumps(spec.to_dict()),
        }
    )


def _buffer(frames: np.ndarray, spec: CameraSpec) -> EpisodeBuffer:
    length = len(frames)
    images = {camera: frames[:, view] for view, camera in enumerate(spec.cameras)}
    last = np.arange(length) == length - 1
    actions: Any = np.zeros((length - 1, 4), np.float32)
    return EpisodeBuffer(
        observations={"state": np.zeros((length, 39))} | images,
        actions=actions,
        rewards=[0.0] * (length - 1),
        terminations=list(last[1:]),
        truncations=[False] * (length - 1),
        infos={"success": last.astype(float)},
    )


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines of text."""
    rows = [("figure", "unit", "fast", "plain", "ratio", "turns between", "CPU ratio", "target")]
    for f in figures:
        reached = (
            "" if f.target is None else f"{f.target:g}x {'reached' if f.ratio >= f.target else 'missed'}"
        )
        cpu = "" if f.cpu_ratio is None else f"{f.cpu_ratio:.1f}x"
        numbers = (f"{f.fast:.1f}", f"{f.plain:.1f}", f"{f.ratio:.1f}x", f"{f.low:.1f} and {f.high:.1f}", cpu)
        rows.append((f.figure, f.unit, *numbers, reached))
    form = "{:<14}  {:<9}  {:>7}  {:>7}  {:>6}  {:>14}  {:>9}  {}"
    return "\n".join(form.format(*row).rstrip() for row in rows)


def processor_name() -> str:
    """The CPU's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def save(result: dict[str, Any], out: Path) -> None:
    """Write JSON beside `out`, then put it in its place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as fresh:
        fresh.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(ThroughputConfig, prog="python -m eval.throughput", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
