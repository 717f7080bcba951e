"""Imports point one way: see the table. Any other edge between our modules fails."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vlm_reward", "training", "eval", "agents")

# Inside vlm_reward: module -> what it may import of vlm_reward.
LIBRARY = {
    "__init__": {"_rendering"},
    "_rendering": set(),
    "_jobs": set(),
    "_parallel": {"_jobs"},
    "_film": {"_jobs"},
    "metrics": set(),
    "curves": {"_jobs"},
    "tasks": set(),
    "cameras": {"_rendering"},
    "preprocess": set(),
    "similarity": set(),
    "transforms": set(),
    "encoder": {"preprocess"},  # for the name of a type
    "envs": {"tasks", "cameras"},
    "recording": {"cameras"},
    "datasets": {"cameras", "lerobot", "recording"},
    "lerobot": {"cameras", "recording"},
    "frame_cache": {"_jobs", "cameras", "datasets", "preprocess", "recording"},
    "labels": {
        "_jobs",
        "_parallel",
        "curves",
        "datasets",
        "encoder",
        "ensemble",
        "recording",
        "reward_model",
    },
    "_card": {"tasks"},
    "instructions": set(),
    # `from_pretrained` makes ensembles and reach models, too: it imports them when it meets one.
    "reward_model": {
        "_card",
        "cameras",
        "ensemble",
        "encoder",
        "instructions",
        "preprocess",
        "reach",
        "similarity",
    },
    "reach": {"encoder", "instructions", "reward_model"},
    "ensemble": {"_card", "encoder", "reward_model"},
    "wrappers": {"cameras", "envs", "reward_model", "similarity", "tasks", "transforms"},
    "demo": {"_film", "_jobs", "cameras", "curves", "envs", "metrics", "reward_model", "tasks"},
    "video": {"_jobs", "curves", "metrics", "reward_model"},
    "doctor": {"_rendering", "cameras", "curves", "encoder", "envs", "reward_model", "tasks"},
    "__main__": {"demo", "doctor", "labels", "video"},
    "sb3": {"cameras", "envs", "reward_model", "similarity", "tasks", "transforms", "wrappers"},
}


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _ours(file: Path) -> set[str]:
    return {name for name in _imports(file) if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("file", sorted((ROOT / "vlm_reward").glob("*.py")), ids=lambda file: file.stem)
def test_library_modules(file):
    assert file.stem in LIBRARY, f"add vlm_reward/{file.name} to the table"
    for name in _ours(file):
        top, _, rest = name.partition(".")
        assert top == "vlm_reward", f"{file.name} imports {name}: the library may not"
        if rest:
            assert rest.split(".")[0] in LIBRARY[file.stem], f"{file.name} imports {name}"


@pytest.mark.parametrize("package", ["training", "eval", "agents"])
def test_the_rooms_do_not_know_each_other(package):
    for file in (ROOT / package).rglob("*.py"):
        for name in _ours(file):
            assert name.split(".")[0] in (package, "vlm_reward"), f"{file} imports {name}"


def test_only_the_library_is_installed():
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"] == ["vlm_reward", "vlm_reward.checkpoints"]
    assert setuptools["package-dir"] == {"vlm_reward.checkpoints": "checkpoints"}
    assert not [folder for folder in (ROOT / "vlm_reward").glob("*/") if folder.name != "__pycache__"]
    patterns = setuptools["package-data"]["vlm_reward.checkpoints"]
    files = {file for pattern in patterns for file in (ROOT / "checkpoints").glob(pattern)}
    assert files == {file for file in (ROOT / "checkpoints").rglob("*") if file.is_file()}


def test_nothing_outside_the_project_is_read():
    for file in [p for top in (*PACKAGES, "tests") for p in (ROOT / top).rglob("*.py")]:
        if file != Path(__file__):
            assert "../shared" not in file.read_text(), file
