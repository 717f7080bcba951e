"""What the README and eval/REPRODUCE.md show runs, and the files they name exist."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from eval.lerobot_writer import write_lerobot
from vlm_reward.__main__ import main as vlm_reward

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "eval" / "REPRODUCE.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", PAGES, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line for line in SHELL.splitlines() if re.match(r"(\.venv/bin/)?(python -m|vlm-reward) ", line)]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "learned" in capsys.readouterr().out


class Parsed(Exception):  # noqa: N818
    """The command line was understood."""


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_are_understood(line, monkeypatch):
    words = shlex.split(line, comments=True)
    read = tyro.cli

    def stop(*args, **kwargs):
        read(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    with pytest.raises(Parsed):
        run(words[2:], monkeypatch) if words[1] == "-m" else vlm_reward(words[1:])


def run(words, monkeypatch):
    """`python -m words`, here."""
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / (words[0].replace(".", "/") + ".py")), run_name="__main__")


def test_the_worked_example_on_a_lerobot_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_REWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_lerobot(tmp_path / "my_dataset", lengths=(12, 9, 10))
    train, label = (
        line for line in COMMANDS if "~/data/my_dataset" in line and "runs/mine" in line and "out" in line
    )
    train = train.replace("~/data", ".").replace("--max-steps 500", "--max-steps 2")
    run(shlex.split(train)[2:], monkeypatch)
    with pytest.raises(SystemExit) as end:
        vlm_reward(shlex.split(label.replace("~/data", "."))[1:])
    assert not end.value.code
    assert "out/rewards.parquet" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "curves").iterdir())) == 3


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


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME", PAGES)


@pytest.mark.parametrize(
    "page", ["README.md", "eval/REPRODUCE.md", "eval/RESULTS.md", "agents/RESULTS.md"], ids=str
)
def test_links_lead_somewhere(page):
    """Files that are linked exist, and the headings within them."""
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_commands_are_modules():
    assert len(COMMANDS) > 20
    for module in re.findall(r"python -m ((?:training|eval|agents)\.\w+)", PAGES):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@pytest.mark.parametrize("package", ["training", "eval", "agents"])
def test_help_calls_commands_as_one_types_them(package):
    files = [file for file in (ROOT / package).glob("*.py") if "tyro.cli(" in file.read_text()]
    assert len(files) > 5
    for file in files:
        assert f'prog="python -m {package}.{file.stem}"' in file.read_text(), file
