"""Options from the environment and from a file: which one counts, and what is refused."""

from __future__ import annotations

import functools
import itertools
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import click
import pytest
import torch
from command import error_of
from small import write_pictures

from resfeat.backbones.weights import resolve
from resfeat.cli import config, main
from resfeat.cli.extract import extract
from resfeat.cli.options import Count, Names
from resfeat.spec import FeatureSpec
from resfeat.storage import public

PLACES = ("file", "environment", "command line")
# One value for each place, by the type of an option: no two that follow each other are the same.
VALUES = {
    click.types.BoolParamType: (True, False, True),
    click.types.IntParamType: (11, 12, 13),
    click.types.FloatParamType: (0.25, 1, 0.75),
    Count: (1, 2, 3),
    Names: (["a"], ["b", "c"], ["d"]),
}
OPTIONS = [param for param in extract.params if param.name != "config"]
SMALL = ["--model", "cifar_resnet20", "--weights", "random:0", "--workers", 0]


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """What is in force, by a command line, variables and the text of a file. Nothing is run."""

    def parse(words=(), variables=(), text=None):
        for name, value in dict(variables).items():
            monkeypatch.setenv(name, value)
        if text is not None:
            (tmp_path / "job.toml").write_text(text)
            words = [*words, "--config", str(tmp_path / "job.toml")]
        group = click.Context(main, info_name="resfeat", auto_envvar_prefix="RESFEAT")
        return config.in_force(extract.make_context("extract", list(map(str, words)), group))

    return parse


@pytest.fixture
def refusal(resfeat, tmp_path):
    """The line of a command that is refused before anything is done."""

    def refused(*words, env=None, text=None):
        if text is not None:
            (tmp_path / "job.toml").write_bytes(text.encode() if isinstance(text, str) else text)
            words = [*words, "--config", tmp_path / "job.toml"]
        done = resfeat("extract", "photos", "-o", tmp_path / "out", *words, env=env)
        assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
        assert not (tmp_path / "out").exists() and len(done.stderr.splitlines()) == 1
        return error_of(done.stderr).removeprefix("Error: ").replace(f"{tmp_path}/", "")

    return refused


def values(param):
    if isinstance(param.type, click.Choice):
        choices = list(param.type.choices)[-2:]  # the first of `--runtime` becomes None
        return [choices[0], choices[-1], choices[0]]
    if param.nargs == -1:
        return VALUES[Names]
    return VALUES.get(type(param.type), ("one", "two", "three"))


def given(param, chosen):
    """Words, variables and the text of a file that give an option its value in chosen places."""
    words, variables, text = [], {}, ""
    for place, value in zip(PLACES, values(param), strict=True):
        if place not in chosen:
            continue
        plain = ("," if param.nargs == 1 else " ").join(value) if type(value) is list else value
        if place == "file":  # an option's name has a dash, Python's has none: either will do
            key = param.name.replace("_", "-") if len(chosen) == 1 else param.name
            text = f"{key} = {json.dumps(value)}\n"
        elif place == "environment":
            variables[f"RESFEAT_{param.name.upper()}"] = str(
                int(value) if value is False else plain
            )
        elif isinstance(param, click.Argument):
            words += value
        else:
            words += [param.opts[-1]] if value is True else [param.opts[-1], plain]
    return words, variables, text


def needed(param):
    """What a command line cannot do without, unless it is what is tried."""
    needs = {"sources": ["photos"], "output": ["-o", "out"]}
    return [word for name, words in needs.items() if name != param.name for word in words]


@pytest.mark.parametrize("param", OPTIONS, ids=lambda param: param.name)
def test_of_every_option_the_command_line_counts_first_then_the_environment_then_the_file(
    param, parsed, monkeypatch
):
    for chosen in itertools.chain(*(itertools.combinations(PLACES, n) for n in (1, 2, 3))):
        words, variables, text = given(param, chosen)
        found = parsed([*needed(param), *words], variables, text)
        value = values(param)[PLACES.index(chosen[-1])]
        assert found[param.name] == {"value": value, "from": chosen[-1]}, chosen
        for other in OPTIONS:
            if other is not param and other.name not in ("sources", "output"):
                assert found[other.name]["from"] == "default"
        for name in variables:
            monkeypatch.delenv(name)
    for name in variables:  # an empty one is none
        assert parsed([*needed(param)], {name: ""}, text)[param.name]["from"] == "file"


