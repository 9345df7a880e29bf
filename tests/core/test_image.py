"""Pictures: the rules for every kind of file, uint8 <-> float, resizing, grids."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.core.image import (
    center_crop,
    cover,
    decode,
    edges,
    from_pil,
    grid,
    load,
    resize,
    to_float,
    to_pil,
    to_rgb,
    to_uint8,
)


def noise(height=24, width=20, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width, height, depth, color, rows, extra=b""):
    """A PNG written by hand: Pillow writes no 16-bit color."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + extra + body + chunk(b"IEND", b"")


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


class TestRange:
    def test_every_byte_survives_the_round_trip(self):
        every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
        image = to_float(every)
        assert image.dtype == torch.float32
        assert image.min() == -1
        assert image.max() == 1
        assert torch.equal(to_uint8(image), every)

    def test_rounds_to_nearest_and_halves_to_even(self):
        halves = torch.tensor([0.5, 1.5, 126.5, 127.5, 254.5])
        image = (halves.double() / 127.5 - 1).float()
        exact = (image + 1) * 127.5 == halves  # not every half survives float32
        assert exact.sum() >= 2
        assert to_uint8(image)[exact].tolist() == torch.tensor([0, 2, 126, 128, 254])[exact].tolist()
        near = torch.tensor([3.49, 3.51, 200.4, 200.6]) / 127.5 - 1
        assert to_uint8(near).tolist() == [3, 4, 200, 201]

    def test_clamps(self):
        assert to_uint8(torch.tensor([-7.0, -1.001, 1.001, 7.0])).tolist() == [0, 0, 255, 255]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floats(self, dtype):
        assert to_uint8(torch.tensor([-1, 0, 1], dtype=dtype)).tolist() == [0, 128, 255]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite_are_an_error(self, value):
        with pytest.raises(ValueError, match="not finite"):
            to_uint8(torch.tensor([0.0, value]))

    def test_wrong_dtype(self):
        with pytest.raises(ValueError, match="must be uint8"):
            to_float(torch.zeros(3, 2, 2))
        with pytest.raises(ValueError, match="must be floating point"):
            to_uint8(torch.zeros(3, 2, 2, dtype=torch.int64))


class TestPillow:
    def test_round_trip(self):
        array = noise()
        tensor = from_pil(Image.fromarray(array))
        assert tensor.shape == (3, 24, 20)
        assert tensor.is_contiguous()
        assert np.array_equal(np.asarray(to_pil(tensor)), array)

    def test_gray(self):
        image = to_pil(torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3))
        assert image.mode == "L"
        assert np.asarray(image).tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4), (1, 3, 4, 4)])
    def test_wrong_shape(self, shape):
        with pytest.raises(ValueError, match=r"of shape \(3, H, W\)"):
            to_pil(torch.zeros(shape, dtype=torch.uint8))


