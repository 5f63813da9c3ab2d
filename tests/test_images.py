"""Images of every usual form against PIL, numpy and values known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smope.images import ImageError, load_image, load_images

RGB = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def test_every_source_of_one_picture_gives_the_same_tensor(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    expected = torch.from_numpy(RGB).permute(2, 0, 1)
    for source in (path, str(path), Image.open(path), RGB, expected, expected.float() / 255):
        loaded = load_image(source)
        assert loaded.dtype == torch.uint8
        assert loaded.is_contiguous()
        assert torch.equal(loaded, expected)


def test_the_result_does_not_share_the_users_memory():
    image = RGB.copy()
    loaded = load_image(image)
    image[:] = 0
    assert loaded.sum() > 0


def test_a_tensor_is_copied_where_it_must_be_and_once():
    image = torch.from_numpy(RGB).permute(2, 0, 1).contiguous()
    assert load_image(image).data_ptr() != image.data_ptr()
    assert load_image(image, copy=False).data_ptr() == image.data_ptr()
    assert load_image(image[:, ::2], copy=False).is_contiguous()


def test_sixteen_bit_grey_is_scaled(tmp_path):
    deep = np.array([[0, 257], [32896, 65535]], np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(deep).save(path)
    for source in (path, deep):
        assert load_image(source).tolist() == [[[0, 1], [128, 255]]] * 3


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rows run right to left down the picture
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(
        load_image(tmp_path / "a.png"), torch.from_numpy(np.rot90(RGB, -1).copy()).permute(2, 0, 1)
    )


def test_transparency_lies_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 255, 51)  # 51 = a fifth of black on white = 204
    for source in (rgba, Image.fromarray(rgba)):
        assert load_image(source)[0].tolist() == [[255, 0, 204]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "RGB"])
def test_modes_come_out_as_pil_shows_them(mode):
    picture = Image.fromarray(RGB).convert(mode)
    assert torch.equal(
        load_image(picture), torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    )


def test_one_pixel_is_an_image():
    assert load_image(np.full((1, 1), 7, np.uint8)).tolist() == [[[7]], [[7]], [[7]]]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.png", "no image file"),
        (torch.full((3, 2, 2), float("nan")), "12 pixel values are NaN"),
        (torch.full((3, 2, 2), 200.0), "divide by 255"),
        (torch.full((3, 2, 2), -2.1), "normalisation"),
        (torch.zeros(2, 2, 3), "permute"),
        (torch.zeros(1, 3, 2, 2), "list of images"),
        (torch.zeros(3, 0, 2), "empty"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "int64"),
        (np.zeros((2, 2, 3)), "float64"),
        (np.zeros((3, 2, 2), np.uint8), "as a tensor"),
        (np.zeros((0, 2, 3), np.uint8), "empty"),
        (7, "int given"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(source, says):
    with pytest.raises(ImageError, match=says):
        load_image(source)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_truncated_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(path)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_give_an_image_or_the_named_error(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        load_image(path)


def test_in_a_list_the_bad_picture_is_named():
    assert [tuple(picture.shape) for picture in load_images([RGB, RGB[:2]])] == [(3, 4, 5), (3, 2, 5)]
    with pytest.raises(ImageError, match=r"^image 2 of 3: no image file 'missing\.png'$"):
        load_images([RGB, "missing.png", RGB])
