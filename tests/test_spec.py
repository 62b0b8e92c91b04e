"""Options that contradict each other, and the fingerprint."""

from dataclasses import replace

import pytest

from resfeat import ExtractSpec, RuntimeOptions
from resfeat.errors import UsageError
from resfeat.spec import FeatureSpec, Identity, Preprocessing

PREPROCESSING = Preprocessing(
    resize=232, crop=224, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
)
IDENTITY = Identity(model="resnet50", weights_digest="ab" * 32, preprocessing=PREPROCESSING)


def test_everything_in_the_identity_changes_the_fingerprint():
    changed = {
        "model": "resnet18",
        "weights_digest": "cd" * 32,
        "preprocessing": replace(PREPROCESSING, resize=256),
        "decode": "pillow",
        "pixel_policy": "0",
        "layers": ("layer4",),
        "pool": "max",
        "normalize": True,
        "precision": "bf16",
        "dtype": "float16",
    }
    assert set(changed) == set(IDENTITY.__dataclass_fields__)
    prints = {replace(IDENTITY, **{name: value}).fingerprint for name, value in changed.items()}
    assert len(prints | {IDENTITY.fingerprint}) == len(changed) + 1


def test_the_fingerprint_of_a_dataset_that_was_made_before_is_still_its_own():
    made_before = replace(IDENTITY, pixel_policy="2")
    assert (
        made_before.fingerprint
        == "a13589a7f239b507850ed8c32cbd02170220d8781173a2d3cf62d89b1b5b43b2"
    )


def test_an_identity_is_asked_for_again_as_it_was():
    theirs = replace(IDENTITY, model="torchvision:alexnet", pool="own", normalize=True)
    asked = FeatureSpec.of(theirs, "random:0")
    assert (asked.model, asked.pool, asked.normalize) == (theirs.model, None, True)
    assert FeatureSpec.of(replace(IDENTITY, pool="gem"), "random:0").pool == "gem"


def test_an_identity_survives_json():
    assert Identity.from_dict(IDENTITY.as_dict()) == IDENTITY


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": -1}, "--workers -1"),
        ({"workers": 0, "address": "auto"}, "--workers 0 .* --address"),
        ({"workers": 0, "gpus_per_worker": 0.5}, "--gpus-per-worker 0 or 1"),
        ({"gpus_per_worker": 2}, "--gpus-per-worker 2"),
        ({"gpus_per_worker": -0.1}, "--gpus-per-worker -0.1"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker 0"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_runtime_options_that_cannot_be(options, told):
    with pytest.raises(UsageError, match=told):
        RuntimeOptions(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sources": ()}, "no source"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"label_from": "name"}, "--label-from name"),
        ({"max_error_rate": 1.5}, "--max-error-rate 1.5"),
        ({"max_error_rate": float("nan")}, "--max-error-rate nan"),
    ],
)
def test_specs_that_cannot_be(options, told):
    with pytest.raises(UsageError, match=told):
        ExtractSpec(**{"sources": ("photos",), "output": "out", **options})
