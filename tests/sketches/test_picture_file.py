"""Pictures from images and texts, against the strokes that the images were drawn of, as training would see them."""

import io
import json
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from gpt2xla.errors import InputError
from gpt2xla.sketches.picture_file import picture_from_image, picture_from_text, picture_of, read_picture
from gpt2xla.sketches.strokes import rasterise
from gpt2xla.sketches.tracing import thinned, trace

DRAWINGS = [
    [np.array(stroke[:2], float).T for stroke in json.loads(line)["drawing"]]
    for line in (Path(__file__).parent / "quickdraw" / "simplified.ndjson").read_text().splitlines()
]
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def inked(strokes: list[np.ndarray], side: int, width: int) -> Image.Image:
    """The drawing in the middle of a large picture, 255 where the pen of this width was."""
    points = np.concatenate(strokes)
    least, most = points.min(0), points.max(0)
    scale = 0.8 * side / (most - least).max()
    image = Image.new("L", (side, side))
    for stroke in strokes:
        at = [tuple(point) for point in (stroke - (least + most) / 2) * scale + side / 2]
        ImageDraw.Draw(image).line(at * 2 if len(at) == 1 else at, 255, width, joint="curve")
        for x, y in at:
            ImageDraw.Draw(image).ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], 255)
    return image


def on(paper: tuple[int, ...], ink: tuple[int, ...]) -> Callable[[Image.Image], Image.Image]:
    return lambda mask: Image.composite(Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask)


def on_nothing(mask: Image.Image) -> Image.Image:
    image = Image.new("RGBA", mask.size, WHITE)
    image.putalpha(mask)
    return image


