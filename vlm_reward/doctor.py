"""What works on this machine, and how to mend what does not: `vlm-reward doctor`.

Nothing heavy is imported at the top: a package that is missing or broken is one of the things to find.
"""

import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vlm_reward._rendering import INSTALL_HINT

PACKAGES = ("torch", "transformers", "peft", "gymnasium", "mujoco", "metaworld", "av", "numpy")
HUB_SECONDS = 5
RENDER_SECONDS = 60  # a first import of mujoco from a cold disk takes a while

_RENDER = """
import os
try:
    import mujoco
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 3'/><geom size='.5'/></worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 32, 32)
    renderer.update_scene(data)
    assert renderer.render().std() > 1, "its picture is blank"
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(1)  # without the errors of half-made objects
os._exit(0)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        ok: whether it works; a note that nothing essential hangs on is ok, too.
        text: what was found.
        mend: what to do about it; empty where there is nothing to do.
    """

    ok: bool
    text: str
    mend: str = ""


def examine(env: str, out: Path, model: str) -> int:
    """Print a finding for each thing that must work, and draw an environment's cameras.

    Args:
        env: a Meta-World task or a Gymnasium id.
        out: the PNG of the cameras.
        model: the embedded model to try.

    Returns:
        0, or 1 when something essential is broken.
    """
    print(f"vlm-reward {_version()}, Python {platform.python_version()}, {platform.platform()}\n")
    again = "install vlm-reward again from where you had it: pip install --force-reinstall ..."
    checks: dict[str, tuple[Callable[[], Finding], str]] = {
        "packages": (packages, again),
        "rendering": (rendering, INSTALL_HINT),  # before anything imports mujoco
        "cameras": (
            lambda: cameras(env, out),
            "give an environment that uses MuJoCo as --env, and a file that can be written as --out",
        ),
        "device": (device, "reinstall PyTorch: https://pytorch.org/get-started/locally"),
        "models": (models, again),
        "tokenizer": (lambda: tokenizer(model), again),
        "hub": (hub, "pip install --upgrade huggingface_hub"),
    }
    broken = 0
    for name, (check, mend) in checks.items():
        try:
            finding = check()
        except Exception as error:  # whatever breaks is what the user asked to be told
            finding = Finding(False, f"{type(error).__name__}: {' '.join(str(error).split())}", mend)
        broken += not finding.ok
        print(f"{'ok' if finding.ok else 'BROKEN':7s} {name:10s} {finding.text}")
        if finding.mend:
            print(f"{'':18s} -> {finding.mend}")
    print(f"\n{f'{broken} broken: do what the arrows say' if broken else 'all that is essential works'}")
    return min(broken, 1)


def packages() -> Finding:
    """Whether the installed versions are those that the package asks for."""
    from packaging.requirements import Requirement

    wrong = {}
    for line in _requirements() or PACKAGES:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        installed = _installed(wanted.name)
        if installed is None:
            wrong[f"{wanted.name} is missing"] = wanted
        elif not wanted.specifier.contains(installed, prereleases=True):
            wrong[f"{wanted.name} {installed} does not fit {wanted.specifier}"] = wanted
    if wrong:
        names = " ".join(f'"{wanted.name}{wanted.specifier}"' for wanted in wrong.values())
        return Finding(False, "; ".join(wrong), f"pip install {names}")
    return Finding(True, ", ".join(f"{name} {_installed(name)}" for name in PACKAGES))


def device() -> Finding:
    """Where models run, and in which arithmetic."""
    import torch

    from vlm_reward.reward_model import auto_dtype

    def arithmetic(kind: str) -> str:
        return str(auto_dtype(kind)).removeprefix("torch.")

    if torch.cuda.is_available():
        torch.ones(2, device="cuda").sum().item()  # raises where driver and PyTorch do not fit
        gpu = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        memory = f"{gpu.total_memory / 2**30:.0f} GiB, {arithmetic('cuda')}"
        return Finding(True, f"cuda: {count} x {gpu.name}, {memory}")
    text = f"cpu: {torch.get_num_threads()} threads, {arithmetic('cpu')}"
    if shutil.which("nvidia-smi"):
        return Finding(
            True,
            f"{text}; there is an NVIDIA driver, but PyTorch {torch.__version__} finds no GPU",
            "for the GPU install the PyTorch of its CUDA: https://pytorch.org/get-started/locally",
        )
    return Finding(True, text)


