"""Options that contradict each other, and the fingerprint."""

from dataclasses import replace

import pytest

from resfeat import ExtractSpec, RuntimeOptions
from resfeat.errors import UsageError
from resfeat.spec import (
    FeatureSpec,
    Identity,
    Preprocessing,
    share_of_a_gpu,
    workers_on_a_gpu,
)

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
        ({"gpus_per_worker": 0.3}, r"0.3 leaves 10% .* unused: give 0.25 \(4 .* or 0.3333 \(3\)"),
        ({"gpus_per_worker": 0.6}, r"0.6 leaves 40% .* unused: give 0.5 \(2 .* or 1 \(1\)"),
        ({"gpus_per_worker": 0.167}, r"0.167 leaves 16% .* give 0.1666 \(6 .* or 0.2 \(5\)"),
        ({"gpus_per_worker": 1e-9}, r"1e-09 leaves 100% .* give 0.0099 .* or 0.01 \(100\)"),
        ({"cpus_per_worker": 0}, "--cpus-per-worker 0"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_runtime_options_that_cannot_be(options, told):
    with pytest.raises(UsageError, match=told):
        RuntimeOptions(**options)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.125, 0.1428, 0.2, 0.25, 0.33, 1 / 3, 0.5, 1])
def test_shares_that_use_up_a_gpu(share):
    assert RuntimeOptions(gpus_per_worker=share).gpus_per_worker == share


def test_what_is_offered_in_the_place_of_a_share_is_taken_and_fits_by_rays_count():
    """Ray rounds to ten-thousandths."""
    for workers in range(1, 101):
        share = share_of_a_gpu(workers)
        RuntimeOptions(gpus_per_worker=share)
        assert workers_on_a_gpu(share) == workers
        assert workers * round(share * 10_000) <= 10_000


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
