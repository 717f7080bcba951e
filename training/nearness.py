"""How well a score follows the hand to a thing, in worlds that nothing was trained on.

    python -m training.nearness --checkpoint siglip2-tiny-soup/reach+start
    python -m training.nearness --checkpoint siglip2-tiny-soup/reach --cameras corner

Builds fresh worlds (`training.worlds`), sends the hand to places in a ball about each thing, the rest as it was,
and scores what the cameras see by "touch the <thing>", as an agent would be rewarded. Prints the rank correlation
of score and nearness over the places of a thing (chance 0), and how far from the thing the hand is where the score
is highest: what an agent that did nothing else would come to; of a model that says where things are, also how far
off that is (mean and median). Of a checkpoint to choose, without a task.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import tyro
from tqdm import tqdm

from training.worlds import World
from vlm_reward._jobs import BAR_SECONDS
from vlm_reward.cameras import CameraRig, CameraSpec
from vlm_reward.metrics import bootstrap_interval, spearman
from vlm_reward.reach import ReachModel
from vlm_reward.reward_model import RewardModel, auto_device

NEAR, FAR = 0.02, 0.25
"""Metres from the thing to where the hand is sent."""
ABOVE = 0.22
"""Height at which the hand goes there, not to sweep things away, metres."""


@dataclass(frozen=True)
class Config:
    """Tell how well a score follows the hand to a thing, in worlds that nothing was trained on."""

    checkpoint: str
    """A folder, a name under checkpoints/ or a Hub id."""
    cameras: tuple[str, ...] = ()
    """Views to score; all of the model's when not given."""
    worlds: int = 50
    """How many, of one to three things."""
    places: int = 28
    """Of the hand about each thing, the thing itself among them."""
    seed: int = 501
    """World k draws from (seed, k): take one that `training.worlds` was not run with."""

    def __post_init__(self) -> None:
        if self.worlds < 1 or self.places < 2:
            raise ValueError(f"1 world and 2 places at least, got {self.worlds} and {self.places}")


def visit(
    world: World, rig: CameraRig, thing: int, places: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Send the hand to places about a thing, each time from the moment as it is.

    Returns:
        frames uint8 [places, V, H, W, 3], and how far the hand then is from the thing, float64 [places], metres.
    """
    moment = world.moment()
    frames, far = [], []
    for place in range(places):
        world.again(moment)
        way = rng.normal(size=3)
        way *= (place > 0) * rng.uniform(NEAR, FAR) / np.linalg.norm(way)
        goal = world.parts()[thing] + way
        for step in range(75):
            above = (*goal[:2], max(goal[2], ABOVE)) if step < 45 else goal
            world.move(above - world.hand(), -1.0)
        frames.append(rig.render())
        far.append(np.linalg.norm(world.parts()[thing] - world.hand()))
    world.again(moment)
    return np.stack(frames), np.array(far)


def nearness(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """By kind of thing ("all", "alone in its world", "press", ...): `correlation` and `metres`, one a thing.

    Of a reach model that looks for things in first frames also `off`, metres.
    """
    model = RewardModel.from_pretrained(config.checkpoint, device=auto_device("auto"))
    if config.cameras:
        model = model.with_cameras(config.cameras)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in tqdm(range(config.worlds), unit="world", mininterval=BAR_SECONDS, leave=False):
        rng = np.random.default_rng((config.seed, number))
        world = World(rng, fewest=1)
        with CameraRig(world, model.camera_spec or CameraSpec()) as rig:
            world.begin()
            first = rig.render()
            for thing, named in enumerate(world.things[:-1]):
                asked, part = f"touch the {named.noun}", world.parts()[thing]
                frames, far = visit(world, rig, thing, config.places, rng)
                score = model.score(frames, asked, start=first).mean(1)
                figures = {"correlation": spearman(score, -far), "metres": float(far[score.argmax()])}
                if isinstance(model, ReachModel) and model.start_weight:
                    figures["off"] = float(np.linalg.norm(model.locate(first[None], asked)[0] - part))
                alone = ["alone in its world"] if len(world.things) == 2 else []
                for kind in ("all", *alone, named.kind or "lying"):
                    for name, figure in figures.items():
                        found[kind][name].append(figure)
    return {kind: {name: np.array(of) for name, of in each.items()} for kind, each in found.items()}


def main() -> None:
    """Read the command line, measure, print."""
    try:
        config = tyro.cli(Config, prog="python -m training.nearness", description=__doc__)
        found = nearness(config)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{config.checkpoint}, {config.worlds} worlds, {config.places} places of the hand about each thing:"
    )
    for kind, each in sorted(found.items(), key=lambda one: -len(one[1]["metres"])):
        values, metres = 100 * each["correlation"], 100 * each["metres"]
        low, high = bootstrap_interval(values, seed=0)
        off = 100 * each.get("off", np.empty(0))
        print(
            f"  {kind:20s}{len(values):4d} things  rank correlation {values.mean():5.1f} [{low:.1f}, {high:.1f}]"
            f"  best scored at {metres.mean():.1f} cm"
            + (f"  place off by {off.mean():.1f} cm (median {np.median(off):.1f})" if off.size else "")
        )


if __name__ == "__main__":
    main()
