"""What is installed: a small function for each thing, which gives its findings.

What may be broken is imported when a function runs, so that a broken library is a finding.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import Any

from resfeat import __version__
from resfeat.cli.doctor.probing import ANSWER_SECONDS, Finding, State, must_answer_soon, said
from resfeat.errors import ResfeatError, install

INSTALL = "pip install -c constraints.txt ."
# Each package that brings more: what for, and the extra that it comes with.
EXTRAS = {
    "nncf": ("--precision int8", "int8"),
    "pillow-heif": ("HEIC, the photographs of phones", "heif"),
    "timm": ("--model timm:NAME", "timm"),
    "faiss-cpu": ("`index`, and search by it", "faiss"),
    "scikit-learn": ("`probe`", "probe"),
    "umap-learn": ("`page --map umap`", "umap"),
    "pylance": ("`export --to lance`", "lance"),
}
MODEL = "resnet50"  # what `extract` takes where no other is named


def python() -> list[Finding]:
    told = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    state: State = "ok" if sys.version_info >= (3, 11) else "broken"
    verdict = "" if state == "ok" else "install Python 3.11 or newer"
    mine = Finding("resfeat", __version__, value=__version__)
    return [mine, Finding("Python", told, verdict, state, platform.python_version())]


def packages() -> list[Finding]:
    """What resfeat's own metadata asks for, beside what is installed."""
    from packaging.requirements import Requirement

    needs = [Requirement(each) for each in importlib.metadata.requires("resfeat") or []]
    needs = [each for each in needs if not each.marker or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in needs:
        there = version_of(each.name)
        if there is None:
            wrong.append(f"{each.name} is not installed")
        elif not each.specifier.contains(there, prereleases=True):
            wrong.append(f"{each.name} is {there} and must be {each.specifier}")
    if wrong:
        return [Finding("packages", ", ".join(wrong), INSTALL, "broken", wrong)]
    return [Finding("packages", f"all {len(needs)} that are needed")]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_here() -> list[Finding]:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = Finding("torch", f"{torch.__version__}, {built}", value=str(torch.__version__))
    return [found, torchvision_here(), driver(), gpus(torch.cuda)]


def torchvision_here() -> Finding:
    try:
        import torchvision
    except Exception as error:  # of a torch that it was not built for: many kinds
        mend = f"reinstall it with the torch that it was built for: {INSTALL}"
        return Finding("torchvision", said(error), mend, "broken")
    return Finding("torchvision", torchvision.__version__, value=torchvision.__version__)


def driver(told: str = "/proc/driver/nvidia/version") -> Finding:
    """NVIDIA's driver, by what it says of itself in that file."""
    try:
        version = re.search(r"\d+\.\d+(\.\d+)?", Path(told).read_text())
    except OSError:
        version = None
    return Finding("NVIDIA driver", version[0] if version else "none")


def gpus(cuda: Any) -> Finding:
    if not cuda.is_available():
        from resfeat.runtimes.cuda import why_no_gpu

        # One that is there and that torch cannot use is worth a look.
        state: State = "note" if Path("/dev/nvidia0").exists() else "ok"
        return Finding("GPUs", "none", f"CPUs are used; for a GPU: {why_no_gpu()}", state, [])
    cards = [cuda.get_device_properties(number) for number in range(cuda.device_count())]
    told = [{"name": card.name, "memory_bytes": card.total_memory} for card in cards]
    named = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
    return Finding("GPUs", named, value=told)


def openvino_here() -> list[Finding]:
    if version_of("openvino") is None:
        return [Finding("OpenVINO", "not installed", "torch runs the networks instead", "note")]
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # without our own module, which imports torch, too

    bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    told = f"{version_of('openvino')}, {'' if bf16 else 'no '}bf16 instructions"
    verdict = "" if bf16 else "leave out --precision bf16"
    return [Finding("OpenVINO", told, verdict, value={"bf16": bf16})]


def ray_here() -> list[Finding]:
    from resfeat.engines import reach  # noqa: F401 (imports Ray)

    return [Finding("Ray", f"{version_of('ray')}", value=version_of("ray"))]


def cluster_there(asked: str | None) -> list[Finding]:
    from resfeat.engines.cluster import address_of

    address = address_of(asked)
    if not address and asked:
        raise ResfeatError("none: RAY_ADDRESS is not set, and no Ray was started on this machine")
    if not address:
        return [Finding("Ray cluster", "none is set", "each run starts a Ray of its own")]
    from resfeat.engines import reach

    must_answer_soon()
    try:
        reach.reach(address, ANSWER_SECONDS / 3)
    except Exception as error:  # Ray's own are of many classes
        raise ResfeatError(f"{address}: {error or 'no answer'}") from error
    return [Finding("Ray cluster", f"{address} answers", "" if asked else "for --address auto")]


def decoders() -> list[Finding]:
    """Those that are always there, tried; HEIC is among the extras."""
    import numpy as np
    import simplejpeg
    from PIL import features

    simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    reads = {name: features.check(name) for name in ("jpg", "zlib", "libtiff", "webp", "avif")}
    lacks = [name for name, there in reads.items() if not there]
    verdict = "whose images will fail: pip install --force-reinstall pillow"
    return [
        Finding("simplejpeg", f"{version_of('simplejpeg')}", value=version_of("simplejpeg")),
        Finding(
            "Pillow",
            f"{version_of('pillow')}, " + ", ".join(name for name in reads if reads[name]),
            f"without {', '.join(lacks)}, {verdict}" if lacks else "",
            "note" if lacks else "ok",
            reads,
        ),
    ]


def extras() -> list[Finding]:
    found = []
    for package, (purpose, extra) in EXTRAS.items():
        there = version_of(package)
        verdict = f"for {purpose}" if there else f"for {purpose}: {install(extra)}"
        state: State = "ok" if there else "note"
        found.append(Finding(package, there or "not installed", verdict, state, there))
    return found


def to_be_used(gpu_count: int) -> list[Finding]:
    """What `extract` takes where the user chooses nothing."""
    from resfeat.engines.placement import by_default
    from resfeat.runtimes import choose
    from resfeat.runtimes.hardware import cpu_count
    from resfeat.spec import ExtractSpec

    cpus, device = cpu_count(), "cuda" if gpu_count else "cpu"
    spec = ExtractSpec(sources=("SRC",), output="OUT")
    runtime = choose(None, MODEL, spec.precision, device)
    workers = by_default([{"CPU": cpus, "GPU": gpu_count}], gpu_count)
    where = f"{gpu_count} GPUs" if gpu_count else f"{cpus} CPU cores"
    told = {"device": device, "runtime": runtime, "workers": workers, "decode": spec.decode}
    found = f"{where}, {runtime} in {spec.precision}, up to {workers} Ray workers, {spec.decode}"
    return [Finding("to be used", found, "see --runtime, --workers, --decode", value=told)]
