"""A page about a dataset: one HTML file to send to somebody, that holds all that it shows.

`page.html` is the page itself. What is said of a dataset goes into it as JSON, and its script puts
that into the page as text, so that nothing of a name is ever taken for HTML. Its policy lets it run
this one script, and reach no network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from resfeat import __version__
from resfeat.dataset.reader import SENT_BACK, readable
from resfeat.downstream.page.map import NEAR, Kind, Sample, alike, draw, lay_out, spread
from resfeat.downstream.pictures import thumbnails
from resfeat.downstream.search import nearest
from resfeat.reporting.report import LEAST_SECONDS
from resfeat.storage import public

if TYPE_CHECKING:
    from resfeat.dataset import Dataset

# What bounds the page, however large the dataset is.
PICTURES, QUERIES, NEIGHBOURS, GROUPS, MEMBERS = 400, 6, 6, 12, 8
EXAMPLES, RUNS, LABELS, WORKERS = 3, 100, 8, 12
LETTERS = 300  # of an id or a message


def page(
    dataset: Dataset,
    kind: Kind = "pca",
    layer: str | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> str:
    """The page, as HTML. kind: of the map. layer: which embedding of several; the last by default.
    step: is told what is waited for. Raises UsageError where there are no embeddings yet."""
    layer = dataset.layer_of(layer)
    step("reading the rows")
    sample = draw(dataset, layer)
    step("laying out the map")
    places, share = lay_out(sample, kind)
    shown = spread(places, PICTURES)
    step("searching for neighbours")
    queries = [shown[len(shown) * n // QUERIES] for n in range(min(QUERIES, len(shown)))]
    found = _neighbours(dataset, sample, queries, layer)
    groups = [(rows[:MEMBERS], len(rows), least) for rows, least in alike(sample)]
    wanted = [sample.ids[row] for row in shown]
    wanted += [key for near in found for key, _ in near]
    wanted += [sample.ids[row] for rows, *_ in groups[:GROUPS] for row in rows]
    # All that is told of an image is told by its number here. The sample's are the rows in it.
    number = {name: n for n, name in enumerate(dict.fromkeys([*sample.ids, *wanted]))}
    step(f"drawing {len(set(wanted)):,} small pictures")
    items = dataset.items(list(number))
    pictures = thumbnails(wanted, items)
    labels = [item.label if (item := items.get(name)) else None for name in sample.ids]
    return render(
        title=dataset.layout.root.name,
        about=_about(dataset, layer),
        counts=_counts(dataset),
        reasons=_reasons(dataset),
        **_runs(dataset),
        ids=[_short(name) for name in number],
        pictures={number[name]: picture for name, picture in pictures.items()},
        map=_map(places, labels) | {"kind": kind, "share": share, "rows": sample.rows},
        neighbours=[
            {"of": row, "found": [(number[key], cosine) for key, cosine in near]}
            for row, near in zip(queries, found, strict=True)
        ],
        near=NEAR,
        groups=groups[:GROUPS],
        grouped=[len(groups), sum(count for _, count, _ in groups)],
    )


def render(**told: Any) -> str:
    """The page that tells this. Every text in it is shown as text."""
    template = (files("resfeat.downstream.page") / "page.html").read_text(encoding="utf-8")
    digests = {name: _digest(template, name) for name in ("script", "style")}
    about = json.dumps(told | {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
                               "version": __version__})  # fmt: skip
    # In a script "<" could end it; in JSON it only stands in strings.
    filled = {"title": html.escape(str(told["title"])), "data": about.replace("<", "\\u003c")}
    return re.sub(r"@(\w+)@", lambda found: (digests | filled)[found[1]], template)


def _digest(template: str, tag: str) -> str:
    """The digest by which the page's policy knows its one script, or its one style sheet."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _short(text: str) -> str:
    """Without secrets, since a page is sent to others. The end of a long id is what tells it from
    others."""
    text = public(text)
    return text if len(text) <= LETTERS else "…" + text[1 - LETTERS :]


def _about(dataset: Dataset, layer: str) -> list[tuple[str, str]]:
    """What the dataset is, in names and values."""
    record = dataset.record
    identity, pixels = record.identity, record.identity.preprocessing
    made = [
        f"short side to {pixels.resize}, centre {pixels.crop}", pixels.interpolation,
        f"decoded by {identity.decode}", f"policy {identity.pixel_policy}",
    ]  # fmt: skip
    told = {
        "model": identity.model,
        "weights": record.weights,
        "layers": ", ".join(identity.layers)
        + (f" (shown: {layer})" if identity.layers[1:] else ""),
        "pooling": identity.pool + (", unit length" if identity.normalize else ""),
        "precision": f"{identity.precision}, stored as {identity.dtype}",
        "pixels": ", ".join(made),
        "sources": ", ".join(_short(source) for source in record.sources[:20])
        + (f" and {len(record.sources) - 20:,} more" if record.sources[20:] else ""),
        "fingerprint": identity.fingerprint,
        "weights digest": identity.weights_digest,
        "made": f"{record.created:.10} by resfeat {record.versions.get('resfeat', '?')}",
        "updates": f"{record.plan.generation:,}",
    }
    if record.parity:
        told["parity"] = ", ".join(f"{name} {value}" for name, value in record.parity.items())
    return list(told.items())


