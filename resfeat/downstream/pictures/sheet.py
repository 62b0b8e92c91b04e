"""Each query in a row with its nearest images: as a picture, or as a page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from resfeat.decoding import MAX_PIXELS
from resfeat.downstream.pictures.thumbnails import drawn, jpeg
from resfeat.downstream.search import Neighbours, Queries
from resfeat.errors import UsageError
from resfeat.sources import Item
from resfeat.spec import Preprocessing
from resfeat.storage import public

TILE, CAPTION, GAP = 160, 32, 8
LETTERS = 24
# A tile shows the middle of the image.
TILE_PIXELS = Preprocessing(
    resize=TILE, crop=TILE, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
)
INK, PAPER, MISSING = (20, 20, 20), (255, 255, 255), (222, 222, 222)
JPEG_QUALITY = 82


class Tile(NamedTuple):
    """An image with what stands below it. item: None where there is none to be shown."""

    heading: str
    name: str
    item: Item | None


def tiles(queries: Queries, found: Neighbours, items: Mapping[str, Item]) -> list[list[Tile]]:
    """One row a query: the query, then its neighbours with score and id. items: those images, by
    id."""
    rows = []
    for query, item, ids, scores in zip(
        queries.names, queries.items, found.ids, found.scores, strict=True
    ):
        near = zip(ids, scores, strict=True)
        others = (Tile(f"{score:.4f}", name, items.get(name)) for name, score in near)
        rows.append([Tile("query", query, item), *others])
    return rows


def contact_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Rows of tiles as a picture. An image that cannot be read any more is a grey tile. Raises
    UsageError for more than a picture holds."""
    across, down = TILE + GAP, TILE + CAPTION + GAP  # from one tile to the next
    size = GAP + max(map(len, rows)) * across, GAP + len(rows) * down
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(
            f"a picture of {size[0]:,} x {size[1]:,} pixels is too large: give fewer queries or "
            "less -k, or --html"
        )
    pictures = iter(
        drawn([tile.item for row in rows for tile in row], TILE_PIXELS, "pillow", _tile)
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for line, row in enumerate(rows):
        for column, (heading, name, _) in enumerate(row):
            left, top = GAP + column * across, GAP + line * down
            sheet.paste(next(pictures), (left, top))
            name = public(name)
            text = f"{heading}\n{name if len(name) <= LETTERS else '…' + name[1 - LETTERS :]}"
            draw.multiline_text((left, top + TILE + 2), text, INK, font, spacing=2)
    return sheet


def contact_page(
    rows: Sequence[Sequence[Tile]], title: str, about: str, headings: Sequence[str] = ()
) -> str:
    """The same as one HTML page that needs nothing beside it, on any screen; the first of each row
    is marked. headings: of the rows. Names are text on it, whatever they are: nothing of them is
    run."""
    above = [f"<h2>{escape(each)}</h2>" for each in headings] or [""] * len(rows)
    pictures = iter(
        drawn([tile.item for row in rows for tile in row], TILE_PIXELS, "pillow", _data)
    )
    body = "\n".join(
        f"<section>{heading}{''.join(_figure(tile, next(pictures)) for tile in row)}</section>"
        for heading, row in zip(above, rows, strict=True)
    )
    return PAGE.format(style=STYLE, title=escape(title), about=escape(about), body=body)


def _figure(tile: Tile, data: str) -> str:
    # What a terminal or an editor would act on is no part of a page.
    shown = public(tile.name)  # a page is sent to others
    name = escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown))
    return (
        "<figure>"
        f'<img src="{data}" width="{TILE}" height="{TILE}" alt="{name}">'
        f"<figcaption><b>{escape(tile.heading)}</b> <bdi>{name}</bdi></figcaption></figure>"
    )


def _tile(picture: Image.Image | None) -> Image.Image:
    """None: it is gone or broken since it was embedded."""
    return picture or Image.new("RGB", (TILE, TILE), MISSING)


def _data(picture: Image.Image | None) -> str:
    return jpeg(_tile(picture), JPEG_QUALITY)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --line: #d9d9e0; --mark: #2f6fdb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e7ea; --paper: #16161a; --line: #3a3a42; --mark: #7fb0ff }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; color: var(--ink);
  background: var(--paper); font: 15px/1.4 system-ui, sans-serif }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere }
section { border-top: 1px solid var(--line); padding: 1rem 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) }
h2 { font-size: 1rem; margin: 0; grid-column: 1 / -1 }
figure { margin: 0; min-width: 0 }
img { display: block; width: 100%; height: auto; border-radius: 4px }
figure:first-of-type img { outline: 3px solid var(--mark) }
figcaption { margin-top: .3rem; font-size: .85rem; overflow-wrap: anywhere }
"""
# The policy lets the page load nothing and run nothing.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
{body}
</body>
</html>
"""
