"""What an estimate makes of a config, a data set and a measurement."""

import subprocess
import sys
from typing import Any

import pytest

from ctune.config import RunConfig, resolve
from ctune.estimate import calibration_key, estimate
from ctune.evaluate.probe_protocol import ProbeProtocol, mae_ct_protocol, mae_protocol
from tests.measurements import measurement
from tests.service.rows import summary
from tests.squares import tiny_config

RESNET = {"source": "timm", "name": "resnet18", "pretrained": False}
DATA = summary({"blue": 20, "red": 20}, held_out=5)  # 40 training and 10 test images, 40 x 24 px


def config(**changes: Any) -> RunConfig:
    return resolve(RunConfig.model_validate(tiny_config() | changes))


def lacvit(**contrastive: Any) -> RunConfig:
    stage = {"epochs": 3, "batch_size": 12, "batch_sampler": "random"} | contrastive
    probe = {"epochs": 3, "batch_size": 16}
    return config(method={"name": "lacvit", "contrastive": stage, "probe": probe})


def test_without_a_measurement_steps_passes_and_decoded_images_are_known() -> None:
    found = estimate(lacvit(), DATA, image_size_px=16, measurement=None)
    assert found["stages"] == [
        {
            "name": "contrastive",
            "total_steps": 3 * 3,
            "image_passes": 3 * 3 * 12 * 2,
            "images_per_s": None,
            "duration_s": None,
        },
        {
            "name": "probe",
            "total_steps": 3 * 3,
            "image_passes": 40,
            "images_per_s": None,
            "duration_s": None,
        },
    ]
    assert found["image_passes"] == 216 + 40
    # 19 px for training (8/7 of 16), 16 px for scoring train and test
    decoded = 3 * (40 * 19**2 + 50 * 16**2)
    assert found["disk_bytes"] == {
        "decoded_images": decoded,
        "checkpoints": None,
        "model": None,
        "total": None,
    }
    assert found["memory_bytes"] is found["duration_s"] is found["duration"] is None
    unknown = estimate(lacvit(), DATA, image_size_px=None, measurement=None)
    assert unknown["disk_bytes"]["decoded_images"] is None


def test_time_is_steps_and_images_over_the_measured_pace() -> None:
    looks = {"every_steps": 4, "max_images": 10}
    run = lacvit().model_copy(
        update={"evaluation": config(evaluation={"online": looks}).evaluation}
    )
    found = estimate(run, DATA, image_size_px=None, measurement=measurement())
    contrastive, probe = found["stages"]
    assert contrastive["duration_s"] == pytest.approx(9 * 0.5)
    assert contrastive["images_per_s"] == pytest.approx(216 / 4.5)
    assert probe["duration_s"] == pytest.approx(9 * 0.01 + 40 / 50)
    parts = found["duration"]
    assert parts["start_s"] == 7.0
    # 32 px encoder: 37 px for training, 32 px for scoring
    assert parts["decoding_s"] == pytest.approx((40 + 40 + 10) / 100)
    assert parts["training_s"] == pytest.approx(4.5 + 0.89)
    # before and after: train and test; looks at the steps 0, 4, 8, 9 at 2 x 10 images each
    assert parts["evaluation_s"] == pytest.approx((2 * 50 + 4 * 20) / 50)
    named = [parts[f"{part}_s"] for part in ("start", "decoding", "training", "evaluation")]
    assert found["duration_s"] == pytest.approx(sum(named))
    assert found["memory_bytes"] == 5000


@pytest.mark.parametrize(("recipe", "epochs"), [("lacvit", 100), ("mae_ct", 50), ("mae", 90)])
def test_a_probe_on_random_crops_encodes_every_epoch(recipe: str, epochs: int) -> None:
    given = {"protocols": ["linear_probe"], "linear_probe": {"protocol": "full", "recipe": recipe}}
    of_crops, cached, not_asked = (
        estimate(
            lacvit().model_copy(update={"evaluation": config(evaluation=asked).evaluation}),
            DATA,
            image_size_px=None,
            measurement=measurement(),
        )["duration"]["evaluation_s"]
        for asked in (given, {"protocols": ["linear_probe"]}, given | {"protocols": ["knn"]})
    )
    assert not_asked == cached
    assert of_crops - cached == pytest.approx(2 * epochs * 40 / 50)
    published = {"lacvit": ProbeProtocol(), "mae_ct": mae_ct_protocol(full=True)}
    assert published.get(recipe, mae_protocol()).epochs == epochs


