"""`resfeat doctor`, here, and with each of its findings provoked, really where that can be done."""

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
from command import share_ray
from object_store import ObjectStore

from resfeat import storage
from resfeat.cli.doctor import examine, probing, software, surroundings
from resfeat.cli.doctor.probing import Finding, Probe
from resfeat.engines import reach
from resfeat.engines.cluster import address_of
from resfeat.errors import ResfeatError
from resfeat.runtimes import hardware

SECRET = "s3cr3t"
DEFAULT = "resnet50-11ad3fa6.pth"  # as torchvision calls its file


def doctor(*arguments, env=None, **options):
    """The command in a process of its own, and its findings by what was looked at."""
    words = [sys.executable, "-m", "resfeat", "doctor", *map(str, arguments), "--json"]
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, **options)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    found = {each["what"]: Finding(**each) for each in told["findings"]}
    broken = [each for each in found.values() if each.state == "broken"]
    assert (done.returncode, told["works"]) == ((1, False) if broken else (0, True))
    return found


def one(probe):
    (finding,) = probing.run([probe])
    return finding


def apart(look, *arguments, **more):
    """The finding of a probe in a process of its own, as the command has it."""
    return one(Probe("it", look, arguments, apart=True, mend="mend it", **more))


@contextmanager
def package(folder, name, code, monkeypatch):
    """A package of this name that is found before the real one."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(folder)
        yield


@pytest.fixture
def silent():
    """A port that accepts, and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_on_this_machine(tmp_path):
    weights = tmp_path / "hub" / "checkpoints" / DEFAULT
    weights.parent.mkdir(parents=True)
    weights.touch()
    (tmp_path / "photos").mkdir()
    env = {"TORCH_HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": ""}
    photos, out = str(tmp_path / "photos"), str(tmp_path / "out")
    found = doctor(photos, "-o", out, env=env)
    assert {each.what for each in found.values() if each.state == "broken"} == set()
    assert set(found) >= {
        "resfeat", "Python", "packages", "torch", "torchvision", "NVIDIA driver", "GPUs",
        "OpenVINO", "Ray", "Ray cluster", "simplejpeg", "Pillow", "cores", "memory", "/dev/shm",
        "open files", "temporary folder", "weights", "to be used", photos, out, *software.EXTRAS,
    }  # fmt: skip
    assert found["cores"].value == hardware.cpu_count()
    assert found["memory"].value == hardware.memory_bytes()
    assert found["to be used"].value["device"] in ("cpu", "cuda")
    assert found["to be used"].value["workers"] >= 1
    assert not os.path.exists(out)


def test_the_table_has_three_columns_and_a_last_word(resfeat, monkeypatch):
    given = [Finding("a", "b", "c"), Finding("d\x1b", "e", "do f", "broken"), Finding("g", "h")]
    monkeypatch.setattr(examine, "examine", lambda *asked: given)
    done = resfeat("doctor")
    assert done.returncode == 1
    assert [line.split(maxsplit=2) for line in done.stdout.splitlines()] == [
        ["what", "found", "verdict, or what to do"], ["a", "b", "c"],
        ["d\\x1b", "e", "BROKEN: do f"], ["g", "h", "ok"], [], ["broken:", "d\\x1b"],
    ]  # fmt: skip
    given.pop(1)
    done = resfeat("doctor")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "extract works here")


@pytest.mark.parametrize(
    ("name", "look", "code", "found"),
    [
        ("torch", software.torch_here, "raise ImportError('libcudart.so.99: not there')",
         "ImportError: libcudart.so.99: not there"),
        ("torch", software.torch_here, "import os; os.abort()", "crashes with SIGABRT"),
        ("openvino", software.openvino_here, "import os; os.kill(os.getpid(), 4)",
         "crashes with SIGILL"),
        ("simplejpeg", software.decoders, "raise ModuleNotFoundError('No module named that')",
         "ModuleNotFoundError: No module named that"),
        ("ray", software.ray_here, "raise OSError('two lines\\nof it')", "OSError: two lines"),
        ("ray", software.ray_here, "print('[]'); import os; os._exit(3)",
         "ends Python with exit code 3"),
    ],
)  # fmt: skip
def test_a_broken_library_is_a_finding(name, look, code, found, tmp_path, monkeypatch):
    with package(tmp_path / "first", name, code, monkeypatch):
        assert apart(look) == Finding("it", found, "mend it", "broken")


