"""The `vlm-reward` command: what doctor finds, what score writes, and what both say when something is wrong."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import word_tokenizer
from PIL import Image

from vlm_reward import doctor, encoder, video
from vlm_reward.__main__ import MODEL, main
from vlm_reward._rendering import INSTALL_HINT
from vlm_reward.cameras import Crop
from vlm_reward.doctor import Finding
from vlm_reward.ensemble import Ensemble
from vlm_reward.reward_model import RewardModel

SENTENCE = "open the green drawer"


def run(*arguments: object) -> str | int | None:
    """What the command exits with: a status, or the message of an error."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


def test_the_help_loads_nothing_heavy():
    code = (
        "import sys, vlm_reward.__main__ as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert not {'torch', 'mujoco', 'av', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("doctor", "score", "demo"):
        assert f"• {command} " in said


# --- doctor


@pytest.fixture
def all_render(monkeypatch):
    """As if every backend but one called `broken` rendered, without trying."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    monkeypatch.setattr(
        doctor, "_render_with", lambda names: {name: "no such thing" * (name == "broken") for name in names}
    )


@pytest.fixture
def nothing_else(monkeypatch, all_render):
    """Without the checks that take long."""
    for name in ("models", "tokenizer", "device"):
        monkeypatch.setattr(doctor, name, lambda *_: Finding(True, "fine"))


def test_doctor_finds_a_healthy_machine(tmp_path, capsys, all_render):
    sheet = tmp_path / "new" / "cameras.png"
    assert run("doctor", "--out", sheet) == 0
    said = capsys.readouterr().out
    assert "BROKEN" not in said
    assert "judge/judge" not in said
    for fact in (
        "torch 2",
        "egl",
        "topview, corner",
        "siglip2-tiny/triplet",
        "siglip2-tiny-worlds/triplet+order+lesson+wrong+start+judge",
        "siglip2-tiny-ensemble",
        "all 50 instr",
        "HF_HUB_OFFLINE",
    ):
        assert fact in said
    picture = np.asarray(Image.open(sheet).convert("RGB"))
    assert picture.shape == (855, 1440, 3)  # seven cameras in two rows of four
    assert picture[:400].std() > 30
    assert (picture[480:, -300:] == 255).all()  # there is no eighth


def test_backends_are_tried_in_processes_of_their_own(monkeypatch):
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    works = os.environ["MUJOCO_GL"]
    errors = doctor._render_with([works, "nonsense"])
    assert errors[works] == ""
    assert "invalid value for environment variable MUJOCO_GL: nonsense" in errors["nonsense"]


def test_doctor_replaces_a_broken_backend(tmp_path, capsys, monkeypatch, nothing_else):
    monkeypatch.setenv("MUJOCO_GL", "broken")
    monkeypatch.setattr(doctor, "cameras", lambda *_: Finding(True, os.environ["MUJOCO_GL"]))
    assert run("doctor", "--out", tmp_path / "sheet.png") == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("BROKEN"))
    assert "broken fails: no such thing" in lines[at]
    assert lines[at + 1].strip() == "-> export MUJOCO_GL=egl"
    assert lines[at + 2].split() == ["ok", "cameras", "egl"]  # the rest is looked at all the same
    assert "1 broken" in lines[-1]


def test_doctor_where_nothing_renders(tmp_path, capsys, monkeypatch, nothing_else):
    monkeypatch.setattr(doctor, "_render_with", lambda names: dict.fromkeys(names, "no display"))
    assert run("doctor", "--out", tmp_path / "sheet.png") == 1
    said = capsys.readouterr().out
    assert "egl: no display" in said
    assert INSTALL_HINT in said
    assert "not looked at, for nothing renders" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("no-such-robot-v3", "Environment `no-such-robot` doesn't exist"),
        ("drawer-opn-v3", "did you mean drawer-open-v3"),
        ("CartPole-v1", "CartPole-v1 does not use MuJoCo"),
        ("InvertedPendulum-v5", "InvertedPendulum-v5 has no camera with a name"),
    ],
)
def test_doctor_on_an_environment_without_cameras(tmp_path, capsys, nothing_else, env, message):
    assert run("doctor", "--env", env, "--out", tmp_path / "sheet.png") == 1
    said = capsys.readouterr().out
    assert message in said
    assert "-> give an environment that uses MuJoCo as --env" in said
    assert not list(tmp_path.iterdir())


def test_doctor_on_any_gymnasium_environment(tmp_path, nothing_else):
    assert doctor.cameras("Ant-v5", tmp_path / "sheet.png").text.startswith("Ant-v5: track; ")


def test_doctor_knows_the_versions_that_are_needed(monkeypatch):
    wanted = ["numpy>=99", "torch>=2", "no-such-package>=1", "unused; extra == 'dev'"]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    finding = doctor.packages()
    assert not finding.ok
    assert f"numpy {np.__version__} does not fit >=99; no-such-package is missing" == finding.text
    assert finding.mend == 'pip install "numpy>=99" "no-such-package>=1"'


def test_doctor_names_a_damaged_model(tmp_path, monkeypatch, tiny_backbone_dir):
    shutil.copytree(tiny_backbone_dir, tmp_path / "tiny")
    monkeypatch.setattr(encoder, "CHECKPOINTS", tmp_path)
    assert doctor.models().text.startswith("tiny")
    (tmp_path / "both").mkdir()
    facts = {"format_version": 6, "members": {"tiny": 0.5, "gone": 0.5}}
    (tmp_path / "both" / "vlm_reward.json").write_text(json.dumps(facts))
    with pytest.raises(FileNotFoundError, match="both asks gone, which is not in"):
        doctor.models()
    (tmp_path / "both" / "vlm_reward.json").unlink()
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tiny/model\.safetensors is truncated or damaged"):
        doctor.models()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="tiny has no weights"):
        doctor.models()


def test_doctor_finds_a_tokenizer_that_loses_words(tmp_path, tiny_adapter_dir, tiny_backbone_dir):
    assert doctor.tokenizer(str(tiny_adapter_dir)).text.startswith(f"{tiny_adapter_dir} reads all 50 instr")
    shutil.copytree(tiny_backbone_dir, tmp_path / "tiny")
    word_tokenizer([SENTENCE], max_length=24).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="does not know words of 49 instructions: 'pick up a nut"):
        doctor.tokenizer(str(tmp_path / "tiny"))
    word_tokenizer(["a drawer"], max_length=24).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="'open the green drawer' became"):
        doctor.tokenizer(str(tmp_path / "tiny"))


def test_doctor_does_not_wait_for_the_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: time.sleep(3))
    monkeypatch.setattr(doctor, "HUB_SECONDS", -0.8)
    began = time.perf_counter()
    finding = doctor.hub()
    assert time.perf_counter() - began < 1
    assert finding.ok
    assert "cannot be reached (no answer" in finding.text
    assert "HTTPS_PROXY" in finding.mend


def test_doctor_says_why_the_hub_cannot_be_reached(monkeypatch):
    import huggingface_hub

    class Session:
        def head(self, address: str, timeout: float):
            raise OSError(f"no route to {address}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    finding = doctor.hub()
    assert finding.ok
    assert "(no route to https://huggingface.co)" in finding.text


# --- score


def pictures(n: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [n, height, width, 3]: a square crosses a gradient."""
    frames = np.zeros((n, height, width, 3), np.uint8)
    frames[..., 1] = np.linspace(0, 255, width).astype(np.uint8)
    for i in range(n):
        x = round(i / max(n - 1, 1) * (width - 16))
        frames[i, 16:32, x : x + 16] = (250, 40, 40)
    return frames


def write_video(path: Path, frames: np.ndarray, *, rotation: int = 0, movflags: str = "") -> Path:
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("h264", rate=10, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path


def write_images(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir()
    for i, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / f"frame-{i}.png")
    return folder


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def table(path: Path) -> tuple[list[str], np.ndarray]:
    rows = list(csv.reader(path.read_text().splitlines()))
    return rows[0], np.array([[float(cell or "nan") for cell in row] for row in rows[1:]])


def test_score_of_a_video(tiny_adapter_dir, tmp_path, capsys):
    frames = pictures(25)
    path = write_video(tmp_path / "robot.mp4", frames)
    assert run("score", path, SENTENCE, "--model", tiny_adapter_dir, "--out", tmp_path / "out") == 0
    head, rows = table(tmp_path / "out" / "robot.csv")
    assert head == ["frame", "time", "score"]
    assert rows[:, 0].tolist() == list(range(25))
    assert rows[:, 1] == pytest.approx(np.arange(25) / 10)
    model = RewardModel.from_pretrained(tiny_adapter_dir)
    both = np.stack([frames, frames], axis=1)  # the model was trained with two cameras
    assert np.abs(rows[:, 2] - model.score(both, SENTENCE)[:, 0]).max() < 0.02  # h264 is lossy
    picture = np.asarray(Image.open(tmp_path / "out" / "robot.png").convert("RGB"))
    red = (np.abs(picture.astype(int) - (250, 40, 40)).max(axis=-1) < 20).any(axis=0)
    assert np.count_nonzero(np.diff(red.astype(int)) == 1) == 6  # six thumbnails, a square in each
    said = capsys.readouterr().out
    assert f'scores 25 frames of {path} with "{SENTENCE}"' in said
    assert "VOC" in said
    assert "this model has seen the cameras corner, corner3 alone" in said
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["robot.csv", "robot.png"]


def test_a_video_is_scored_against_its_first_frame(tiny_backbone_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_reward.video.CHUNK", 7)
    model = RewardModel.from_pretrained(tiny_backbone_dir).with_start_weight(0.5)
    model.save_pretrained(tmp_path / "started")
    frames = pictures(25)
    for number, frame in enumerate(frames):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / "images" / f"{number}.png")
    run("score", tmp_path / "images", SENTENCE, "--model", tmp_path / "started", "--out", tmp_path / "out")
    _, rows = table(tmp_path / "out" / "images.csv")
    expected = model.score(frames[:, None], SENTENCE, start=frames[0][None])[:, 0]
    assert np.abs(rows[:, 2] - expected).max() < 1e-3


def test_score_of_images_in_the_order_of_their_numbers(tiny_adapter_dir, tmp_path):
    frames = pictures(12)
    folder = write_images(tmp_path / "run", frames)
    (folder / "notes.txt").write_text("not an image")
    video.score([folder], SENTENCE, model=str(tiny_adapter_dir), out=tmp_path, every=5)
    _, rows = table(tmp_path / "run.csv")
    assert rows[:, 0].tolist() == [0, 5, 10]
    assert np.isnan(rows[:, 1]).all()
    model = RewardModel.from_pretrained(tiny_adapter_dir)
    expected = model.score(np.stack([frames[::5]] * 2, axis=1), SENTENCE)[:, 0]
    assert rows[:, 2] == pytest.approx(expected, abs=2e-6)


def test_score_of_several_views_is_their_mean(tiny_adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "CHUNK", 4)
    frames = pictures(10)
    folders = [
        write_images(tmp_path / "a", frames),
        write_images(tmp_path / "b", frames[::-1, :40, :40]),
        write_images(tmp_path / "c", frames[:, ::-1]),
    ]
    common = ["--model", tiny_adapter_dir, "--out", tmp_path]
    assert run("score", folders[0], SENTENCE, *common, "--views", *folders[1:]) == 0
    head, rows = table(tmp_path / "a.csv")
    assert head == ["frame", "time", "score", "score_1", "score_2", "score_3"]
    assert rows[:, 2] == pytest.approx(rows[:, 3:].mean(1), abs=2e-6)
    for view, folder in enumerate(folders, 3):
        video.score([folder], SENTENCE, model=str(tiny_adapter_dir), out=tmp_path)
        assert rows[:, view] == pytest.approx(table(tmp_path / f"{folder.name}.csv")[1][:, 2], abs=2e-6)


@pytest.mark.parametrize("together", [False, True])
def test_a_model_of_parts_of_images_takes_a_view_of_each_of_its_cameras(tiny_adapter_dir, tmp_path, together):
    loaded = RewardModel.from_pretrained(tiny_adapter_dir)
    crops = {"corner": Crop(0.0, 0.5, 0.5), "corner3": Crop(0.25, 0.25, 0.5)}
    model = RewardModel(loaded.encoder, camera_spec=loaded.camera_spec, crops=crops)
    model.save_pretrained(tmp_path / "parts")
    if together:
        names = str(tiny_adapter_dir), str(tmp_path / "parts")
        model = Ensemble([loaded, model], [1.0, 1.0], names=names)
        model.save_pretrained(tmp_path / "both")
    frames = pictures(6)
    folders = [write_images(tmp_path / "a", frames), write_images(tmp_path / "b", frames[::-1])]
    common = {"model": str(tmp_path / ("both" if together else "parts")), "out": tmp_path}
    video.score(folders, SENTENCE, **common)
    _, rows = table(tmp_path / "a.csv")
    seen = model.look(np.stack([frames, frames[::-1]], axis=1))
    expected = model.with_small_frames().score(seen, SENTENCE)
    assert rows[:, 3:] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(
        ValueError, match=r"give one view of each of corner, corner3, in this order \(--views has"
    ):
        video.score(folders[:1], SENTENCE, **common)


def test_a_video_is_turned_as_it_was_filmed(tmp_path):
    frame = np.zeros((1, 32, 64, 3), np.uint8)
    frame[:, :16, :32] = 255
    (_, turned), *_ = video.open_clip(write_video(tmp_path / "a.mp4", frame, rotation=90)).frames()
    assert turned.shape == (64, 32, 3)
    assert turned[40:, :12].min() > 200  # from the upper left to the lower left
    assert turned[:24].max() < 50


def test_memory_does_not_grow_with_the_video(tiny_backbone_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "CHUNK", 8)
    monkeypatch.setattr(video, "frames_over_curves", lambda *_, **__: None)

    class Clip(video.Clip):
        def frames(self):
            for i in range(self.length or 0):
                yield i / 10, np.full((160, 160, 3), i % 256, np.uint8)

    def peak(n: int) -> int:
        monkeypatch.setattr(video, "open_clip", lambda path: Clip(path, n))
        tracemalloc.start()
        video.score([Path("long.mp4")], SENTENCE, model=str(tiny_backbone_dir), out=tmp_path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # what is imported at the first time
    short, long = peak(40), peak(240)
    assert long - short < 3e5  # 200 frames are 15 MB, and 0.6 MB at the size of the model


def test_a_strip_is_even_whatever_the_length():
    for n in (1, 5, 6, 13, 100, 1001):
        strip = video.Strip()
        for i in range(n):
            strip.add(i, np.full((400, 800, 3), i % 256, np.uint8))
            assert len(strip._kept) <= 2 * video.STRIP
        frames, steps = strip.frames()
        assert frames.shape == (min(n, 6), 160, 320, 3)
        assert (steps[0], steps[-1]) == (0, n - 1)
        assert [frame[0, 0, 0] for frame in frames] == [step % 256 for step in steps]
        gaps = np.diff(steps)
        assert len(gaps) == 0 or gaps.max() <= 2 * n / 6 + 1


def make_bad(kind: str, folder: Path) -> list[object]:
    """The arguments of `score` with something wrong, and the word that the message must have."""
    video_file = folder / "robot.mp4"
    if kind == "missing":
        return [video_file]
    if kind == "cut off":
        write_video(video_file, pictures(20))
        video_file.write_bytes(video_file.read_bytes()[:-500])
    if kind == "cut off, index first":
        write_video(video_file, pictures(20), movflags="faststart")
        video_file.write_bytes(video_file.read_bytes()[:-500])
    if kind == "text":
        video_file.write_text("no video")
    if kind == "empty":
        video_file.touch()
    if kind == "sound":
        write_sound(video_file)
    if kind == "views of different lengths":
        other = write_video(folder / "other.mp4", pictures(19))
        return [write_video(video_file, pictures(20)), SENTENCE, "--views", other]
    if video_file.exists():
        return [video_file]
    images = write_images(folder / "run", pictures(3))
    if kind == "no images":
        for file in images.iterdir():
            file.unlink()
    if kind == "an image that is none":
        (images / "frame-2.png").write_text("no image")
    if kind == "an image cut off":
        (images / "frame-2.png").write_bytes((images / "frame-2.png").read_bytes()[:100])
    if kind == "sizes":
        Image.fromarray(pictures(1, 32, 32)[0]).save(images / "frame-3.png")
    if kind == "16 bits":
        Image.fromarray(np.zeros((48, 64), np.uint16)).save(images / "frame-1.png")
    if kind == "every":
        return [images, SENTENCE, "--every", "0"]
    return [images]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "robot.mp4: there is no such file or folder"),
        ("cut off", "robot.mp4 is no video, or a truncated one"),
        ("cut off, index first", "robot.mp4 is truncated: it has"),
        ("text", "robot.mp4 is no video, or a truncated one"),
        ("empty", "robot.mp4 is no video, or a truncated one"),
        ("sound", "robot.mp4 has no video stream"),
        ("views of different lengths", "other.mp4 has 19"),
        ("no images", "run has no images"),
        ("an image that is none", "frame-2.png is no image, or a damaged one"),
        ("sizes", "frame-3.png has 32 x 32 pixels, frame-1.png has 64 x 48"),
        ("16 bits", "frame-1.png has more than 8 bits a channel"),
        ("every", "every must be at least 1, got 0"),
    ],
)
def test_a_bad_video_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(video, "RewardModel", None)
    arguments = make_bad(kind, tmp_path)
    if len(arguments) == 1:
        arguments.append(SENTENCE)
    said = str(run("score", *arguments, "--out", tmp_path / "out"))
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_image_whose_end_is_missing_leaves_no_table(tiny_backbone_dir, tmp_path):
    (images,) = make_bad("an image cut off", tmp_path)
    said = str(run("score", images, SENTENCE, "--model", tiny_backbone_dir, "--out", tmp_path / "out"))
    assert "frame-2.png is no image, or a damaged one" in said
    assert not list((tmp_path / "out").iterdir())