def rendering() -> Finding:
    """Try each backend in a process of its own, for MuJoCo chooses one when it is imported.

    Afterwards `MUJOCO_GL` is one that works, or "off", so that the checks after this one can import mujoco.
    """
    linux = sys.platform.startswith("linux")
    chosen = os.environ.get("MUJOCO_GL") or ("glfw" if linux else "")  # as MuJoCo chooses
    errors = _render_with([chosen, "egl", "osmesa", "glfw"] if linux else [chosen])
    works = [backend for backend, error in errors.items() if not error]
    others = " and ".join(backend for backend in works if backend != chosen)
    if chosen in works:
        return Finding(True, f"{chosen or 'the default'} is used{f'; {others} would do' if others else ''}")
    os.environ["MUJOCO_GL"] = works[0] if works else "off"
    if works:
        return Finding(False, f"{chosen} fails: {errors[chosen]}", f"export MUJOCO_GL={works[0]}")
    told = "; ".join(f"{backend or 'default'}: {error}" for backend, error in errors.items())
    return Finding(False, f"nothing renders: {told}", INSTALL_HINT)


def cameras(env: str, out: Path) -> Finding:
    """Draw what each camera of an environment sees."""
    if os.environ.get("MUJOCO_GL") == "off":
        return Finding(True, "not looked at, for nothing renders")
    import gymnasium as gym
    import mujoco
    from matplotlib.figure import Figure

    from vlm_reward.cameras import CameraRig, CameraSpec
    from vlm_reward.curves import save
    from vlm_reward.envs import make_env
    from vlm_reward.tasks import INSTRUCTIONS, unknown_task

    try:
        environment = make_env(env) if env in INSTRUCTIONS else gym.make(env)
    except gym.error.NameNotFound as error:
        raise ValueError(f"{error} {unknown_task(env)}") from error
    try:
        environment.reset(seed=0)
        model: Any = getattr(environment.unwrapped, "model", None)
        if not isinstance(model, mujoco.MjModel):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(f"{env} does not use MuJoCo")
        names = tuple(name for i in range(model.ncam) if (name := model.camera(i).name))
        if not names:
            raise ValueError(f"{env} has no camera with a name: add <camera name=...> to its XML")
        with CameraRig(environment, CameraSpec(names)) as rig:
            frames = rig.render()
    finally:
        environment.close()
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.7 * rows + 0.3), layout="constrained")
    figure.suptitle(env)
    for number, (name, frame) in enumerate(zip(names, frames, strict=True), 1):
        ax = figure.add_subplot(rows, columns, number, xticks=[], yticks=[], title=name)
        ax.imshow(frame)
    save(figure, out)
    return Finding(True, f"{env}: {', '.join(names)}; see {out}")