def photographed(mask: Image.Image) -> Image.Image:
    """Blue ink on yellowish paper, in the light of a lamp, a bit out of focus, with noise."""
    image = np.asarray(on((235, 225, 205), (50, 55, 90))(mask.filter(ImageFilter.GaussianBlur(2))), float)
    y, x = np.mgrid[: mask.height, : mask.width] / mask.height
    light = (0.5 + 0.35 * x + 0.15 * y - 0.1 * x * y)[..., None]
    noise = np.random.default_rng(0).normal(size=image.shape) * 6
    return Image.fromarray((image * light + noise).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def agreement(found: np.ndarray, truth: np.ndarray) -> float:
    """The smaller of the shares of ink of one that have ink of the other at most a pixel away."""

    def wide(picture: np.ndarray) -> np.ndarray:
        picture = np.pad(picture, 1)
        height, width = picture.shape
        return np.any([picture[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)], axis=0)

    return min((found & wide(truth)).sum() / found.sum(), (truth & wide(found)).sum() / truth.sum())


@pytest.mark.parametrize(
    ("look", "kind", "side", "width"),
    [
        (on(WHITE, BLACK), "PNG", 1100, 1),
        (on(WHITE, BLACK), "PNG", 60, 1),
        (on((10, 20, 40), (240, 240, 200)), "WEBP", 300, 3),
        (on((0, 160, 0), (200, 30, 30)), "GIF", 300, 12),  # equally bright
        (on(WHITE, (250, 230, 20)), "BMP", 300, 6),
        (on_nothing, "PNG", 300, 6),
        (photographed, "JPEG", 400, 8),
    ],
)
def test_an_image_becomes_what_training_saw(
    look: Callable[[Image.Image], Image.Image], kind: str, side: int, width: int
) -> None:
    for number, strokes in enumerate(DRAWINGS[::7]):
        found = picture_of(saved(look(inked(strokes, side, width)), kind), "x", 24)
        truth = rasterise(strokes, 24)
        assert agreement(found, truth) > 0.98, number
        assert 0.7 <= found.sum() / truth.sum() <= 1.2, number


def test_lines_are_as_wide_as_those_of_training() -> None:
    image = on(WHITE, BLACK)(inked(DRAWINGS[0], 400, 20))
    for stroke_width in (1, 2):
        found = picture_from_image(image, "x", 32, stroke_width)
        assert agreement(found, rasterise(DRAWINGS[0], 32, stroke_width)) > 0.97
        assert found.sum() == pytest.approx(rasterise(DRAWINGS[0], 32, stroke_width).sum(), rel=0.2)


def test_a_filled_shape_becomes_its_outline() -> None:
    image = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(image).rectangle([50, 50, 250, 250], fill=0)
    found = picture_from_image(image, "x", 24)
    frame = np.ones((24, 24), bool)
    frame[1:-1, 1:-1] = False
    assert agreement(found, frame) == 1
    assert not found[4:-4, 4:-4].any()


@pytest.mark.parametrize("turn", [(3, 180), (6, 90), (8, 270)])
def test_a_photograph_that_was_taken_sideways_stands_upright(turn: tuple[int, int]) -> None:
    orientation, degrees = turn
    image, exif = on(WHITE, BLACK)(inked(DRAWINGS[0], 300, 6)), Image.Exif()
    exif[0x112] = orientation
    content = saved(image.rotate(degrees, expand=True), "JPEG", exif=exif, quality=95)
    assert agreement(picture_of(content, "x", 24), picture_from_image(image, "x", 24)) == 1


def test_other_modes_of_pixels() -> None:
    mask = inked(DRAWINGS[0], 200, 4)
    truth = picture_of(saved(mask, "PNG"), "x", 24)
    grey = np.asarray(mask)
    clear = Image.fromarray(255 - grey)
    clear.info["transparency"] = 255
    for image in (mask.convert("1"), Image.fromarray(grey.astype(np.uint16) * 257), mask.convert("P"), clear):
        assert np.array_equal(picture_of(saved(image, "PNG"), "x", 24), truth), image.mode
    assert agreement(picture_of(saved(mask.convert("CMYK"), "JPEG"), "x", 24), truth) == 1


def test_an_image_of_the_pictures_size_is_taken_as_it_is() -> None:
    picture = np.random.default_rng(0).random((24, 24)) < 0.3
    image = Image.fromarray(np.where(picture, 0, 255).astype(np.uint8)).convert("1")
    assert np.array_equal(picture_from_image(image, "x", 24), picture)
    assert np.array_equal(picture_from_image(image.resize((240, 240)), "x", 240), np.kron(picture, np.ones((10, 10))))


def test_thinning_keeps_what_is_connected_and_leaves_lines() -> None:
    """No line vanishes or breaks: as many 8-connected parts, each within the ink; no 2 x 2 pixels of ink are left."""
    for strokes in DRAWINGS[::7]:
        for width in (2, 7):
            ink = np.asarray(inked(strokes, 90, width)) > 127
            lines = thinned(ink)
            assert not (lines & ~ink).any()
            assert parts(lines) == parts(ink)
            assert (lines[1:, 1:] & lines[:-1, 1:] & lines[1:, :-1] & lines[:-1, :-1]).sum() <= 1
            for stroke in trace(ink):
                assert (np.abs(np.diff(stroke, axis=0)) <= 3).all()
    assert thinned(np.ones((2, 2), bool)).sum() == 1


def parts(picture: np.ndarray) -> int:
    left, count = set(map(tuple, np.argwhere(picture).tolist())), 0
    while left:
        near, count = [left.pop()], count + 1
        while near:
            y, x = near.pop()
            found = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= found
            near += found
    return count


def rows(picture: np.ndarray, between: str = "", end: str = "\n") -> str:
    return end.join(between.join("01"[pixel] for pixel in row) for row in picture.astype(int).tolist())


PICTURE = rasterise(DRAWINGS[3], 24)


@pytest.mark.parametrize(
    "content",
    [
        rows(PICTURE).encode(),
        f"\n  {rows(PICTURE, ' ')}\n\n".encode(),
        rows(PICTURE, ",", "\r\n").encode(),
        rows(PICTURE, "", "\r\n").encode("utf-8-sig"),
        rows(PICTURE).encode("utf-16"),
        str(PICTURE.astype(int).tolist()).encode(),
        np.array2string(PICTURE.astype(int)).encode(),
        f"<MSGSTART> apple <IMGSTART>\n{rows(PICTURE)}\n<IMGEND> apple <MSGEND>\n".encode(),
        f"<MSGSTART> <IMGSTART>\n{rows(PICTURE)}\n<IMGEND>".encode(),
    ],
)
def test_forms_of_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "drawing").write_bytes(content)
    assert np.array_equal(read_picture(str(tmp_path / "drawing"), 24), PICTURE)


