"""How fast stored datasets are read and scored.

    python -m eval.dataset_throughput                            # about six minutes

    label    `vlm-reward label` of a LeRobot dataset, against RewardModel.score of the same frames already in
             memory: what decoding costs where it runs beside the scoring. The backbone has the size of
             SigLIP2-base (random weights).
    cache    camera frames a second of the frame cache of a LeRobot dataset of 50 episodes x 2 cameras x 100
             frames (AV1, 224 pixels) at 112 pixels, with one thread; and by how much the memory of the process
             grows meanwhile, beside the same for the first five episodes.

The frames are rendered: Meta-World, two cameras. Ways take turns as in eval.throughput.
"""

import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from transformers import SiglipConfig

from eval.lerobot_writer import write_lerobot
from eval.throughput import CPU, compare, processor_name, save, table, take_turns
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.datasets import open_dataset
from vlm_reward.encoder import DualEncoder
from vlm_reward.envs import behaviour, make_env
from vlm_reward.frame_cache import build_cache
from vlm_reward.labels import BATCH, Block, Job, write_blocks
from vlm_reward.reward_model import RewardModel

TASKS = ("drawer-close-v3", "faucet-open-v3", "window-close-v3", "push-v3")


@dataclass(frozen=True)
class DatasetThroughputConfig:
    """Measure reading and scoring of a LeRobot dataset."""

    episodes: int = 50
    """Of the dataset that is cached."""
    label_episodes: int = 2
    """Of the dataset that is labelled."""
    length: int = 100
    """Frames of an episode."""
    turns: int = 3
    """Turns of each way, at least."""
    threads: int = 2
    """CPU threads of PyTorch while labelling."""
    device: str = "cpu"
    """Where the model runs."""
    out: Path = Path("out/dataset_throughput.json")
    """The result."""


def main(cfg: DatasetThroughputConfig) -> dict[str, Any]:
    """Measure, print, and return what was written to `cfg.out`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vlm-reward-datasets-") as scratch:
        root = Path(scratch)
        shown = [rendered(task, cfg.length) for task in TASKS]

        def draw(episode: int, frame: int, view: int, _: tuple[int, int]) -> np.ndarray:
            return shown[episode % len(shown)][frame, view]

        common: dict[str, Any] = {"size": (224, 224), "codec": "libsvtav1", "per_file": 10, "draw": draw}
        torch.set_num_threads(1)
        first = write_lerobot(root / "first", lengths=(cfg.length,) * 5, **common)
        whole = write_lerobot(root / "whole", lengths=(cfg.length,) * cfg.episodes, **common)
        cache = [cache_figure(folder, root) for folder in (first, whole)]  # before a large model fills memory
        short = write_lerobot(root / "short", lengths=(cfg.length,) * cfg.label_episodes, **common)
        figure = label_figure(cfg, short, root)
    print(table([figure]))
    for line in cache:
        print(
            f"cache of {line['episodes']} episodes: {line['frames_per_second']:.0f} camera frames/s on a thread "
            f"({line['frames_per_cpu_second']:.0f} a second of processor time), memory grew by "
            f"{line['growth_mb']:.0f} MB"
        )
    result = {
        "figures": [asdict(figure)],
        "cache": cache,
        "command": shlex.join(["python", "-m", "eval.dataset_throughput", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "hardware": {
            "processor": processor_name() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": cfg.threads,
            "device": cfg.device,
            "load": [round(load, 2) for load in os.getloadavg()],
        },
    }
    save(result, cfg.out)
    return result


def rendered(task: str, length: int) -> np.ndarray:
    """A noisy expert at work: uint8 [length, 2, 224, 224, 3]."""
    env = make_env(task, max_episode_steps=length)
    observation, _ = env.reset(seed=0)
    act = behaviour(task, "noisy", np.random.default_rng(0))
    frames = []
    with CameraRig(env, CameraSpec(("corner", "corner3"))) as rig:
        for step in range(length):
            frames.append(rig.render())
            if step < length - 1:
                observation, *_ = env.step(act(step, observation))
    env.close()
    return np.stack(frames)


def base_sized(device: str) -> RewardModel:
    """A SigLIP of the size of google/siglip2-base-patch16-224 but for its vocabulary, with random weights."""
    tokenizer = DualEncoder.from_pretrained("siglip2-tiny").tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    config = SiglipConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "bos_token_id": None,
            **ids,
        },
        vision_config={"image_size": 224, "patch_size": 16},
    )
    encoder = DualEncoder.from_config(config, tokenizer).requires_grad_(False).to(device).eval()
    return RewardModel(encoder)


def label_figure(cfg: DatasetThroughputConfig, folder: Path, root: Path) -> Any:
    """Timesteps a second of labelling, against scoring what lies in memory."""
    torch.set_num_threads(cfg.threads)
    model, data = base_sized(cfg.device), open_dataset(folder)
    frames = np.concatenate([chunk.frames for chunk in data.chunks()])
    said = [episode.instruction for episode in data.episodes for _ in range(episode.length)]
    block = Block(Job(str(folder), "base-sized"), 0, len(data.episodes), root / "block.parquet")

    def label() -> None:
        write_blocks([block], model, data, quiet=True)

    def bare() -> None:
        for start in range(0, len(frames), BATCH):
            model.score(frames[start : start + BATCH], said[start : start + BATCH])

    def timed(work: Any) -> Any:
        def measure() -> dict[str, float]:
            began, used = time.perf_counter(), time.process_time()
            work()
            done = len(frames)
            cpu = done / (time.process_time() - used)
            return {"timesteps/s": done / (time.perf_counter() - began), CPU: cpu}

        return measure

    model.score(frames[:8], said[:8])
    rates = take_turns({"label": timed(label), "bare": timed(bare)}, 0, cfg.turns)
    return compare("label", "timesteps/s", rates, "label", "bare", 0.9)


def cache_figure(folder: Path, root: Path) -> dict[str, Any]:
    """Frames a second of building a cache, and what it did to this process' memory."""
    data = open_dataset(folder)
    before, began, used = memory_mb(), time.perf_counter(), time.process_time()
    cache = build_cache(data, 112, root / f"cache-{folder.name}")
    frames = cache.frames.shape[0] * cache.views
    return {
        "episodes": len(data.episodes),
        "frames": frames,
        "frames_per_second": frames / (time.perf_counter() - began),
        "frames_per_cpu_second": frames / (time.process_time() - used),
        "growth_mb": memory_mb() - before,
    }


def memory_mb() -> float:
    """The most this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    try:
        main(tyro.cli(DatasetThroughputConfig, prog="python -m eval.dataset_throughput", description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