def test_a_library_that_hangs_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "PROBE_SECONDS", 1.0)
    with package(tmp_path / "first", "ray", "import time; time.sleep(1000)", monkeypatch):
        assert apart(software.ray_here).found == "no answer within 1 s"


def test_torchvision_of_another_torch_is_told_beside_torch(tmp_path, monkeypatch):
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert software.torchvision_here().state == "broken"
    monkeypatch.delitem(sys.modules, "torchvision")
    with package(tmp_path / "first", "torchvision", code, monkeypatch):
        found = software.torchvision_here()
    assert found.found == "RuntimeError: operator torchvision::nms does not exist"
    assert "pip install" in found.verdict


def test_the_command_with_a_broken_torch_says_so_and_ends_with_1(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no such torch')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = doctor(env={"PYTHONPATH": path})
    assert found["torch"].state == "broken" and "no such torch" in found["torch"].found
    assert found["simplejpeg"].state == "ok"


def test_an_old_python_and_packages_that_are_missing_or_old(monkeypatch):
    needs = ["numpy>=1", "pillow>=999", "not-there>=1", "nor-this; extra == 'int8'"]
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: needs)
    (found,) = software.packages()
    assert found.state == "broken" and "not-there is not installed" in found.found
    assert "must be >=999" in found.found and len(found.value) == 2
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert [each.state for each in software.python()] == ["ok", "broken"]


def test_extras_that_are_missing_say_what_for_and_how_to_get_them(monkeypatch):
    monkeypatch.setattr(software, "version_of", lambda package: None)
    for found in software.extras():
        purpose, extra = software.EXTRAS[found.what]
        how = f"pip install 'resfeat[{extra}]'"
        assert (found.state, found.verdict) == ("note", f"for {purpose}: {how}")
    (found,) = software.openvino_here()
    assert (found.state, found.found) == ("note", "not installed")


def test_formats_that_pillow_lacks(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: name not in ("webp", "avif"))
    _, found = software.decoders()
    assert found.state == "note" and found.verdict.startswith("without webp, avif, ")


def test_a_cpu_without_bf16(monkeypatch):
    import openvino

    core = SimpleNamespace(get_property=lambda *asked: ["FP32"])
    monkeypatch.setattr(openvino, "Core", lambda: core)
    (found,) = software.openvino_here()
    assert "no bf16" in found.found and found.value == {"bf16": False}


def test_gpus_and_their_driver(tmp_path, monkeypatch):
    card = SimpleNamespace(name="H100", total_memory=80 << 30)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda n: card
    )
    found = software.gpus(cuda)
    assert found.found == "H100 (80 GiB), H100 (80 GiB)"
    assert found.value == [{"name": "H100", "memory_bytes": 80 << 30}] * 2
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15")
    assert software.driver(str(tmp_path / "version")).found == "550.54.15"
    assert software.driver(str(tmp_path / "none")).found == "none"
    from resfeat.runtimes import cuda as runtime

    monkeypatch.setattr(runtime, "why_no_gpu", lambda: "the NVIDIA driver is too old")
    cuda.is_available = lambda: False
    assert "the NVIDIA driver is too old" in software.gpus(cuda).verdict


def test_what_is_used_follows_the_gpus():
    (found,) = software.to_be_used(2)
    assert (found.value["device"], found.value["runtime"]) == ("cuda", "torch")
    assert found.value["workers"] >= 2 and found.found.startswith("2 GPUs")


def test_a_container_that_has_less_than_its_machine(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 1 << 30)
    (cores,), (memory,) = surroundings.cores(), surroundings.memory()
    assert cores.found == "1 of 48" and "quota" in cores.verdict
    assert memory.state == "note" and "raise the limit" in memory.verdict


