import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_reward.preprocess import preprocess, resize

HALF: dict = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP: dict = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def reference(frames: np.ndarray, size: int, resample: str, mean, std) -> torch.Tensor:
    processor = SiglipImageProcessorPil(
        size={"height": size, "width": size},
        resample={"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resample],
        image_mean=mean,
        image_std=std,
    )
    return processor(list(frames), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("stats", [HALF, CLIP])
def test_equals_the_hugging_face_processor_at_native_size(stats):
    frames = noise(4, 224, 224, 3)
    pixels = preprocess(frames, size=224, **stats)
    assert pixels.shape == (4, 3, 224, 224)
    assert (pixels - reference(frames, 224, "bilinear", **stats)).abs().max() < 1e-6


def test_black_grey_and_white():
    frames = np.array([0, 51, 255], np.uint8)[:, None, None, None].repeat(3, -1)
    pixels = preprocess(frames, size=1, **HALF).flatten(1)
    torch.testing.assert_close(pixels[:, 0], torch.tensor([-1, -0.6, 1]), atol=5e-7, rtol=0)


@pytest.mark.parametrize("size", [112, 96])
def test_bilinear_resize_from_224_equals_the_processor(size):
    frames = noise(3, 224, 224, 3)
    difference = preprocess(frames, size=size, **HALF) - reference(frames, size, "bilinear", **HALF)
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 224), (200, 200, 224), (480, 640, 224)])
def test_other_resizes_are_within_2_levels_of_the_processor(height, width, size, resample):
    frames = noise(3, height, width, 3)
    pixels = preprocess(frames, size=size, resample=resample, **HALF)
    levels = (pixels - reference(frames, size, resample, **HALF)).abs() * 255 / 2
    assert levels.max() < 2.01
    assert (levels > 0.01).float().mean() < 0.03


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["bilinear", "bicubic"]))
def test_resized_frames_give_the_pixels_of_raw_ones(height, width, size, resample):
    frames = noise(2, height, width, 3)
    small = resize(frames, size, resample=resample)
    assert small.shape == (2, size, size, 3)
    assert small.dtype == np.uint8
    raw = preprocess(frames, size=size, resample=resample, **CLIP)
    assert torch.equal(raw, preprocess(small, size=size, resample=resample, **CLIP))


def test_leading_axes_are_kept_by_resize_and_flattened_by_preprocess():
    frames = noise(2, 3, 8, 8, 3)
    assert resize(frames, 4).shape == (2, 3, 4, 4, 3)
    np.testing.assert_array_equal(resize(frames, 4)[1, 2], resize(frames[1, 2], 4))
    pixels = preprocess(frames, size=8, **HALF)
    assert pixels.shape == (6, 3, 8, 8)
    assert torch.equal(pixels[5], preprocess(frames[1, 2], size=8, **HALF)[0])


def test_upright_views_and_read_only_maps_are_taken(tmp_path):
    stored = np.lib.format.open_memmap(tmp_path / "frames.npy", "w+", np.uint8, (2, 8, 8, 3))
    stored[:] = noise(2, 8, 8, 3)
    stored.flush()
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    flipped = mapped[:, ::-1, ::-1]  # negative strides
    for size in (8, 4):
        expected = preprocess(np.array(flipped), size=size, **HALF)
        assert torch.equal(preprocess(flipped, size=size, **HALF), expected)
        assert torch.equal(preprocess(torch.from_numpy(flipped.copy()), size=size, **HALF), expected)


def test_input_is_left_as_it_was():
    frames = noise(2, 8, 8, 3)
    before = frames.copy()
    preprocess(frames, size=8, **HALF)
    np.testing.assert_array_equal(frames, before)


def test_half_precision_is_rounded_float32():
    frames = noise(1, 8, 8, 3)
    pixels = preprocess(frames, size=8, dtype=torch.bfloat16, **CLIP)
    assert torch.equal(pixels, preprocess(frames, size=8, **CLIP).bfloat16())


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"uint8 \[..., H, W, 3\], got float32 \(2, 8, 8, 3\)"),
        (torch.zeros(2, 8, 8, 3), r"got float32 \(2, 8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got uint8 \(2, 3, 8, 8\)"),
        (np.zeros((8, 3), np.uint8), r"got uint8 \(8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"empty: got shape \(0, 8, 8, 3\)"),
    ],
)
def test_bad_frames_are_named(frames, message):
    with pytest.raises(ValueError, match=message):
        preprocess(frames, size=8, **HALF)


def test_bad_options_are_named():
    frames = noise(1, 8, 8, 3)
    with pytest.raises(ValueError, match="unknown resample 'lanczos'"):
        resize(frames, 4, resample="lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        resize(frames, 0)
    with pytest.raises(ValueError, match="std above 0"):
        preprocess(frames, size=8, mean=(0, 0, 0), std=(1, 1, 0))
