"""What the README shows runs, and the files it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("learned") in (3, 5)


def test_named_files_exist():
    tree = README.split("## Files")[1].split("```")[1]
    folder = ROOT
    names = 0
    for line in tree.splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
            assert folder.is_dir(), name
        elif name.endswith((".py", "/")):
            assert (folder / name).exists(), f"{folder.name}/{name}"
            names += 1
    assert names > 15


def test_linked_pictures_exist():
    for link in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / link).is_file(), link


def test_commands_are_modules():
    for module in re.findall(r"python -m ((?:training|eval|agents)\.\w+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
