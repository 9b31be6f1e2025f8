"""Pictures of any size and format as bytes of one size."""

import io
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hwnas.data import pictures
from hwnas.data.pictures import CHUNK, check_memory, decoded, fit, resized
from quant.errors import InvalidInput

LANCZOS = Image.Resampling.LANCZOS


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- the size


@pytest.mark.parametrize(("width", "height"), [(9, 9), (9, 14), (15, 9), (9, 200)])
def test_a_picture_whose_shorter_side_fits_is_cropped_and_keeps_its_pixels(
    width: int, height: int
) -> None:
    image = noise(width, height)
    left, top = (width - 9) // 2, (height - 9) // 2
    expected = np.asarray(image)[top : top + 9, left : left + 9]
    np.testing.assert_array_equal(np.asarray(fit(image, 9)), expected)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(96, 64, 32), (64, 96, 32), (48, 48, 16), (8, 12, 16), (50, 20, 4)],
)
def test_a_picture_is_resized_by_its_shorter_side_and_then_cropped(
    width: int, height: int, size: int
) -> None:
    """Pillow in two steps is the other implementation, where the longer side comes out whole."""
    image, scale = noise(width, height), size / min(width, height)
    large = image.resize((round(width * scale), round(height * scale)), LANCZOS)
    left, top = (large.width - size) // 2, (large.height - size) // 2
    expected = large.crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(np.asarray(fit(image, size)), np.asarray(expected))


def lanczos(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of Lanczos' filter with three lobes, widened where it shrinks."""
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    distance = (np.arange(old) + 0.5 - centres[:, None]) / stretch
    weights = np.where(abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), [(20, 7), (12, 30), (16, 8)])
def test_resizing_is_lanczos_filter_by_its_formula(old: int, new: int) -> None:
    """Each of the two passes rounds to a byte: one step apart, and half a step of the second."""
    x = np.random.default_rng(1).integers(0, 256, (3, old, old, 1), dtype=np.uint8)
    matrix = lanczos(old, new)
    across = np.clip(np.einsum("jw,nhwc->nhjc", matrix, x), 0, 255)
    expected = np.clip(np.einsum("ih,nhjc->nijc", matrix, across), 0, 255)
    assert np.abs(resized(x, new) - expected).max() <= 1.5
    assert np.abs(expected - 127).max() > 20  # there is something to tell apart


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_resized_image_by_image_in_their_order(channels: int) -> None:
    count = 2 * CHUNK + 5
    x = np.random.default_rng(0).integers(0, 256, (count, 6, 10, channels), dtype=np.uint8)
    found = resized(x, 3)
    assert found.shape == (count, 3, 3, channels)
    assert found.dtype == np.uint8
    for image, small in zip(x, found, strict=True):
        picture = Image.fromarray(image if channels == 3 else image[..., 0])
        expected = np.asarray(picture.resize((3, 3), LANCZOS, box=(2, 0, 8, 6)))
        np.testing.assert_array_equal(small, expected.reshape(3, 3, channels))


def test_arrays_that_have_the_size_are_handed_back() -> None:
    x = np.zeros((4, 5, 5, 3), np.uint8)
    assert resized(x, 5) is x
    assert resized(x[:0, :3], 5).shape == (0, 5, 5, 3)


# ---- decoding


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_a_lossless_picture_of_the_size_keeps_every_pixel(suffix: str, tmp_path: Path) -> None:
    image = noise(7, 7)
    image.save(tmp_path / f"a.{suffix}", lossless=True)
    found = decoded([tmp_path / f"a.{suffix}"], 7)
    assert found.shape == (1, 7, 7, 3)
    np.testing.assert_array_equal(found[0], np.asarray(image))


def test_pictures_stay_in_the_order_of_their_files(tmp_path: Path) -> None:
    count = 3 * CHUNK + 7
    paths = [tmp_path / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (2 + i % 3, 2), (i, 255 - i, 7)).save(path)
    order = np.random.default_rng(0).permutation(count)
    found = decoded([paths[i] for i in order], 2)
    expected = np.stack([order, 255 - order, np.full(count, 7)], 1)[:, None, None]
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_a_picture_is_turned_upright_as_its_camera_says(
    orientation: int, upright: object, tmp_path: Path
) -> None:
    """The eight orientations of Exif 2.32, 4.6.4 A, in NumPy."""
    assert callable(upright)
    image, exif = noise(5, 5), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    found = decoded([tmp_path / "a.png"], 5)[0]
    np.testing.assert_array_equal(found, upright(np.asarray(image)))


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 128), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
        ("P", 2, (40, 50, 60)),
    ],
)
def test_a_picture_of_another_mode_becomes_rgb(
    mode: str, colour: int | tuple[int, ...], rgb: tuple[int, ...], tmp_path: Path
) -> None:
    image = Image.new(mode, (4, 6), colour)
    if mode == "P":
        image.putpalette([*range(6), 40, 50, 60])
    image.save(tmp_path / "a.png")
    found = decoded([tmp_path / "a.png"], 3)
    assert np.unique(found.reshape(-1, 3), axis=0).tolist() == [list(rgb)]