class TestRules:
    """What each kind of picture becomes."""

    def test_plain(self):
        array = noise()
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(array), "PNG"))), array)

    def test_gray_and_one_bit(self):
        assert pixels(decode(encoded(Image.fromarray(np.uint8([[7, 200]])), "PNG"))) == [[[7] * 3, [200] * 3]]
        bits = Image.new("1", (2, 1))
        bits.putpixel((1, 0), 1)
        assert pixels(decode(encoded(bits, "PNG"))) == [[[0] * 3, [255] * 3]]

    def test_alpha_is_composited_on_white(self):
        rgba = np.uint8(
            [[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]]
        )  # opaque, clear, a fifth of black
        assert pixels(decode(encoded(Image.fromarray(rgba), "PNG"))) == [
            [[200, 100, 0], [255] * 3, [204] * 3]
        ]

    def test_gray_with_alpha(self):
        la = Image.merge("LA", [Image.fromarray(np.uint8([[0, 90]])), Image.fromarray(np.uint8([[51, 255]]))])
        assert pixels(decode(encoded(la, "PNG"))) == [[[204] * 3, [90] * 3]]

    def test_palette(self):
        image = Image.new("P", (3, 1))
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        image.putdata([2, 0, 1])
        assert pixels(decode(encoded(image, "PNG"))) == [[[70, 80, 90], [10, 20, 30], [40, 50, 60]]]

    def test_transparent_palette_entry(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putdata([0, 1])
        for kind in ("PNG", "GIF"):
            assert pixels(decode(encoded(image, kind, transparency=1))) == [[[10, 20, 30], [255] * 3]]

    def test_transparent_color(self):
        image = Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]]))
        assert pixels(decode(encoded(image, "PNG", transparency=(4, 5, 6)))) == [[[1, 2, 3], [255] * 3]]

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_16_bit_gray_drops_the_low_byte(self, kind):
        image = Image.fromarray(np.array([[0, 255, 256, 0x1234, 0x80FE, 65535]], dtype=np.uint16))
        expected = [[[v] * 3 for v in (0, 0, 1, 0x12, 0x80, 255)]]
        assert pixels(decode(encoded(image, kind))) == expected

    def test_16_bit_transparent_gray(self):
        chunk = b"tRNS" + struct.pack(">H", 0x1234)
        extra = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = png(2, 1, 16, 0, [struct.pack(">2H", 0x1234, 0x1235)], extra)
        assert pixels(decode(data)) == [[[255] * 3, [0x12] * 3]]

    def test_16_bit_color_drops_the_low_byte(self):
        data = png(1, 1, 16, 2, [struct.pack(">3H", 0x00FF, 0x80FE, 0xFE80)])
        assert pixels(decode(data)) == [[[0x00, 0x80, 0xFE]]]

    def test_16_bit_color_with_alpha(self):
        data = png(2, 1, 16, 6, [struct.pack(">8H", 0x4000, 0x5000, 0x6000, 0xFFFF, 0, 0, 0, 0)])
        assert pixels(decode(data)) == [[[0x40, 0x50, 0x60], [255] * 3]]

    def test_32_bit_integers_within_16_bits(self):
        assert pixels(to_rgb(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))) == [
            [[0] * 3, [255] * 3]
        ]

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_32_bit_integers_beyond_are_refused(self, value):
        data = encoded(Image.fromarray(np.array([[0, value]], dtype=np.int32)), "TIFF")
        with pytest.raises(ValueError, match="no stated white point"):
            decode(data)

    def test_floating_point_is_refused(self):
        data = encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
        with pytest.raises(ValueError, match="floating-point"):
            decode(data, name="depth.tiff")

    @pytest.mark.parametrize(("kind", "tolerance"), [("TIFF", 0), ("JPEG", 4)])
    def test_cmyk(self, kind, tolerance):
        cmyk = np.full((16, 16, 4), (0, 102, 255, 51), np.uint8)
        data = encoded(Image.fromarray(cmyk, "CMYK"), kind, **({"quality": 95} if kind == "JPEG" else {}))
        expected = np.array([255 - c for c in (0, 102, 255)]) * (255 - 51) / 255  # 204, 122.4, 0
        # Rounding of the product; JPEG loses a few levels even of a flat color.
        assert np.abs(np.asarray(decode(data)) - expected).max() <= 1 + tolerance

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    def test_exif_orientation_is_applied(self, kind, orientation):
        # Quadrants red, green / blue, white as they should be seen; stored turned and flagged accordingly.
        upright = np.zeros((32, 64, 3), np.uint8)
        upright[:16, :32], upright[:16, 32:] = (255, 0, 0), (0, 255, 0)
        upright[16:, :32], upright[16:, 32:] = (0, 0, 255), (255, 255, 255)
        undo = {
            1: lambda a: a,
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a, 1),
            7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
            8: lambda a: np.rot90(a, -1),
        }
        stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
        seen = np.asarray(decode(encoded(stored, kind, exif=exif, **options))).astype(int)
        assert seen.shape == upright.shape
        assert np.abs(seen[4:-4:4, 4:-4:4] - upright[4:-4:4, 4:-4:4]).max() <= (3 if kind == "JPEG" else 0)

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_an_animation_gives_its_first_frame(self, kind):
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(decode(data))[3][3] == [255, 0, 0]


FORMATS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {"compression": "raw"}),
    ("WEBP", {"lossless": True}),
    ("PPM", {}),
]


def read_or_line(data, expected=None):
    """The one line of the error, or None if the bytes were read, as the expected pixels if there are any."""
    try:
        image = decode(data)
    except ValueError as error:
        line = str(error)
    else:
        assert image.mode == "RGB"
        assert expected is None or np.array_equal(np.asarray(image), expected)
        return None
    assert line.startswith("cannot read the picture picture: ")
    assert "\n" not in line
    return line


