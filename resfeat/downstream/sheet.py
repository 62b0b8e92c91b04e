"""A contact sheet: each query in a row with its nearest images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from resfeat.decoding import Loaded, load, quiet
from resfeat.downstream.search import Neighbour
from resfeat.sources import Item, item_of
from resfeat.spec import Preprocessing

TILE, CAPTION, GAP = 160, 32, 8
LETTERS = 24
# A tile shows the middle of the image.
TILE_PIXELS = Preprocessing(
    resize=TILE, crop=TILE, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
)
INK, PAPER, MISSING = (20, 20, 20), (255, 255, 255), (222, 222, 222)


def contact_sheet(
    queries: Sequence[str], neighbours: Sequence[Sequence[Neighbour]], items: Mapping[str, Item]
) -> Image.Image:
    """One row a query: the query, then its neighbours with cosine and id. items: the images, by id.
    One that cannot be read any more is a grey tile."""
    across, down = TILE + GAP, TILE + CAPTION + GAP  # from one tile to the next
    size = GAP + (1 + max(map(len, neighbours))) * across, GAP + len(queries) * down
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for row, (query, found) in enumerate(zip(queries, neighbours, strict=True)):
        tiles: list[tuple[str, str, Item | None]]
        tiles = [("query", Path(query).name, item_of(query))]
        tiles += [(f"{n.cosine:.4f}", n.id, items.get(n.id)) for n in found]
        for column, (heading, name, item) in enumerate(tiles):
            left, top = GAP + column * across, GAP + row * down
            sheet.paste(_tile(item), (left, top))
            text = f"{heading}\n{name if len(name) <= LETTERS else '…' + name[1 - LETTERS :]}"
            draw.multiline_text((left, top + TILE + 2), text, INK, font, spacing=2)
    return sheet


def _tile(item: Item | None) -> Image.Image:
    with quiet():
        image = load(item, TILE_PIXELS, "pillow") if item else None
    if isinstance(image, Loaded):
        return Image.fromarray(image.picture.pixels)
    return Image.new("RGB", (TILE, TILE), MISSING)  # gone or broken since it was embedded