def test_a_switch_is_turned_off_by_its_other_name(parsed):
    for name in ("update", "retry-failed", "normalize", "dry-run", "quiet"):
        found = parsed(["photos", "-o", "out", f"--no-{name}"], text=f"{name} = true")
        assert found[name.replace("-", "_")] == {"value": False, "from": "command line"}


def test_the_file_is_named_by_a_variable_or_by_the_command_line(parsed, tmp_path):
    (tmp_path / "other.toml").write_text('sources = ["b c"]\noutput = "x"\nworkers = "auto"\n')
    variables = {"RESFEAT_CONFIG": str(tmp_path / "other.toml")}
    found = parsed([], variables)
    assert found["config"] == {"value": str(tmp_path / "other.toml"), "from": "environment"}
    assert found["sources"] == {"value": ["b c"], "from": "file"}
    assert found["workers"] == {"value": None, "from": "file"}
    with pytest.raises(click.MissingParameter):  # of two files, one is read
        parsed(["photos"], variables, "crop = 224")
    assert parsed(["a", "-o", "b"], variables, "crop = 224")["crop"]["value"] == 224


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("modle", "model"), ("max-eror-rate", "max-error-rate"), ("max_eror_rate", "max_error_rate"),
     ("source", "sources"), ("out", "output"), ("Model", "model"), ("talk", "weights"),
     ("--crop", "crop")],
)  # fmt: skip
def test_an_unknown_key_is_one_line_that_names_the_nearest(key, nearest, refusal):
    told = refusal(text=f'model = "resnet18"\n{key} = 1\n')
    if key == "talk":  # is near to nothing
        assert told.startswith("job.toml: unknown key talk: the nearest is ")
    else:
        assert told == f"job.toml: unknown key {key}: the nearest is {nearest}"


def test_a_file_names_no_file_and_no_key_twice(refusal):
    assert refusal(text='config = "a.toml"').startswith("job.toml: unknown key config: ")
    assert "there twice" in refusal(text="max-gone = 0.1\nmax_gone = 0.2")
    assert "is no TOML: Cannot overwrite a value" in refusal(text="crop = 1\ncrop = 2")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("RESFEAT_MODLE", "RESFEAT_MODEL"), ("RESFEAT_MAX_EROR_RATE", "RESFEAT_MAX_ERROR_RATE"),
     ("RESFEAT_EXTRACT_MODEL", "RESFEAT_MODEL"), ("RESFEAT_SOURCE", "RESFEAT_SOURCES"),
     ("RESFEAT_model", "RESFEAT_MODEL"), ("RESFEAT_CONFIGS", "RESFEAT_CONFIG"),
     ("RESFEAT_REPORT", "RESFEAT_")],
)  # fmt: skip
def test_an_unknown_variable_is_one_line_that_names_the_nearest(name, nearest, refusal):
    for value in ("x", ""):
        told = refusal(env={name: value})
        assert told.startswith(f"unknown variable {name}: the nearest is {nearest}")
        assert told.endswith(nearest) or nearest == "RESFEAT_"