def _counts(dataset: Dataset) -> dict[str, int]:
    commits, plan = dataset.commits(), dataset.record.plan
    return {
        "images": plan.items,
        "embedded": commits.embedded,
        "failed": sum(commits.reasons.values()),
        "shards": len(plan.shards),
        "shards_left": len(plan.shards) - len(commits.done),
    }


def _reasons(dataset: Dataset) -> list[dict[str, Any]]:
    """The reasons of failures, the commonest first, with some examples of each."""
    counts = dataset.commits().reasons
    examples: dict[str, list[tuple[str, str]]] = {reason: [] for reason in counts}
    missing = {reason: min(EXAMPLES, count) for reason, count in counts.items()}
    with readable(dataset.layout.failures, SENT_BACK):
        columns = ["id", "reason", "message"]
        for batch in dataset.failures.to_batches(columns=columns) if counts else ():
            for name, reason, message in zip(*(each.to_pylist() for each in batch), strict=True):
                if missing.get(reason, 0):
                    missing[reason] -= 1
                    examples[reason].append((_short(name), _short(message)))
            if not any(missing.values()):
                break
    return [
        {"reason": reason, "count": count, "examples": examples[reason]}
        for reason, count in counts.items()
    ]


def _runs(dataset: Dataset) -> dict[str, Any]:
    """What the reports of the runs say, and how many say nothing. shown: which is told in full, the
    last that was long enough to tell what limited it, or else the last of any."""
    reports = dataset.runs()
    read = [told for report in reports[-RUNS:] if (told := _report(report))]
    unread = len(reports[-RUNS:]) - len(read)
    telling = [n for n, told in enumerate(read) if told["verdict"]]
    shown = max(telling, key=lambda n: (read[n]["is_long"], n), default=None)
    for n, told in enumerate(read):
        if n != shown:
            told["course"] = None
    earlier = len(reports) - len(reports[-RUNS:])
    return {"runs": read, "shown": shown, "earlier": earlier, "unread": unread}


def _report(report: Any) -> dict[str, Any] | None:
    """What the page shows of a run; of an older version's report what is there. None of one that is
    damaged."""
    try:
        told = json.loads(report.read_bytes())
        engine, name = told.get("engine") or {}, told["run_id"]
        rate, workers = told.get("images_per_second"), engine.get("workers")
        if found := re.match(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)", name):
            name = "{}-{}-{} {}:{}".format(*found.groups())
        few = ("status", "images", "images_failed", "seconds", "start_seconds", "partition",
               "verdict", "error", "notes", "stages", "kept")  # fmt: skip
        shown = {each: told.get(each) for each in few} | {
            "when": name,
            "rate": rate,
            "workers": workers,
            "per_worker": round(rate / workers, 2) if rate and workers else None,
            "device": engine.get("device"),
            "deaths": engine.get("worker_deaths"),
            "is_long": (told.get("seconds") or 0) >= LEAST_SECONDS,
            "course": _course(told.get("course") or {}),
            "updated": bool(told.get("update")),
            "hardware": (told.get("hardware") or {}).get("cpu"),
        }
        json.dumps(shown, allow_nan=False)  # which no browser reads: it would lose the whole page
        return shown
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _course(by_worker: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """Images/s in each span of a run: of all workers, and of the slowest ones by themselves."""
    if not by_worker:
        return None
    names, rates = list(by_worker), np.array([*by_worker.values()], np.float64)
    slowest = np.sort(np.argsort(rates.sum(axis=1), kind="stable")[:WORKERS])
    return {
        "all": rates.sum(axis=0).round(2).tolist(),
        "workers": [(names[n], rates[n].tolist()) for n in slowest.tolist()],
        "count": len(names),
    }


def _neighbours(
    dataset: Dataset, sample: Sample, rows: Sequence[int], layer: str
) -> list[list[tuple[str, float]]]:
    """The nearest images of the whole dataset to some of the sample, without these themselves: the
    id and the cosine of each."""
    found = nearest(dataset, sample.units[list(rows)], NEIGHBOURS + 1, layer)
    every = zip(rows, found.ids, found.scores.tolist(), strict=True)
    return [
        [pair for pair in zip(ids, cosines, strict=True) if pair[0] != sample.ids[row]][:NEIGHBOURS]
        for row, ids, cosines in every
    ]


def _map(places: NDArray[np.float32], labels: Sequence[str | None]) -> dict[str, Any]:
    """The points: their places in thousandths, and the number of their label among the commonest,
    -1 for another or none."""
    counts = Counter(label for label in labels if label is not None)
    names = [name for name, _ in counts.most_common(LABELS)]
    number: dict[str | None, int] = {name: n for n, name in enumerate(names)}
    thousandths = (places * 1000).round().astype(int).tolist()
    points = [
        (*place, number.get(label, -1)) for place, label in zip(thousandths, labels, strict=True)
    ]
    return {"points": points, "labels": [*map(_short, names)], "others": len(counts) - len(names)}
