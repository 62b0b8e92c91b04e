"""A confusion matrix as a picture."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH, MOST_CELL, NAMED, COUNTED = 900, 48, 11, 24  # pixels; the least cells for names and counts
HEAD, GAP, LETTERS = 24, 8, 18
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, PAPER, FULL = (20, 20, 20), (255, 255, 255), (8, 64, 129)


def confusion_picture(confusion: NDArray[np.int64], classes: Sequence[str]) -> Image.Image:
    """confusion: int [classes, classes], a row for what images are and a column for what they were
    taken for. A cell is the darker the larger its share of its row. Names are written where there
    is room for them, and counts."""
    cell = max(1, min(MOST_CELL, WIDTH // len(classes)))
    font = ImageFont.load_default(size=max(9, min(13, cell - 2)))
    names = [_brief(name) for name in classes] if cell >= NAMED else []
    margin = GAP + int(max(map(font.getlength, names), default=0)) + GAP
    side = cell * len(classes)
    top = HEAD + margin
    picture = Image.new("RGB", (max(margin + side + GAP, 360), top + side + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), "row: what it is; column: what it was taken for", INK,
              ImageFont.load_default(size=12))  # fmt: skip
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    dark = np.sqrt(share)  # so that a few of many are seen
    colours = PAPER + dark[..., None] * (np.array(FULL) - PAPER)
    cells = Image.fromarray(colours.round().astype(np.uint8)).resize(
        (side, side), Image.Resampling.NEAREST
    )
    picture.paste(cells, (margin, top))
    draw.rectangle((margin - 1, top - 1, margin + side, top + side), outline=INK)
    for place, name in enumerate(names):
        middle = place * cell + cell // 2
        draw.text((margin - GAP, top + middle), name, INK, font, anchor="rm")
        _write_upright(picture, name, (margin + middle, top - GAP), font)
    if cell >= COUNTED:
        for (row, column), count in np.ndenumerate(confusion):
            if count and font.getlength(str(count)) < cell:
                ink = PAPER if dark[row, column] > 0.5 else INK
                middle_of = margin + column * cell + cell // 2, top + row * cell + cell // 2
                draw.text(middle_of, str(count), ink, font, anchor="mm")
    return picture


def _write_upright(picture: Image.Image, name: str, end: tuple[int, int], font: Font) -> None:
    """A name from the bottom up, ending above a column."""
    _, _, width, height = map(int, font.getbbox(name))
    tile = Image.new("RGB", (width + 2, height + 2), PAPER)
    ImageDraw.Draw(tile).text((0, 0), name, INK, font)
    turned = tile.rotate(90, expand=True)
    picture.paste(turned, (end[0] - turned.width // 2, end[1] - turned.height))


def _brief(name: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"
