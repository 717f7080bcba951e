"""Put the best adapter of each objective of the study under checkpoints/, with a model card of its figures.

    python -m training.ship                          # after python -m training.study
    python -m training.ship --objectives triplet liv

Best is the cell with nothing changed, of any preset and seed, whose validation VOC is highest; held-out figures
choose nothing. The adapters themselves lie where the study wrote them (runs/study), so run that first.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from training.objectives import OBJECTIVES, find_objective
from training.study import read
from vlm_reward.encoder import CHECKPOINTS, locate, weights_digest
from vlm_reward.reward_model import RewardModel


@dataclass(frozen=True)
class ShipConfig:
    """Best adapters of the study to where they are found by name."""

    study: Path = Path("eval/results/study.json")
    """What training.study wrote."""
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    """Which of them."""
    out: Path = CHECKPOINTS
    """Folder of the backbones: <out>/<backbone>/<objective>."""

    def __post_init__(self) -> None:
        for name in self.objectives:
            find_objective(name)


def main(cfg: ShipConfig) -> list[Path]:
    """Copy them, once it is clear that all can be; returns the folders.

    Raises:
        ValueError: an objective has no finished cell, or its backbone has been trained again since.
        FileNotFoundError: a cell's folder is gone.
    """
    found = read(cfg.study)
    chosen = []
    for objective in cfg.objectives:
        cells = [
            cell
            for cell in found["cells"]
            if cell["objective"] == objective and not cell["choice"] and "error" not in cell
        ]
        if not cells:
            raise ValueError(f"{cfg.study} has no finished cell of {objective}; run python -m training.study")
        best = max(cells, key=lambda cell: cell["best"]["val_voc"])
        if not weights_digest(locate(best["backbone"])).startswith(best["weights"]):
            raise ValueError(
                f"{best['cell']} was trained on other weights of {best['backbone']}; run it again"
            )
        chosen.append((best, RewardModel.from_pretrained(Path(best["checkpoint"]))))
    folders = []
    for best, model in chosen:
        name = f"{Path(best['backbone']).name}/{best['objective']}"
        model.metadata["evaluation"] = [
            row for row in found["rows"] if row["checkpoint"] == best["checkpoint"]
        ]
        model.metadata["validation VOC of the backbone alone, %"] = round(
            100 * best["history"][0]["val_voc"], 1
        )
        folder = cfg.out / name
        (folder / "README.md").unlink(missing_ok=True)  # the figures of an earlier one
        model.save_pretrained(folder, name=name)
        shutil.copy(Path(best["checkpoint"], "train_log.json"), folder)
        print(f"{name}: {best['cell']}, validation VOC {100 * best['best']['val_voc']:.1f}")
        folders.append(folder)
    return folders


if __name__ == "__main__":
    try:
        main(tyro.cli(ShipConfig, prog="python -m training.ship", description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"training.ship: {error}") from error
