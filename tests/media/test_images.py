"""Images of every source, mode and orientation, and what is refused."""

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as DatasetsImage
from media_files import ORIENTATIONS, cut, number, picture, refused, refused_image, upright
from PIL import Image

from trl_vpo.media.load import VideoOptions, load_image, load_video


def pixel(source, x=0):
    return load_image(source).getpixel((x, 0))


def test_every_source_of_an_image_gives_the_same(tmp_path):
    pixels = picture(5)
    path = tmp_path / "five.png"
    Image.fromarray(pixels).save(path)
    for source in [path, str(path), path.as_uri(), path.read_bytes(), {"path": str(path), "bytes": None}, pixels]:
        image = load_image(source)
        assert image.mode == "RGB" and (np.asarray(image) == pixels).all()
    own = Image.fromarray(pixels)
    assert (np.asarray(load_image(own)) == pixels).all() and load_image(own) is not own
    assert load_image(path, max_pixels=800).size == (32, 24)
    assert load_image(path, max_pixels=10**6).size == (64, 48)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff"])
def test_an_image_is_shown_as_its_exif_says(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    kwargs = {"lossless": True} if name == "x.webp" else {"quality": 95, "subsampling": 0} if name == "x.jpg" else {}
    Image.fromarray(picture(9)).save(tmp_path / name, exif=exif, **kwargs)
    shown = np.asarray(load_image(tmp_path / name)).astype(int)
    want = upright(orientation, picture(9))
    assert shown.shape == want.shape and np.abs(shown - want).mean() < (12 if name == "x.jpg" else 0.001)
    assert orientation > 1 or number(shown) == 9


def test_modes_become_rgb_and_transparency_white(tmp_path):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert [pixel(clear, x) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert pixel(palette) == (255, 255, 255)
    big_endian = Image.frombytes("I;16B", (2, 1), b"\x80\x01\xff\xff")
    assert [pixel(big_endian, x)[0] for x in (0, 1)] == [128, 255]
    for mode, value, grey in (("L", 7, 7), ("LA", (40, 255), 40), ("LA", (40, 0), 255), ("1", 1, 255)):
        assert pixel(Image.new(mode, (1, 1), value)) == (grey, grey, grey)
    assert pixel(Image.new("RGBA", (1, 1), (0, 0, 0, 128)).convert("RGBa")) == (127, 127, 127)
    red = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    red.save(tmp_path / "red.jpg", quality=100)
    for source in (red, tmp_path / "red.jpg"):
        assert np.allclose(pixel(source), (255, 0, 0), atol=3)


GREYS = np.array([[0, 1], [128, 255]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.filterwarnings("ignore:Downcasting array dtype")
def test_greys_of_datasets_stay_what_they_are(dtype):
    """`datasets.Image` stores an array of integers as TIFF with 16 or 32 bits."""
    data = Dataset.from_dict({"image": [GREYS.astype(dtype)]}, features=Features(image=DatasetsImage()))
    stored = data.cast_column("image", DatasetsImage(decode=False))[0]["image"]
    for source in (data[0]["image"], stored):
        assert np.array_equal(np.asarray(load_image(source))[..., 0], GREYS)


@pytest.mark.parametrize("name, dtype", [("i.tif", np.int32), ("i16.tif", np.uint16), ("i16.png", np.uint16)])
def test_wide_greys_keep_their_upper_bits(tmp_path, name, dtype):
    upper = np.array([[0, 128], [1, 255]])
    for pixels, want in ((GREYS, GREYS), (GREYS * 257, GREYS), (np.array([[0, 0x8001], [300, 65535]]), upper)):
        Image.fromarray(pixels.astype(dtype)).save(tmp_path / name)
        assert (np.asarray(load_image(tmp_path / name))[..., 1] == want).all()


def test_images_that_are_none(tmp_path):
    (tmp_path / "text.png").write_text("no pixels here")
    refused_image(tmp_path / "text.png", "not a readable image.*a picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for name in ("whole.png", "whole.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        short = cut(tmp_path / name, tmp_path / f"short{name}", 0.5)
        assert refused_image(short, "not a readable image.*cut short").__cause__ is not None
        refused_image(short.read_bytes(), "not a readable image", name="<bytes,")
    for source in (np.zeros((4, 4, 3)), np.zeros((3, 8, 8), np.uint8), 7, None):
        refused_image(source, "is not an image: give a .*uint8 array", name="<")
    refused_image(Image.fromarray(np.zeros((2, 2), np.float32)), "save it with 8 bits", name="PIL image")
    for pixels, reach in ((70000, "0 to 70000"), (-1, "-1 to 0")):
        refused_image(Image.fromarray(np.array([[0, pixels]], np.int32)), f"greys reach from {reach}", name="PIL")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_wants_max_pixels(tmp_path, monkeypatch):
    """The limit is Pillow's own; this is what 169 million pixels are to it, in small."""
    path = tmp_path / "huge.png"
    Image.fromarray(picture(0, 130, 130)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8948)
    reason = r"has 130x130 pixels \(0 million\), more than 0 million: set max_pixels, which scales it down"
    refused_image(path, reason)
    refused_image(Image.fromarray(picture(0, 130, 130)), reason, name="PIL image 130x130")
    refused([str(path)], reason, name="huge.png")
    assert load_image(path, max_pixels=1600).size == (40, 40)
    assert load_video([str(path)], VideoOptions(max_pixels=1600)).frames.shape == (1, 40, 40, 3)
    assert load_image(path, limit=False).size == (130, 130)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused_image(path, "scale it down")  # a decompression bomb
