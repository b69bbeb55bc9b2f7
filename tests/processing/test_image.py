"""Pixels and patches equal to the torch library's Pillow processors."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from lvlm_jax.processing import naflex
from lvlm_jax.processing.augment import augment
from lvlm_jax.processing.image import FILTERS, ImageError, ImageSpec, preprocess, to_patches

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = ImageSpec(size=56, patch=14, mean=CLIP_MEAN, std=CLIP_STD)
SIGLIP = ImageSpec(size=48, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
SIZES = [(56, 56), (57, 111), (640, 479), (33, 200), (1, 1), (300, 7), (61, 60), (1000, 333), (1, 100)]


def picture(width, height):
    return PIL.Image.fromarray(np.random.default_rng(width * 7 + height).integers(0, 256, (height, width, 3), np.uint8))


def reference(spec, kind, image):
    import transformers.models.clip.image_processing_pil_clip as clip
    import transformers.models.llava.image_processing_pil_llava as llava
    import transformers.models.siglip.image_processing_pil_siglip as siglip

    made = {
        "crop": clip.CLIPImageProcessorPil,
        "pad": llava.LlavaImageProcessorPil,
        "squash": siglip.SiglipImageProcessorPil,
    }
    config = {k: v for k, v in spec.to_hf().items() if k != "image_processor_type"}
    return made[kind](**config)(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_pixels_equal_the_library(fit, size):
    spec = dataclasses.replace(CLIP, fit=fit)
    np.testing.assert_array_equal(preprocess(picture(*size), spec), reference(spec, fit, picture(*size)))


@pytest.mark.parametrize("resample", FILTERS)
def test_every_filter_equals_the_library(resample):
    spec = dataclasses.replace(SIGLIP, resample=resample)
    np.testing.assert_array_equal(preprocess(picture(91, 130), spec), reference(spec, "squash", picture(91, 130)))


NAFLEX = dataclasses.replace(SIGLIP, fit="naflex", max_patches=20)


@pytest.mark.parametrize("size", [*SIZES, (1, 3000), (17, 15), (4000, 3001)])
@pytest.mark.parametrize("most", [1, 20, 256])
def test_pictures_of_their_own_shape_equal_the_library(most, size):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    spec = dataclasses.replace(NAFLEX, resample="bilinear", max_patches=most)
    config = {k: v for k, v in spec.to_hf().items() if k != "image_processor_type"}
    theirs = Siglip2ImageProcessorPil(**config)(picture(*size), return_tensors="np")
    patches, positions = to_patches(picture(*size), spec)
    rows, cols = theirs["spatial_shapes"][0]
    assert len(patches) == rows * cols == theirs["pixel_attention_mask"].sum() <= most
    np.testing.assert_array_equal(patches, theirs["pixel_values"][0][: len(patches)])
    np.testing.assert_array_equal(positions[:, 0] * cols + positions[:, 1], np.arange(rows * cols))
    assert naflex.fitted(*size, spec.patch, most) == (rows, cols)


def test_naflex_goes_out_and_comes_back():
    spec = dataclasses.replace(SIGLIP, size=256, fit="naflex", max_patches=256, resample="bilinear")
    assert ImageSpec.from_hf(spec.to_hf(), 16) == spec
    assert spec.patches == 256
    # The released file says no more than this.
    released = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16}
    assert ImageSpec.from_hf(released, 14) == spec


@pytest.mark.parametrize(("fit", "most"), [("naflex", None), ("crop", 256)])
def test_most_patches_belong_to_naflex(fit, most):
    with pytest.raises(ValueError, match=f"fit '{fit}' with max_patches {most}: 'naflex' and 'native' need"):
        dataclasses.replace(SIGLIP, fit=fit, max_patches=most)


def test_crop_of_a_larger_picture_equals_the_library():
    spec = dataclasses.replace(CLIP, shortest=65)
    np.testing.assert_array_equal(preprocess(picture(120, 90), spec), reference(spec, "crop", picture(120, 90)))


def test_pad_is_the_original_llava_code():
    """Paste on the truncated mean colour, then resize."""
    image = picture(50, 90)
    square = PIL.Image.new("RGB", (90, 90), (122, 116, 104))
    square.paste(image, (20, 0))
    spec = dataclasses.replace(CLIP, fit="pad")
    np.testing.assert_array_equal(preprocess(image, spec), reference(CLIP, "crop", square))


def test_patches_are_row_column_channel():
    image = picture(64, 80)
    patches, positions = to_patches(image, CLIP)
    assert patches.shape == (CLIP.patches, CLIP.values) == (16, 588)
    assert patches.dtype == np.float32
    assert positions.dtype == np.int32
    pixels = preprocess(image, CLIP)
    for patch, (row, column) in zip(patches, positions, strict=True):
        expected = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        np.testing.assert_array_equal(patch.reshape(14, 14, 3), expected)
    assert positions.tolist()[:5] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


def test_patches_times_a_kernel_equal_a_convolution():
    spec = dataclasses.replace(SIGLIP, size=50)  # two rows and columns fall off, as with stride and no padding
    kernel = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)
    pixels = preprocess(picture(70, 70), spec).transpose(2, 0, 1)
    expected = jax.lax.conv(pixels[None], kernel, (16, 16), "VALID")[0].reshape(8, -1)
    patches, _ = to_patches(picture(70, 70), spec)
    ours = patches @ kernel.transpose(2, 3, 1, 0).reshape(-1, 8)
    np.testing.assert_allclose(ours, np.asarray(expected).T, atol=2e-4)


RELEASED = {
    "clip": (
        {
            "crop_size": 224,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "resample": 3,
            "size": 224,
        },
        14,
        ImageSpec(size=224, patch=14, mean=CLIP_MEAN, std=CLIP_STD),
    ),
    "llava-1.5": (
        {
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(CLIP_MEAN),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(CLIP_STD),
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 336},
        },
        14,
        ImageSpec(size=336, patch=14, mean=CLIP_MEAN, std=CLIP_STD),
    ),
    "siglip": (
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        14,
        ImageSpec(size=384, patch=14, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash"),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_read(name):
    config, patch, spec = RELEASED[name]
    assert ImageSpec.from_hf(config, patch) == spec


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_config_round_trip(fit):
    spec = ImageSpec(
        size=64, patch=8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), fit=fit, resample="bilinear", rescale=1 / 127
    )
    assert ImageSpec.from_hf(spec.to_hf(), 8) == spec


def test_config_round_trip_with_a_larger_resize():
    spec = dataclasses.replace(CLIP, shortest=64)
    assert ImageSpec.from_hf(spec.to_hf(), 14) == spec


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_written_config_loads_in_the_library(fit, tmp_path):
    import json

    # From its own module: the package's name for it asks for torchvision in 5.15, whatever the backend.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    spec = dataclasses.replace(CLIP, fit=fit)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(spec.to_hf()))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor(picture(90, 61), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(preprocess(picture(90, 61), spec), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"size": {"min_pixels": 56, "max_pixels": 99}},
            r"size \{.*\} is not one side of a square; only processors with",
        ),
        ({"size": {"height": 10, "width": 20}}, r"size .* is not one side of a square"),
        ({"resample": 17}, r"resample 17 is none of Pillow's \[0, 1, 2, 3, 4, 5\]"),
        ({"image_mean": None}, r"image_mean is missing, so pixels cannot be normalised as trained"),
        ({"image_mean": [0.5]}, r"image_mean and image_std have three values"),
        ({"do_resize": False}, r"do_resize is false, but every picture must come to one size"),
    ],
)
def test_bad_config(change, message):
    config = {k: v for k, v in (RELEASED["siglip"][0] | change).items() if v is not None}
    with pytest.raises(ValueError, match="preprocessor_config.json: " + message):
        ImageSpec.from_hf(config, 14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 99}, "patch 99 does not fit size 56"),
        ({"resample": "cubic"}, "resample 'cubic' is unknown; choose one of nearest, lanczos"),
        ({"std": (0.0, 1.0, 1.0)}, "three numbers each, std above 0"),
        ({"shortest": 50}, "shortest 50 is below size 56"),
    ],
)
def test_bad_spec(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_picture_too_narrow_for_its_fit_is_refused(fit):
    spec = dataclasses.replace(CLIP, fit=fit, max_pixels=100_000)
    with pytest.raises(ImageError, match=f"so narrow that fit='{fit}' would make it .* use fit='squash'"):
        preprocess(picture(1, 3000), spec)
    assert preprocess(picture(1, 3000), dataclasses.replace(spec, fit="squash")).shape == (56, 56, 3)


def test_augment_flips_and_shifts():
    image = picture(20, 12)
    pixels = np.asarray(image)
    seen = set()
    for seed in range(40):
        out = np.asarray(augment(image, np.random.default_rng(seed), flip=True, shift=2))
        matches = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if np.array_equal(
                out[2:-2, 2:-2], np.roll(pixels[:, ::-1] if flip else pixels, (dy, dx), (0, 1))[2:-2, 2:-2]
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {flip for flip, _, _ in seen} == {True, False}
    assert {dx for _, _, dx in seen} == {dy for _, dy, _ in seen} == {-2, -1, 0, 1, 2}


def test_augment_repeats_the_edge_and_repeats_itself():
    image = picture(20, 12)
    out = np.asarray(augment(image, np.random.default_rng(3), flip=False, shift=5))
    assert out.shape == (12, 20, 3)
    assert not np.array_equal(out, np.asarray(image))
    assert np.array_equal(out, np.asarray(augment(image, np.random.default_rng(3), flip=False, shift=5)))
    assert np.array_equal(np.asarray(augment(image, np.random.default_rng(3), flip=False)), np.asarray(image))


def test_augment_resizes_and_turns_about_the_centre():
    square = np.full((41, 41, 3), 255, np.uint8)
    square[15:26, 15:26] = 0  # 11 x 11 black in the middle
    image = PIL.Image.fromarray(square)
    assert np.array_equal(np.asarray(augment(image, np.random.default_rng(0), flip=False)), square)
    heights, corners = set(), 0
    for seed in range(20):
        out = np.asarray(augment(image, np.random.default_rng(seed), flip=False, zoom=0.3))[..., 0] < 128
        rows, cols = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
        assert out[20, cols[0] : cols[-1] + 1].all()  # still a box, about the same centre, its corners softened
        assert out[rows[0] : rows[-1] + 1, 20].all()
        assert rows[0] + rows[-1] == cols[0] + cols[-1] == 40
        assert {len(rows), len(cols)} <= {7, 9, 11, 13, 15}
        heights |= {len(rows) - len(cols)}
        turned = np.asarray(augment(image, np.random.default_rng(seed), flip=False, rotate=45.0))[..., 0] < 128
        assert np.array_equal(turned, turned[::-1, ::-1])
        assert abs(int(turned.sum()) - 121) <= 8  # the area stays
        corners += not np.array_equal(turned, square[..., 0] < 128)
    assert len(heights) > 1, "both sides have a scale of their own"
    assert corners > 15


def test_augment_recolours_within_its_bounds():
    image = PIL.Image.fromarray(np.full((8, 8, 3), (100, 100, 100), np.uint8))
    seen = np.array(
        [np.asarray(augment(image, np.random.default_rng(s), flip=False, colour=0.2))[0, 0] for s in range(200)]
    )
    assert seen.min() >= 100 * 0.8 * 0.8 - 1
    assert seen.max() <= 100 * 1.2 * 1.2 + 1
    assert seen.min() < 75
    assert seen.max() > 130
    assert len({tuple(c) for c in seen}) > 100, "each channel has a gain of its own"
    striped = np.zeros((2, 8, 3), np.uint8)
    striped[:, ::2] = 200
    out = np.asarray(augment(PIL.Image.fromarray(striped), np.random.default_rng(1), flip=False, colour=0.5))
    assert not np.array_equal(out, striped)
    assert out.shape == striped.shape
    assert out.dtype == np.uint8


def test_augment_shows_a_part():
    """Where it is and how large: the pixels say their own place."""
    y, x = np.mgrid[:60, :80].astype(np.uint8)
    image = PIL.Image.fromarray(np.stack([y, x, x], axis=-1))
    shares, shapes, corners = [], [], set()
    for seed in range(200):
        out = np.asarray(augment(image, np.random.default_rng(seed), flip=False, crop=0.5))
        height, width = out.shape[:2]
        top, left = int(out[0, 0, 0]), int(out[0, 0, 1])
        np.testing.assert_array_equal(out, np.asarray(image)[top : top + height, left : left + width])
        shares.append(height * width / 4800)
        shapes.append(width / height)
        corners.add((top > 0, top + height < 60, left > 0, left + width < 80))
    assert 0.48 < min(shares) < 0.55
    assert 0.9 < max(shares) <= 1
    assert 0.72 < min(shapes) < 0.9
    assert 1.25 < max(shapes) < 1.36
    assert {(True, True, True, True), (False, False, False, False)} & corners
