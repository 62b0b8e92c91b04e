"""Groups of duplicates as one page of HTML, which needs nothing else: no network, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from resfeat.decoding import Loaded, load, quiet
from resfeat.downstream.duplicates import Group, Member
from resfeat.downstream.sheet import TILE_PIXELS
from resfeat.sources import Item

GROUPS, MEMBERS = 100, 12  # that are shown
QUALITY = 70

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --good: #2a7; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }}
section {{ border-top: 1px solid var(--line); padding: .5rem 0 1rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1rem; }}
div {{ display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }}
figure {{ margin: 0; font-size: .8rem; overflow-wrap: anywhere; }}
img, .gone {{ aspect-ratio: 1; background: #8883; border-radius: 4px;
  display: block; width: 100%; }}
.keep img, .keep .gone {{ outline: 3px solid var(--good); }}
small {{ opacity: .75; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{groups}
</body>
</html>
"""


def duplicates_page(
    title: str, groups: Sequence[Group], threshold: float, items: Mapping[str, Item]
) -> str:
    """The page. items: the images by id, at least of `shown`; one that cannot be read any more is a
    grey tile. Everything that a name holds is text in it."""
    images = sum(len(group.members) for group in groups)
    summary = (
        f"{images:,} images in {len(groups):,} groups, linked by a cosine of at least "
        f"{threshold:g}. The first of each, with a green border, is the one to keep."
    )
    if len(groups) > GROUPS:
        summary += f" The {GROUPS} largest groups are shown."
    sections = (_section(number, group, items) for number, group in enumerate(groups[:GROUPS]))
    return PAGE.format(title=escape(title), summary=escape(summary), groups="\n".join(sections))


def shown(groups: Sequence[Group]) -> list[str]:
    """The ids of the images that the page shows."""
    return [member.id for group in groups[:GROUPS] for member in group.members[:MEMBERS]]


def _section(number: int, group: Group, items: Mapping[str, Item]) -> str:
    least = f"{'at least ' if group.is_bound else ''}{group.least_cosine:.4f}"
    heading = f"Group {number}: {len(group.members):,} images, least cosine {least}"
    some = group.members[:MEMBERS]
    figures = "\n".join(_figure(each, each is some[0], items.get(each.id)) for each in some)
    more = len(group.members) - len(some)
    rest = f"<p><small>and {more:,} more</small></p>" if more else ""
    return f"<section><h2>{escape(heading)}</h2>\n<div>\n{figures}\n</div>{rest}</section>"


def _figure(member: Member, is_kept: bool, item: Item | None) -> str:
    near = "keep" if is_kept else "equal" if member.is_equal else f"{member.cosine:.4f}"
    about = f"{near} · {member.width} x {member.height} · {member.size:,} bytes"
    kind = ' class="keep"' if is_kept else ""
    return (
        f"<figure{kind}>{_picture(item)}"
        f"<figcaption>{escape(member.id)}<br><small>{escape(about)}</small></figcaption></figure>"
    )


def _picture(item: Item | None) -> str:
    with quiet():
        loaded = load(item, TILE_PIXELS, "pillow") if item else None
    if not isinstance(loaded, Loaded):
        return '<span class="gone"></span>'
    file = io.BytesIO()
    Image.fromarray(loaded.picture.pixels).save(file, "JPEG", quality=QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'