@pytest.mark.parametrize(("mode", "side"), [("RGB", 640), ("L", 640), ("CMYK", 64)])
def test_a_large_jpeg_comes_out_small_and_right(mode: str, side: int, tmp_path: Path) -> None:
    """Halves of two greys; a flat JPEG area is off by a rounding of its colours at most."""
    image = Image.new("RGB", (side, side), (200, 200, 200))
    image.paste((40, 40, 40), (0, 0, side // 2, side))
    image.convert(mode).save(tmp_path / "a.jpg", quality=95)
    found = decoded([tmp_path / "a.jpg"], 8)[0].astype(int)
    assert np.abs(found[:, :2] - 40).max() <= 3
    assert np.abs(found[:, -2:] - 200).max() <= 3


def test_a_large_jpeg_keeps_the_detail_that_its_small_size_can_show(tmp_path: Path) -> None:
    """Waves of four pixels in the small picture; decoding all of the file is the oracle."""
    wave = 127 + 120 * np.sin(np.arange(256) * 2 * np.pi / 16)
    grey = np.broadcast_to(wave.astype(np.uint8), (256, 256))
    Image.fromarray(grey).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(image.resize((64, 64), LANCZOS)).astype(int)
    assert expected.std() > 60
    assert np.abs(decoded([tmp_path / "a.jpg"], 64)[0] - expected).max() <= 4


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decoded([tmp_path / "a.gif"], 4)[0, 0, 0].tolist() == [255, 0, 0]


# ---- what is not readable


def refused(path: Path, size: int = 8) -> InvalidInput:
    with pytest.raises(InvalidInput, match="is not a readable image: ") as caught:
        decoded([path], size)
    assert str(path) in caught.value.what
    assert caught.value.next_step == "remove it or replace it"
    assert "\n" not in str(caught.value)
    return caught.value


def encoded(suffix: str) -> bytes:
    buffer = io.BytesIO()
    noise(40, 30).save(buffer, suffix)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"only some text", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_a_file_that_is_no_image_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    assert "No such file" in refused(tmp_path / "a.png").what


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "bmp", "gif", "tiff"])
def test_a_truncated_image_is_named(suffix: str, tmp_path: Path) -> None:
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    for length in np.linspace(0, 0.9 * len(whole), 12, dtype=int):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole)
    assert decoded([path], 8).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "tiff"])
def test_a_damaged_image_never_ends_in_another_error(suffix: str, tmp_path: Path) -> None:
    whole, path, outcomes = bytearray(encoded(suffix)), tmp_path / "a", set()
    for place in [*range(60), *np.random.default_rng(0).integers(60, len(whole), 60)]:
        damaged = whole.copy()
        damaged[place] ^= 0xA5
        path.write_bytes(damaged)
        try:
            outcomes.add(decoded([path], 8).shape)
        except InvalidInput as error:
            outcomes.add(f"refused with its path: {str(path) in error.what}")
    assert outcomes == {(1, 8, 8, 3), "refused with its path: True"}


@pytest.mark.parametrize("limit", [100, 70])
def test_a_picture_that_pillow_takes_for_a_bomb_is_named(
    limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Pillow warns above its limit and raises above twice the limit: both are refused."""
    noise(12, 12).save(tmp_path / "a.png")
    assert decoded([tmp_path / "a.png"], 12).shape == (1, 12, 12, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "decompression bomb" in refused(tmp_path / "a.png").what


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_pixels_that_are_not_bytes_are_refused(dtype: str, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, dtype)).save(tmp_path / "a.tiff")
    assert "its pixels are not bytes" in refused(tmp_path / "a.tiff").what


def test_of_several_unreadable_files_the_first_is_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i:04}.png" for i in range(3 * CHUNK)]
    for path in paths:
        Image.new("RGB", (1, 1)).save(path)
    for i in (CHUNK + 3, 2 * CHUNK + 1, CHUNK + 9):
        paths[i].write_bytes(b"")
    for _ in range(3):
        with pytest.raises(InvalidInput, match=re.escape(str(paths[CHUNK + 3]))):
            decoded(paths, 1)


def test_a_huge_header_over_no_pixels_is_refused(tmp_path: Path) -> None:
    """A bitmap that claims 30,000 x 30,000 pixels and holds none."""
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    info = struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(header + info)
    assert "decompression bomb" in refused(tmp_path / "a.bmp").what


# ---- memory


def test_memory_is_refused_above_what_is_available_and_not_at_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  99999999 kB\nMemFree:   1 kB\nMemAvailable:   6000000 kB\n")
    monkeypatch.setattr(pictures, "MEMORY", told)
    check_memory("They", 6_000_000 * 1024)
    with pytest.raises(InvalidInput) as caught:
        check_memory("5,000 images of 1024 x 1024 x 3", 5000 * 1024 * 1024 * 3, size=1024)
    assert caught.value.what == (
        "5,000 images of 1024 x 1024 x 3 need 15.7 GB of memory; 6.14 GB are available."
    )
    # the size that it names fits, and one pixel more does not
    (fits,) = map(int, re.findall(r"smaller --image-size: (\d+) fits", caught.value.next_step))
    assert fits == math.isqrt(6_000_000 * 1024 // 15_000)
    check_memory("They", 5000 * fits * fits * 3)
    with pytest.raises(InvalidInput, match="They need"):
        check_memory("They", 5000 * (fits + 1) ** 2 * 3)
    with pytest.raises(InvalidInput) as caught:
        check_memory("The arrays", 10**13)
    assert caught.value.next_step == "use fewer images, or a machine with more memory"
    with pytest.raises(InvalidInput) as caught:
        check_memory("They", 10**13, size=10)
    assert caught.value.next_step == "use fewer images, or a smaller --image-size"


@pytest.mark.parametrize("content", [None, "", "MemTotal: 5 kB\n"])
def test_where_the_system_does_not_tell_its_memory_nothing_is_refused(
    content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    monkeypatch.setattr(pictures, "MEMORY", tmp_path / "meminfo")
    check_memory("They", 10**18, size=10)


def test_this_machine_refuses_what_no_machine_holds() -> None:
    if not pictures.MEMORY.exists():
        pytest.skip("this system has no /proc/meminfo")
    with pytest.raises(InvalidInput, match="1e\\+09 GB of memory"):
        check_memory("They", 10**18)
