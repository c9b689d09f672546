"""What must fit together in a whole run."""

from ctune.config import RunConfig, check
from ctune.manifest import DatasetSummary
from tests.squares import tiny_config


def summary() -> DatasetSummary:
    return DatasetSummary.model_validate(
        {
            "num_images": 40,
            "splits": {"train": 40},
            "classes": ["a", "b"],
            "class_counts": {"train": {"a": 20, "b": 20}},
            "width_px": [16, 16],
            "height_px": [16, 16],
            "split_origin": "given",
        }
    )


def gpu_faults(method: str, gpus: int) -> list[str]:
    config = RunConfig.model_validate(tiny_config(method, resources={"gpus": gpus}))
    return [f.pointer for f in check(config, summary()) if f.code == "batch_not_divisible"]


def test_gpus_share_the_batches_of_a_contrast_equally() -> None:
    """The batch of 12 does not divide by 5 or 8; the probe's batch of 16 need not divide."""
    assert [gpu_faults("lacvit", gpus) for gpus in (0, 1, 2, 3, 12)] == [[]] * 5
    assert gpu_faults("lacvit", 5) == gpu_faults("lacvit", 8) == ["/method/contrastive/batch_size"]
    assert gpu_faults("linear_probe", 7) == []


def test_the_fault_names_a_batch_that_fits() -> None:
    config = RunConfig.model_validate(tiny_config("lacvit", resources={"gpus": 5}))
    (fault,) = check(config, summary())
    assert fault.detail.startswith("12 images do not divide by the 5 GPUs of the run. Use 10,")
