"""A contact sheet: each query in a row with its nearest images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from resfeat.decoding import load, quiet
from resfeat.downstream.search import Neighbour
from resfeat.errors import Failure
from resfeat.sources import item_of
from resfeat.spec import Preprocessing

TILE, CAPTION, GAP = 160, 32, 8
LETTERS = 24
# A tile shows the middle of the image.
TILE_PIXELS = Preprocessing(
    resize=TILE, crop=TILE, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
)
INK, PAPER, MISSING = (20, 20, 20), (255, 255, 255), (222, 222, 222)


def contact_sheet(
    queries: Sequence[str], neighbours: Sequence[Sequence[Neighbour]], uris: Mapping[str, str]
) -> Image.Image:
    """One row a query: the query, then its neighbours with cosine and id. `uris` says where each id
    lies. An image that cannot be read any more is a grey tile."""
    across, down = TILE + GAP, TILE + CAPTION + GAP  # from one tile to the next
    size = GAP + (1 + max(map(len, neighbours))) * across, GAP + len(queries) * down
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for row, (query, found) in enumerate(zip(queries, neighbours, strict=True)):
        tiles = [("query", Path(query).name, query)]
        tiles += [(f"{n.cosine:.4f}", n.id, uris.get(n.id, "")) for n in found]
        for column, (heading, name, uri) in enumerate(tiles):
            left, top = GAP + column * across, GAP + row * down
            sheet.paste(_tile(uri), (left, top))
            text = f"{heading}\n{name if len(name) <= LETTERS else '…' + name[1 - LETTERS :]}"
            draw.multiline_text((left, top + TILE + 2), text, INK, font, spacing=2)
    return sheet


def _tile(name: str) -> Image.Image:
    with quiet():
        loaded = load(item_of(name), TILE_PIXELS, "pillow")
    if isinstance(loaded, Failure):  # gone or broken since it was embedded
        return Image.new("RGB", (TILE, TILE), MISSING)
    return Image.fromarray(loaded.picture.pixels)