def png(width: int, height: int) -> bytes:
    """An image of one row, whose header promises `height` of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 + width)))
        + chunk(b"IEND", b"")
    )


WHOLE = saved(photographed(inked(DRAWINGS[0], 300, 6)), "JPEG")
TEXT = rows(PICTURE)
WRONG = {
    "1 x 1": (png(1, 1), "1 x 1 pixels are too few for a drawing; give at least 24 x 24"),
    "8,000 x 7,000": (png(8000, 7000), "(8,000 x 7,000) has too many pixels; give an image of at most 50 million"),
    "blank": (
        saved(Image.new("L", (100, 100)), "PNG"),
        "is blank: nothing in it differs from its background; give a drawing",
    ),
    "clear": (saved(Image.new("RGBA", (99, 99), (0, 0, 0, 0)), "PNG"), "is blank: nothing in it differs"),
    "noise": (saved(photographed(Image.new("L", (300, 300))), "JPEG"), "is blank: nothing in it differs"),
    "cut short": (WHOLE[: len(WHOLE) // 2], "the image is damaged or cut short (image file is truncated"),
    "hardly begun": (WHOLE[:20], "cannot be read; give a PNG, JPEG, WebP, GIF or BMP image, or a text of 0 and 1"),
    "no image": (b"\x7fELF\x02\x01\x01\0\0\0\xff", "cannot be read; give a PNG"),
    "vectors": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "'<' in line 1; a drawing is written in 0 and 1"),
    "empty": (b"", "is empty; give a PNG"),
    "white space": (b" \r\n\t", "is empty; give a PNG"),
    "23 rows": (TEXT.rpartition("\n")[0].encode(), "23 rows of 0 and 1; give 24 rows of 24"),
    "25 rows": (f"{TEXT}\n{'0' * 24}".encode(), "25 rows of 0 and 1; give 24 rows of 24"),
    "rows of 25": (TEXT.replace("\n", "0\n").encode(), "25 characters in line 1; give 24 rows of 24"),
    "a short row": (TEXT[:-1].encode(), "23 characters in line 24; give 24 rows of 24"),
    "letters": (TEXT.replace("0", "O", 1).encode(), "'O' in line 1; a drawing is written in 0 and 1"),
    "numbers": (TEXT.replace("0", "2").encode(), "'2' in line 1; a drawing is written in 0 and 1"),
    "no ink": (TEXT.replace("1", "0").encode(), "is blank: it holds no 1; give a drawing"),
    "two drawings": (f"<IMGSTART>{TEXT}<IMGEND><IMGSTART>{TEXT}".encode(), "holds 2 drawings; give one"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_drawing_is_refused_in_one_line(what: str) -> None:
    content, reason = WRONG[what]
    with pytest.raises(InputError) as refusal:
        picture_of(content, "my-drawing", 24)
    assert str(refusal.value).startswith(("my-drawing: ", "my-drawing ")), refusal.value
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_enormous_image_costs_nothing() -> None:
    """20,000 x 20,000 pixels, which fit into a file of 0.4 MB, would be 1.2 GB."""
    content = png(20_000, 20_000)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(InputError, match=r"^bomb has too many pixels; give an image of at most 50 million$"):
        picture_of(content, "bomb", 24)
    assert time.process_time() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_no_damage_of_an_image_escapes() -> None:
    """Bytes of each format are changed or cut off by chance: a picture or one line, never another error."""
    draw, small = np.random.default_rng(0), on(WHITE, BLACK)(inked(DRAWINGS[0], 80, 3))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole, refused = saved(small, kind), []
        for trial in range(9):
            content = bytearray(whole[: int(draw.integers(len(whole)))] if trial % 3 == 0 else whole)
            for _ in range(trial % 3 * 4):
                content[int(draw.integers(min(len(content), 60 if trial % 2 else len(content))))] = int(
                    draw.integers(256)
                )
            try:
                picture_of(bytes(content), "x", 24)
            except InputError as refusal:
                refused.append(str(refusal))
        assert len(refused) > 2, kind
        assert not any("\n" in line for line in refused)


def test_text_of_another_size() -> None:
    assert picture_from_text("01\n10", "x", 2).tolist() == [[False, True], [True, False]]
    with pytest.raises(InputError, match=r"^x: 24 rows of 0 and 1; give 28 rows of 28$"):
        picture_from_text(TEXT, "x", 28)