def test_a_view_that_ends_early_leaves_no_table(tiny_backbone_dir, tmp_path, monkeypatch):
    long, short = (write_images(tmp_path / name, pictures(n)) for name, n in (("long", 5), ("short", 3)))
    before = video.open_clip
    monkeypatch.setattr(
        video,
        "open_clip",
        lambda path: video.Clip(path, None, before(path).images),  # lengths unknown
    )
    with pytest.raises(ValueError, match=r"short ends after 3 frames, another view goes on"):
        video.score([long, short], SENTENCE, model=str(tiny_backbone_dir), out=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("sentence", "message"), [("  ", "the sentence is empty"), ("open " * 30, "at most 24 tokens, got 31")]
)
def test_a_bad_sentence_is_refused_before_decoding(
    tiny_backbone_dir, tmp_path, monkeypatch, sentence, message
):
    path = write_video(tmp_path / "robot.mp4", pictures(3))
    monkeypatch.setattr(video, "_decode", None)
    said = str(run("score", path, sentence, "--model", tiny_backbone_dir, "--out", tmp_path / "out"))
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_an_error_in_one_line(tmp_path):
    path = write_video(tmp_path / "robot.mp4", pictures(3))
    said = str(run("score", path, SENTENCE, "--model", "no-such-model"))
    assert said.startswith("error: no model 'no-such-model'")


def test_the_default_model_is_embedded():
    assert (encoder.CHECKPOINTS / MODEL / "adapter_config.json").is_file()