def test_random_views_of_held_out_images_are_decoded_and_encoded() -> None:
    """10 held-out images: 4 views of 6 of them, and their decoding at 37 px."""
    plain, viewed = (
        estimate(
            lacvit().model_copy(update={"evaluation": config(evaluation=asked).evaluation}),
            DATA,
            image_size_px=None,
            measurement=measurement(),
        )["duration"]
        for asked in (
            {"protocols": ["knn"]},
            {
                "protocols": ["knn", "augmentation_invariance"],
                "augmentation_invariance": {"num_views": 4, "num_images": 6},
            },
        )
    )
    assert viewed["evaluation_s"] - plain["evaluation_s"] == pytest.approx(2 * 4 * 6 / 50)
    assert viewed["decoding_s"] - plain["decoding_s"] == pytest.approx(10 / 100)


def test_fine_tunings_cost_three_encodings_per_image() -> None:
    asked = {"finetune_shares": [0.1, 0.5], "finetune_epochs": 20}
    plain, tuned = (
        estimate(
            lacvit().model_copy(update={"evaluation": config(evaluation=given).evaluation}),
            DATA,
            image_size_px=None,
            measurement=measurement(),
        )["duration"]["evaluation_s"]
        for given in ({}, {"protocols": ["low_shot"], "low_shot": asked})
    )
    assert tuned - plain == pytest.approx(2 * 3 * 0.6 * 40 * 20 / 50)


def test_several_gpus_share_what_is_encoded() -> None:
    run = lacvit()
    four = run.resources.model_copy(update={"gpus": 4})
    one, several = (
        estimate(given, DATA, image_size_px=None, measurement=measurement())["duration"]
        for given in (run, run.model_copy(update={"resources": four}))
    )
    assert several["evaluation_s"] == pytest.approx(one["evaluation_s"] / 4)
    assert several["training_s"] == pytest.approx(one["training_s"] - 40 / 50 * 3 / 4)
    assert several["decoding_s"] == one["decoding_s"], "one of them decodes for all"


def test_disk_holds_decoded_images_checkpoints_and_the_model() -> None:
    found = estimate(lacvit(), DATA, image_size_px=None, measurement=measurement())["disk_bytes"]
    # the ends of both stages, the best of the first, and the two newest
    assert found["checkpoints"] == (1000 + 400) + 1000 + 2 * 1000
    assert found["model"] == 300
    assert found["decoded_images"] == 3 * (40 * 37**2 + 50 * 32**2)
    assert found["total"] == sum(found[kind] for kind in ("decoded_images", "checkpoints", "model"))
    blind = config(evaluation={"online": {"every_steps": None}}).evaluation
    run = lacvit().model_copy(update={"evaluation": blind})
    found = estimate(run, DATA, image_size_px=None, measurement=measurement())["disk_bytes"]
    assert found["checkpoints"] == (1000 + 400) + 2 * 1000, "no looks, no best one"


def test_nothing_held_out_is_not_scored() -> None:
    alone = DATA.model_copy(update={"splits": {"train": 40}})
    blind = config(evaluation={"online": {"every_steps": None}}).evaluation
    run = lacvit().model_copy(update={"evaluation": blind})
    found = estimate(run, alone, image_size_px=None, measurement=measurement())
    assert found["duration"]["evaluation_s"] == 0
    assert found["duration"]["decoding_s"] == pytest.approx(80 / 100)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (lacvit(epochs=9), True),
        (lacvit(epochs=9, warmup_epochs=3), True),
        (lacvit().model_copy(update={"seed": 5}), True),
        (lacvit().model_copy(update={"evaluation": config(evaluation={}).evaluation}), True),
        (lacvit(batch_size=16), False),
        (lacvit(num_views=3), False),
        (config(method=lacvit().method.model_dump(), encoder=RESNET), False),
        (config(method=lacvit().method.model_dump(), resources={}), False),
    ],
    ids=["epochs", "warm-up", "seed", "evaluation", "batch", "views", "encoder", "device"],
)
def test_what_changes_the_time_of_a_step_needs_a_measurement_of_its_own(
    changed: RunConfig, same: bool
) -> None:
    assert (calibration_key(changed, DATA) == calibration_key(lacvit(), DATA)) is same


def test_other_images_need_a_measurement_of_their_own() -> None:
    larger = DATA.model_copy(update={"width_px": (32, 640)})
    assert calibration_key(lacvit(), larger) != calibration_key(lacvit(), DATA)


def test_it_never_imports_torch() -> None:
    code = "import sys, ctune.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