def test_variables_of_kubernetes_and_of_other_commands_are_no_mistakes(parsed):
    """A container has these for each service of its namespace, here for two."""
    names = ["RESFEAT_SEARCH_LAYER"]
    for service in ("RESFEAT", "RESFEAT_HEAD_SVC"):
        names += [f"{service}_{end}" for end in (
            "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GCS_SERVER", "PORT", "PORT_8265_TCP",
            "PORT_8265_TCP_PROTO", "PORT_8265_TCP_PORT", "PORT_8265_TCP_ADDR",
        )]  # fmt: skip
    found = parsed(["photos", "-o", "out"], dict.fromkeys(names, "tcp://10.0.0.1:8265"))
    assert {each["from"] for each in found.values()} == {"command line", "default"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resize = 224.5", "resize: give a whole number"),
        ('resize = "224"', "resize: give a whole number"),
        ("crop = true", "crop: give a whole number"),
        ('max-gone = "0.1"', "max-gone: give a number"),
        ("max_gone = false", "max_gone: give a number"),
        ('update = "yes"', "update: give true or false"),
        ("update = 1", "update: give true or false"),
        ("model = 18", "model: give a string"),
        ("model = 2026-11-26", "model: give a string"),
        ('pool = ["max"]', "pool: give a string"),
        ('pool = "sum"', "pool: 'sum' is not one of 'avg', 'max', 'gem'."),
        ("workers = 1.5", 'workers: give a whole number or "auto"'),
        ("workers = true", 'workers: give a whole number or "auto"'),
        ('workers = "many"', "workers: 'many' is neither a number nor auto"),
        ('layers = ["layer3", 4]', "layers: give a list of strings"),
        ("keep = {a = 1}", "keep: give a list of strings"),
        ('sources = [["a"]]', "sources: give a list of strings"),
        ('sources = "s3://me:planted@bucket"', "sources: give a list of strings"),
        ("[runtime]\nworkers = 0", "runtime: give a string"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_and_key(text, told, refusal):
    words = ["--pool", "max"] if text.startswith("[runtime]") else []
    assert refusal(*words, text=text) == f"job.toml: {told}"


def test_a_wrong_value_of_a_variable_names_it(refusal):
    for name, value, told in (
        ("RESFEAT_RESIZE", "wide", "'wide' is not a valid integer."),
        ("RESFEAT_MAX_GONE", "0,1", "'0,1' is not a valid float."),
        ("RESFEAT_UPDATE", "maybe", "'maybe' is not a valid boolean."),
        ("RESFEAT_POOL", "sum", "'sum' is not one of 'avg', 'max', 'gem'."),
        ("RESFEAT_WORKERS", "many", "'many' is neither a number nor auto"),
    ):
        assert refusal(env={name: value}).startswith(f"{name}: {told}")


def test_a_wrong_value_of_the_command_line_is_blamed_on_nothing_else(resfeat):
    done = resfeat("extract", "photos", "-o", "x", "--resize", "wide", env={"RESFEAT_RESIZE": "9"})
    assert done.returncode == 2 and "Invalid value for '--resize': 'wide'" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: resnet18", "is no TOML: "),
        ('{"model": "resnet18"}', "is no TOML: "),
        (b'model = "\xff"', "is no TOML: "),
        (b"PK\x03\x04\x00", "is no TOML: "),
    ],
)
def test_a_file_that_is_no_toml(text, told, refusal):
    assert refusal(text=text).startswith(f"--config job.toml {told}")


def test_a_file_that_cannot_be_read(refusal, tmp_path):
    told = refusal("--config", tmp_path / "no.toml")
    assert told == "cannot read --config no.toml: No such file or directory"
    (tmp_path / "folder").mkdir()
    assert refusal("--config", tmp_path / "folder") == "cannot read --config folder: Is a directory"
    told = refusal(env={"RESFEAT_CONFIG": str(tmp_path / "folder" / "job.toml")})
    assert told == "cannot read --config folder/job.toml: No such file or directory"


def test_other_commands_have_variables_with_their_names_in_them(resfeat, tmp_path):
    wrong = resfeat("search", tmp_path, "x.jpg", env={"RESFEAT_SEARCH_K": "few"})
    assert wrong.returncode == 2
    assert error_of(wrong.stderr) == "Error: RESFEAT_SEARCH_K: 'few' is not a valid integer range."
    assert resfeat("status", "--help", env={"RESFEAT_VERSION": "1"}).stdout.startswith("Usage: ")
    assert resfeat("extract", "--help", env={"RESFEAT_MODLE": "1"}).returncode == 0