class TestDamage:
    @pytest.mark.parametrize(("kind", "options"), FORMATS)
    @pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated).*")
    def test_a_truncated_file_is_never_half_a_picture(self, kind, options):
        data = encoded(Image.fromarray(noise()), kind, **options)
        whole = np.asarray(decode(data))
        errors = [read_or_line(data[:length], whole) for length in range(0, len(data), 7)]
        assert errors.count(None) < len(errors) // 2

    @pytest.mark.parametrize("gray", [False, True])
    def test_jpeg_that_was_cut_and_closed_again(self, gray):
        image = Image.fromarray(noise(64, 64))
        data = encoded(image.convert("L") if gray else image, "JPEG")
        for length in range(
            len(data) // 2, len(data) - 160, 23
        ):  # 160 bytes: the last block, found by nobody
            with pytest.raises(ValueError, match="JPEG data end before the last block"):
                decode(data[:length] + b"\xff\xd9")

    @pytest.mark.parametrize(
        "options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}]
    )
    def test_jpeg_whose_corner_is_really_gray_is_fine(self, options):
        array = noise(64, 64)
        array[32:] = 128
        data = encoded(Image.fromarray(array), "JPEG", **options)
        assert (np.asarray(decode(data))[-1, -1] == 128).all()

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @settings(max_examples=60)
    @given(st.binary(max_size=200), st.sampled_from([kind for kind, _ in FORMATS]), st.data())
    def test_any_bytes_give_a_picture_or_one_line(self, junk, kind, data):
        whole = encoded(Image.fromarray(noise(8, 8)), kind)
        at = data.draw(st.integers(0, len(whole)))
        read_or_line(whole[:at] + junk + whole[at + len(junk) :])

    def test_load(self, tmp_path):
        path = tmp_path / "a.png"
        array = noise()
        Image.fromarray(array).save(path)
        assert np.array_equal(np.asarray(load(path)), array)
        with pytest.raises(ValueError, match=r"there is no picture at .*b\.png"):
            load(tmp_path / "b.png")
        with pytest.raises(ValueError, match="cannot read the picture"):
            load(tmp_path)
        (tmp_path / "text.png").write_text("hello")
        with pytest.raises(ValueError, match=r"text\.png: not a picture of a known format$"):
            load(str(tmp_path / "text.png"))

    def test_a_picture_of_absurd_size_is_refused(self):
        data = png(50_000, 50_000, 8, 2, [b""])
        with pytest.raises(ValueError, match="more than 178 million pixels"):
            decode(data)


def adm_crop(image, size):
    """The published preparation: halve by BOX, scale the shorter side by BICUBIC, cut the middle."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


class TestSize:
    @pytest.mark.parametrize("shape", [(64, 64), (65, 64), (200, 131), (131, 331), (17, 30), (512, 1001)])
    def test_center_crop_is_that_of_adm(self, shape):
        image = Image.fromarray(noise(*shape))
        assert np.array_equal(np.asarray(center_crop(image, 32)), adm_crop(image, 32))

    @settings(max_examples=40)
    @given(*[st.integers(1, 90)] * 2, *[st.integers(1, 40)] * 2)
    def test_every_size_is_met(self, height, width, to_height, to_width):
        image = Image.fromarray(noise(height, width))
        assert center_crop(image, (to_height, to_width)).size == (to_width, to_height)
        assert resize(image, (to_height, to_width)).size == (to_width, to_height)
        covering = cover(image, (to_height, to_width))
        assert covering.width >= to_width
        assert covering.height >= to_height
        assert covering.width == to_width or covering.height == to_height

    def test_resize_of_a_flat_picture_is_flat(self):
        assert np.unique(np.asarray(resize(Image.new("RGB", (90, 70), (9, 9, 9)), (13, 21)))).tolist() == [9]

    @pytest.mark.parametrize("size", [0, (4, 0), (-1, 4)])
    def test_no_pixels(self, size):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            center_crop(Image.new("RGB", (4, 4)), size)


class TestGrid:
    def test_places_row_by_row(self):
        images = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 2, 4)
        sheet = grid(images, columns=3, gap=1, background=0)
        assert sheet.shape == (3, 2 * 2 + 1, 3 * 4 + 2)
        assert sheet[0, 0].tolist() == [1] * 4 + [0] + [2] * 4 + [0] + [3] * 4
        assert sheet[0, 3].tolist() == [4] * 4 + [0] + [5] * 4 + [0] + [0] * 4
        assert sheet[0, 2].tolist() == [0] * 14

    def test_default_is_the_smallest_square(self):
        assert grid(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), gap=0).shape == (3, 16, 24)
        assert grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (3, 8, 8)

    def test_wrong_input(self):
        with pytest.raises(ValueError, match="N >= 1"):
            grid(torch.zeros(0, 3, 8, 8, dtype=torch.uint8))
        with pytest.raises(ValueError, match="columns >= 1"):
            grid(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), columns=0)


def test_edges_are_where_the_brightness_changes():
    image = torch.ones(1, 3, 6, 8)
    image[..., 4:] = -1
    drawn = edges(image)
    assert drawn.shape == image.shape
    assert drawn[0, 0, 2].tolist() == [-1, -1, -1, 1, 1, -1, -1, -1]
    assert torch.equal(edges(image.mT), drawn.mT)
    assert edges(torch.full((1, 3, 4, 4), 0.3)).unique().tolist() == [-1]
    faint = torch.cat([torch.zeros(1, 3, 4, 2), torch.full((1, 3, 4, 2), 0.3)], dim=3)
    assert edges(faint).unique().tolist() == [-1]
    assert edges(faint, threshold=0.1).max() == 1