def models() -> Finding:
    """Whether the embedded models are there, and whole."""
    from safetensors import SafetensorError, safe_open

    from vlm_reward.encoder import ADAPTER_CONFIG, CHECKPOINTS
    from vlm_reward.reward_model import JUDGE, METADATA, REACH, members_of

    found = sorted(
        {file.parent for pattern in ("*config.json", REACH) for file in CHECKPOINTS.rglob(pattern)}
    )
    judges = {
        folder for folder in found if folder.name == JUDGE and (folder.parent / ADAPTER_CONFIG).exists()
    }
    several = {file.parent for file in CHECKPOINTS.rglob(METADATA) if members_of(file.parent)}
    names = [folder.relative_to(CHECKPOINTS).as_posix() for folder in sorted({*found, *several} - judges)]
    if not found:
        raise FileNotFoundError(f"no models in {CHECKPOINTS}")
    for folder in several:
        if missing := [name for name in members_of(folder) if not (CHECKPOINTS / name).is_dir()]:
            raise FileNotFoundError(f"{folder} asks {', '.join(missing)}, which is not in {CHECKPOINTS}")
    for folder in found:
        weights = list(folder.glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError(f"{folder} has no weights")
        for file in weights:
            try:
                with safe_open(file, "np"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or damaged ({error})") from error
    return Finding(True, f"{', '.join(names)} in {CHECKPOINTS}")


def tokenizer(model: str) -> Finding:
    """Whether sentences reach the model as they were written, and the same sentence gets the same score."""
    from vlm_reward.reward_model import RewardModel
    from vlm_reward.tasks import INSTRUCTIONS

    first, second = (RewardModel.from_pretrained(model) for _ in range(2))
    words, sentence = first.encoder.tokenizer, "open the green drawer"
    back = words.decode(words(sentence)["input_ids"], skip_special_tokens=True)
    if back != sentence:
        raise ValueError(f"{sentence!r} became {back!r}")
    ids = words(list(INSTRUCTIONS.values()))["input_ids"]
    unknown = [
        text for text, row in zip(INSTRUCTIONS.values(), ids, strict=True) if words.unk_token_id in row
    ]
    if unknown:
        raise ValueError(f"{model} does not know words of {len(unknown)} instructions: {unknown[0]!r}")
    views = len(first.camera_spec.cameras) if first.camera_spec else 1
    frames = np.random.default_rng(0).integers(0, 256, (1, views, 64, 64, 3), dtype=np.uint8)
    scores = [loaded.score(frames, sentence, start=frames) for loaded in (first, second)]
    difference = float(np.abs(scores[0] - scores[1]).max())
    if difference > 1e-5:
        raise ValueError(f"loaded twice, {model} gives one frame scores that differ by {difference:.2g}")
    return Finding(True, f"{model} reads all {len(ids)} instructions, and scores the same when loaded again")


def hub() -> Finding:
    """Whether models can be had from the Hugging Face Hub; nothing essential hangs on it."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return Finding(
            True,
            "HF_HUB_OFFLINE is set: embedded and downloaded models alone can be loaded",
            "unset HF_HUB_OFFLINE to download others",
        )
    answer: list[str] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code
            answer.append(f"it answers {status}" if status >= 400 else "")
        except Exception as error:  # of the HTTP client, of TLS, of the proxy
            answer.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(HUB_SECONDS + 1)
    error = answer[0] if answer else f"no answer in {HUB_SECONDS} s"
    if not error:
        return Finding(True, f"{constants.ENDPOINT} can be reached")
    return Finding(
        True,
        f"{constants.ENDPOINT} cannot be reached ({error}): embedded and downloaded models alone can be loaded",
        "behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT, to work without it HF_HUB_OFFLINE=1",
    )


def _render_with(backends: list[str]) -> dict[str, str]:
    """Backend -> why it does not render; empty where it does."""
    processes = {
        backend: subprocess.Popen(
            [sys.executable, "-c", _RENDER],
            env=os.environ | {"MUJOCO_GL": backend},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for backend in dict.fromkeys(backends)
    }
    errors = {}
    for backend, process in processes.items():
        try:
            said, _ = process.communicate(timeout=RENDER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors[backend] = f"no picture in {RENDER_SECONDS} s"
            continue
        failed = " ".join(said.split()) or f"it crashed with status {process.returncode}"
        errors[backend] = failed if process.returncode else ""
    return errors


def _version() -> str:
    return _installed("vlm-reward") or "(a checkout that is not installed)"


def _requirements() -> list[str]:
    """Of the installed package; empty in a checkout that is not installed."""
    try:
        return metadata.requires("vlm-reward") or []
    except metadata.PackageNotFoundError:
        return []


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