def test_the_report_says_what_was_in_force_and_where_it_came_from(resfeat, tmp_path, monkeypatch):
    """Paths in the file are those of the folder that the command is in, not of the file's."""
    write_pictures(tmp_path / "photos", 1)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.toml").write_text(
        'sources = ["photos"]\noutput = "out"\nmodel = "resnet50"\nweights = "random:0"\n'
        "workers = 0\nlog-json = true\nmax-gone = 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    variables = {"RESFEAT_MODEL": "cifar_resnet20", "RESFEAT_LAYERS": "layer3,avgpool",
                 "RESFEAT_CONFIG": "jobs/job.toml", "RESFEAT_VERBOSE": ""}  # fmt: skip
    done = resfeat("extract", "--max-gone", 0.2, env=variables)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out" / "_resfeat" / "runs").iterdir()
    report = json.loads(written.read_bytes())
    assert json.loads(done.stdout.splitlines()[-1])["options"] == report["options"]
    options = report["options"]
    assert set(options) == {param.name for param in extract.params}
    made = {name: (each["value"], each["from"]) for name, each in options.items()}
    assert {name: each for name, each in made.items() if each[1] != "default"} == {
        "sources": (["photos"], "file"),
        "output": ("out", "file"),
        "config": ("jobs/job.toml", "environment"),
        "model": ("cifar_resnet20", "environment"),
        "weights": ("random:0", "file"),
        "layers": (["layer3", "avgpool"], "environment"),
        "workers": (0, "file"),
        "log_json": (True, "file"),
        "max_gone": (0.2, "command line"),
    }
    assert made["max_error_rate"] == (0.05, "default") and made["resize"] == (None, "default")

    # The nearest way to talk counts, whatever is asked for further away.
    quiet = resfeat("extract", "--quiet", env=variables)
    assert (quiet.returncode, quiet.stdout) == (0, "")
    told = resfeat("extract", env={**variables, "RESFEAT_VERBOSE": "1"}).stdout
    assert told.startswith("This run: nothing was left to do") and "Busy seconds" in told


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_passwords_and_signatures_are_not_written_down(resfeat, tmp_path):
    """Of an address that has weights: as a signed one, in all that is told and all that is left."""
    write_pictures(tmp_path / "photos", 1)
    weights = resolve(FeatureSpec(model="cifar_resnet20", weights="random:0"))
    torch.save(dict(weights.tensors), tmp_path / "w.pth")
    serve = functools.partial(Silent, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/w.pth"
        env = {"RESFEAT_WEIGHTS": f"{address}?X-Amz-Signature=planted&x=planted#planted"}
        words = ["extract", tmp_path / "photos", "-o", tmp_path / "out", *SMALL[:2], *SMALL[4:]]
        done = resfeat(*words, "--log-json", env=env)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    options = json.loads(done.stdout.splitlines()[-1])["options"]
    assert options["weights"] == {"value": address, "from": "environment"}
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 4
    assert not [path for path in written if b"planted" in path.read_bytes()]
    assert "planted" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://me:planted@bucket/photos", "s3://bucket/photos"),
        ("az://box/a?sv=2024&sp=r&sig=planted", "az://box/a"),
        ("s3://bucket/a?AWSAccessKeyId=planted", "s3://bucket/a"),
        ("gs://bucket/a?X-Goog-Signature=planted", "gs://bucket/a"),
        ("ray://me:planted@head:10001", "ray://head:10001"),
        ("https://me:planted@host/a.csv?sig=planted", "https://host/a.csv"),
        ("abfss://me:planted@account/a", "abfss://account/a"),
        ("abfss://box@account/a", "abfss://box@account/a"),
        ("s3://bucket/train-00?.tar", "s3://bucket/train-00?.tar"),
        ("photos/me:you@home/a?key=b", "photos/me:you@home/a?key=b"),
    ],
)
def test_what_is_kept_of_an_address(given, kept, parsed):
    assert public(given) == kept
    found = parsed([given, "photos", "-o", given, "--address", given])
    assert found["sources"]["value"] == [kept, "photos"]
    assert found["output"]["value"] == found["address"]["value"] == kept
