"""A contact sheet: each query in a row with its nearest images."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from resfeat.downstream.search import Neighbour
from resfeat.errors import Failure
from resfeat.sources import read, uri_of

TILE, CAPTION, GAP = 160, 32, 8
LETTERS = 24
INK, PAPER, MISSING = (20, 20, 20), (255, 255, 255), (222, 222, 222)


def contact_sheet(
    queries: Sequence[str],
    neighbours: Sequence[Sequence[Neighbour]],
    uris: Mapping[str, str],
) -> Image.Image:
    """One row a query: the query, then its neighbours with cosine and id.

    `uris` says where each id lies. An image that cannot be read any more is a grey tile.
    """
    columns = 1 + max(map(len, neighbours))
    width = GAP + columns * (TILE + GAP)
    height = GAP + len(queries) * (TILE + CAPTION + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for row, (query, found) in enumerate(zip(queries, neighbours, strict=True)):
        tiles = [("query", Path(query).name, uri_of(query))]
        tiles += [(f"{n.cosine:.4f}", n.id, uris.get(n.id, "")) for n in found]
        for column, (heading, name, uri) in enumerate(tiles):
            corner = GAP + column * (TILE + GAP), GAP + row * (TILE + CAPTION + GAP)
            sheet.paste(_tile(uri), corner)
            text = f"{heading}\n{name if len(name) <= LETTERS else '…' + name[1 - LETTERS :]}"
            draw.multiline_text((corner[0], corner[1] + TILE + 2), text, INK, font, spacing=2)
    return sheet


def _tile(uri: str) -> Image.Image:
    content = read(uri)
    if not isinstance(content, Failure):
        try:
            with Image.open(io.BytesIO(content[0])) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
            return ImageOps.fit(picture, (TILE, TILE))
        except Exception:  # the file broke since; decoders raise nearly anything
            pass
    return Image.new("RGB", (TILE, TILE), MISSING)
