"""All that `resfeat doctor` looks at, in the order in which it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from resfeat.cli.doctor import software, surroundings
from resfeat.cli.doctor.probing import Finding, Probe, run

FETCH_SECONDS = 600.0


def examine(
    sources: Sequence[str], output: str | None, address: str | None, fetch: bool
) -> list[Finding]:
    """All findings about this machine and these places. fetch: also the default weights."""
    install = software.INSTALL
    unasked = "without --address nothing uses it; for `--address auto` start that Ray again"
    probes = [
        Probe("Python", software.python),
        Probe("packages", software.packages),
        Probe("torch", software.torch_here, apart=True, mend=f"reinstall it: {install}"),
        Probe("OpenVINO", software.openvino_here, apart=True,
              mend="pip install --force-reinstall openvino, or give --runtime torch"),
        Probe("Ray", software.ray_here, apart=True, mend=f"{install}, or give --workers 0"),
        Probe("Ray cluster", software.cluster_there, (address,), apart=True,
              mend="check --address, the firewall and RAY_AUTH_TOKEN" if address else unasked,
              state="broken" if address else "note"),
        Probe("decoders", software.decoders, apart=True,
              mend=f"reinstall simplejpeg and pillow: {install}"),
        Probe("extras", software.extras),
        Probe("cores", surroundings.cores),
        Probe("memory", surroundings.memory),
        Probe("/dev/shm", surroundings.shared_memory),
        Probe("open files", surroundings.open_files),
        Probe("temporary folder", surroundings.temporary_folder, apart=True,
              mend="set TMPDIR to another"),
        Probe("weights", surroundings.weights, (fetch,), apart=True,
              mend="set TORCH_HOME, or give --weights", seconds=FETCH_SECONDS if fetch else None),
    ]  # fmt: skip
    mend = "check its name, mount, network and credentials"
    alone = output is None
    probes += [
        Probe(each, surroundings.source, (each, alone), apart=True, mend=mend) for each in sources
    ]
    if output is not None:
        probes.append(Probe(output, surroundings.out, (output,), apart=True, mend=mend))
    found = run(probes)
    gpus = next((len(each.value) for each in found if each.what == "GPUs"), 0)
    if gpus:  # where nothing goes by OpenVINO unless it is asked for
        found = [
            replace(each, state="note")
            if each.what == "OpenVINO" and each.state == "broken"
            else each
            for each in found
        ]
    return found + run(
        [Probe("to be used", software.to_be_used, (gpus,), apart=True, mend="see above")]
    )
