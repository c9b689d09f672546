"""A measurement with round numbers, for tests of estimates."""

from typing import Any

from ctune.estimate import MeasuredStage, Measurement

STAGES = (
    MeasuredStage(
        name="contrastive",
        step_s=0.5,
        encodes_train=False,
        trains_encoder=True,
        checkpoint_bytes=1000,
    ),
    MeasuredStage(
        name="probe",
        step_s=0.01,
        encodes_train=True,
        trains_encoder=False,
        checkpoint_bytes=400,
    ),
)


def measurement(**changes: Any) -> Measurement:
    """Return what a calibration of `lacvit` might have found."""
    values: dict[str, Any] = {
        "device": "cpu x86_64",
        "at": 1_790_000_000.5,
        "image_size_px": 32,
        "start_s": 7.0,
        "decode_images_per_s": 100.0,
        "encode_images_per_s": 50.0,
        "stages": list(STAGES),
        "model_bytes": 300,
        "memory_bytes": 5000,
        "remarks": ["on a quiet machine"],
    }
    return Measurement(**(values | changes))
