"""The `vlm-reward` command: what works without a checkout.

vlm-reward doctor                                   # does everything work here, and how to mend what does not
vlm-reward score robot.mp4 "open the green drawer"  # a score for each frame, as a table and a picture
vlm-reward label ~/data/my_dataset --model runs/mine   # the reward of every frame of a dataset, as parquet
vlm-reward demo                                     # a sentence becomes a reward on a task never seen
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

MODEL = "siglip2-tiny/triplet+order+wrong+start+judge"
MOST_CONSISTENT = "siglip2-tiny-ensemble"


@dataclass(frozen=True)
class Doctor:
    """Check this installation and say how to mend what is broken.

    Looks at packages, device, rendering, an environment's cameras, the embedded models, their tokenizer and the
    Hugging Face Hub. The exit status is 1 when something is broken that is needed.
    """

    env: str = "drawer-open-v3"
    """Whose cameras to show: a Meta-World task, or the id of any Gymnasium environment that uses MuJoCo (one that
    a package registers when imported: `package:Id-v0`)."""
    out: Path = Path("out/contact-sheet.png")
    """Where to write the picture of all its cameras."""

    def run(self) -> int:
        from vlm_reward.doctor import examine

        return examine(self.env, self.out, MODEL)


@dataclass(frozen=True)
class Score:
    """Score each frame of a video by a sentence: a CSV table, and the curve below a strip of frames as PNG.

    The score is the similarity of the frame with the sentence, from -1 to 1. It means little by itself: a good
    reward rises as the task gets done.
    """

    video: tyro.conf.Positional[Path]
    """A video (MP4 and what else FFmpeg reads), or a folder of images, from where the attempt begins."""
    instruction: tyro.conf.Positional[str]
    """What the robot should do, e.g. "open the green drawer"."""
    views: tuple[Path, ...] = ()
    """Further videos or folders that show the same moments from other cameras; the score is the mean."""
    model: str = MODEL
    """Adapter or backbone: a folder, an embedded model (see `vlm-reward doctor`), or a Hub id."""
    out: Path = Path("out/score")
    """Folder of the results."""
    every: int = 1
    """Score only each so many-th frame."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""

    def run(self) -> int:
        from vlm_reward.video import score

        videos = (self.video, *self.views)
        score(videos, self.instruction, model=self.model, out=self.out, every=self.every, device=self.device)
        return 0


@dataclass(frozen=True)
class Label:
    """Score every frame of a dataset, each by its episode's sentence: a parquet file that its loader can join.

    Its columns are `index`, `episode_index`, `frame_index` and `reward`. A run that was stopped goes on.
    """

    dataset: tyro.conf.Positional[str]
    """A LeRobotDataset v3.0 folder, a Minari id or the folder of a Minari dataset with image observations."""
    model: str = MODEL
    """Adapter or backbone: a folder, an embedded model (see `vlm-reward doctor`), or a Hub id."""
    output: Path | None = None
    """The parquet file; rewards-MODEL.parquet in the dataset's folder when not given."""
    views: tuple[str, ...] = ()
    """Cameras to score, in the order of the model's; all of them when not given."""
    instruction: str | None = None
    """The sentence of all episodes, in place of their own."""
    per_view: bool = False
    """Write a column `reward.CAMERA` for each view, too."""
    curves: Path | None = None
    """Folder for a picture of each episode: some of its frames over its rewards."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    workers: int = 1
    """Processes, each with a model of its own."""
    ray: str | None = None
    """Spread the work with Ray: local, or the address of a cluster that shares the dataset's folder."""
    overwrite: bool = False
    """Replace an output that is there."""

    def run(self) -> int:
        from vlm_reward.labels import draw_curves, label

        settings = dict(vars(self))
        dataset, curves = settings.pop("dataset"), settings.pop("curves")
        file = label(dataset, **settings)
        print(f"rewards  {file}")
        if curves is not None:
            draw_curves(file, dataset, curves, views=self.views, instruction=self.instruction)
            print(f"curves   {curves}")
        return 0


@dataclass(frozen=True)
class Demo:
    """Watch a sentence become a reward: scored rollouts of a task that no training has seen, a picture, a film."""

    model: str = MOST_CONSISTENT
    """Adapter, backbone or ensemble: a folder, an embedded model (see `vlm-reward doctor`), or a Hub id."""
    task: str = "drawer-open-v3"
    """Any Meta-World task; the default is one of the three held out from all training."""
    instruction: str | None = None
    """What the robot should do; the task's instruction when not given."""
    out: Path = Path("out/demo")
    """Folder of the picture and the film."""
    seed: int = 3
    """Seed of the rollouts."""

    def run(self) -> int:
        from vlm_reward.demo import demo

        demo(self.model, self.task, self.instruction, out=self.out, seed=self.seed)
        return 0


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands; ends with SystemExit, whose message is all that a user sees of an error."""
    command = tyro.cli(
        Doctor | Score | Label | Demo,  # pyright: ignore[reportArgumentType]
        prog="vlm-reward",
        description="Say what a robot should do in a sentence, and get a dense reward from its cameras.",
        args=arguments,
    )
    try:
        status = command.run()
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(status)


if __name__ == "__main__":
    main()