def test_a_small_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))
    (found,) = surroundings.shared_memory()
    assert (found.state, found.found) == ("note", "64 MiB") and "--shm-size" in found.verdict


def test_few_open_files():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        (found,) = surroundings.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (found.state, found.value) == ("note", 256) and "ulimit -n" in found.verdict
    (found,) = surroundings.open_files()
    assert found.value == limits[0]


@pytest.fixture
def disk(tmp_path):
    """A real file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full_or_read_only(disk, tmp_path, monkeypatch):
    (found,) = surroundings.out(str(disk / "deep" / "out"))
    assert found.state == "broken" and "tmpfs" in found.found and "make room" in found.verdict
    with monkeypatch.context() as patched:  # of which torch, once it is imported, makes use, too
        patched.setattr(surroundings.tempfile, "gettempdir", lambda: str(disk))
        (found,) = surroundings.temporary_folder()
    assert found.state == "broken" and "TMPDIR" in found.verdict
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (found,) = surroundings.out(str(disk / "out"))
    assert (found.found, found.state) == (f"{disk} cannot be written", "broken")
    monkeypatch.setenv("TORCH_HOME", str(disk / "torch"))
    (found,) = surroundings.weights(False)
    assert found.state == "broken" and "TORCH_HOME" in found.verdict


def test_little_room_and_weights_that_are_not_there_yet(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=surroundings.LITTLE_SPACE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (found,) = surroundings.out(str(tmp_path))
    assert found.state == "note" and "little" in found.verdict
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (found,) = surroundings.weights(False)
    assert found.state == "note" and "--fetch" in found.verdict
    other = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"  # the first ones
    other.parent.mkdir(parents=True)
    other.touch()
    (found,) = surroundings.weights(False)
    assert found.state == "note" and found.found.startswith(f"no {DEFAULT} in")
    other.rename(other.with_name(DEFAULT))
    assert surroundings.weights(False)[0].state == "ok"


def test_places_that_are_missing_files_or_not_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dataset" / "_resfeat").mkdir(parents=True)
    assert surroundings.out(str(tmp_path / "file"))[0].state == "broken"
    assert surroundings.out("https://host/out")[0].state == "broken"
    assert surroundings.source(str(tmp_path), False)[0].state == "ok"
    assert "free" in surroundings.source(str(tmp_path / "dataset"), True)[0].found
    (new,) = surroundings.source(str(tmp_path / "new"), True)
    assert "not there yet" in new.found and new.state == "note" and "as SRC" in new.verdict
    missing = apart(surroundings.source, str(tmp_path / "new"), False)
    assert missing.state == "broken" and "does not exist" in missing.found
    nothing = apart(surroundings.source, str(tmp_path / "*.tar"), True)
    assert nothing.state == "broken" and "matches nothing" in nothing.found


def test_stores_that_answer_refuse_or_have_nothing(monkeypatch):
    with ObjectStore() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        with store.files("bucket").open_output_stream("photos/1.jpg") as file:
            file.write(b"x")
        there = ("s3://bucket/photos", "s3://bucket/photos/1.jpg", "s3://bucket")
        assert {apart(surroundings.source, each, False).state for each in there} == {"ok"}
        assert apart(surroundings.out, "s3://bucket/out").verdict == surroundings.UNTRIED
        assert apart(surroundings.source, "s3://bucket/out", True).state == "note"
        assert apart(surroundings.source, "s3://bucket/out", False).state == "broken"
        missing = apart(surroundings.source, "s3://no-such-bucket/x", True)
        assert missing.state == "broken" and "no bucket" in missing.found
        web = store.endpoint
        assert apart(surroundings.source, f"{web}/bucket/no.jpg", False).state == "broken"
        assert apart(surroundings.source, f"{web}/moto-api/", False).state == "ok"


def test_who_accepts_and_never_answers_costs_seconds(silent, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    address = f"127.0.0.1:{silent}"
    probes = [
        Probe("store", surroundings.out, ("s3://bucket/out",), apart=True),
        Probe("web", surroundings.source, (f"http://{address}/a.jpg", False), apart=True),
        Probe("cluster", software.cluster_there, (address,), apart=True),
    ]
    monkeypatch.setattr(probing, "PROBE_SECONDS", 90.0)  # the silence must end it, and not this
    for found in probing.run(probes):
        assert found.state == "broken" and "90 s" not in found.found, found


def test_a_cluster_that_is_not_there(silent, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert software.cluster_there(None)[0].found == "none is set"
    assert apart(software.cluster_there, "auto").found.startswith("none: RAY_ADDRESS")
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        port = gone.getsockname()[1]
    refused = apart(software.cluster_there, f"127.0.0.1:{port}")
    assert refused.state == "broken" and "refused" in refused.found
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}\n")
    assert address_of("auto") == address_of(None) == f"127.0.0.1:{port}"
    found = apart(software.cluster_there, None, state="note")
    assert found.state == "note" and "refused" in found.found
    monkeypatch.setenv("RAY_ADDRESS", "there:1")
    assert address_of("auto") == "there:1"
    assert address_of("here:1") == "here:1"
    client = apart(software.cluster_there, "ray://there:1")
    assert client.state == "broken" and "is an address of Ray Client" in client.found


def test_ray_is_not_imported_where_no_cluster_is_asked_for(tmp_path):
    """It takes seconds, and its own finding tells whether it can be."""
    code = (
        "import sys; from resfeat.cli.doctor.software import cluster_there; "
        "print(cluster_there(None)[0].found, 'ray' in sys.modules)"
    )
    outside = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**outside, "RAY_TMPDIR": str(tmp_path)})  # fmt: skip
    assert done.stdout == "none is set False\n", done.stderr


@pytest.mark.ray
def test_a_cluster_that_answers_and_one_of_another_version(monkeypatch, tmp_path):
    import ray

    share_ray()
    address = ray.get_runtime_context().gcs_address
    # As Ray does, the token in this user's home is used for a cluster that is found, not for one
    # that is named.
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (refused,) = probing.run([Probe("it", software.cluster_there, (address,), apart=True)])
    assert refused.state == "broken" and "it wants a token: set RAY_AUTH_MODE" in refused.found
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    with monkeypatch.context() as patched:
        patched.setenv("RAY_TMPDIR", str(tmp_path))
        assert apart(software.cluster_there, "auto").found == f"{address} answers"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert apart(software.cluster_there, address).found == f"{address} answers"
    told = {"ray_version": "1.0", "python_version": platform.python_version()}
    monkeypatch.setattr(reach, "_metadata", lambda *asked: told)
    with pytest.raises(ResfeatError, match=r"it runs ray 1\.0, and this is"):
        reach.reach(address, 5)


@pytest.mark.parametrize(
    ("told", "public"),
    [
        (f"https://user:{SECRET}@host/a.jpg", "https://host/a.jpg"),
        (f"https://user:a/{SECRET}@host/a.jpg", "https://host/a.jpg"),
        (f"at https://{SECRET}@host/a, no", "at https://host/a, no"),
        (f"https://host/a?X-Amz-Signature={SECRET} is", "https://host/a is"),
        (f"ray://u:{SECRET}@host:1: refused", "ray://host:1: refused"),
        (f"az://box@account/x?sig={SECRET}", "az://box@account/x"),
        (f"az://box:{SECRET}@account/x", "az://account/x"),
        (f"s3://{SECRET}@bucket/x", "s3://bucket/x"),
        (f"(https://a:{SECRET}@h/x,https://b:{SECRET}@h/y)", "(https://h/x,https://h/y)"),
        ("s3://bucket/a@b.jpg", "s3://bucket/a@b.jpg"),
        ("http://host:8080/a@2x.jpg", "http://host:8080/a@2x.jpg"),
        ("/data/a?b@c", "/data/a?b@c"),
    ],
)
def test_no_secret_is_told(told, public):
    """By the rule that holds for whatever else is told or written."""
    (found,) = probing.run([Probe("it", lambda: [Finding(told, told, told)])])
    assert (found.what, found.found, found.verdict) == (public,) * 3
    if " " not in told and "," not in told:
        assert storage.public(told.removesuffix(":")) == public
