"""Blocks of MAE-CT's config: the head and its two stages. Never imports torch."""

from typing import Annotated, Literal

from pydantic import Field

from ctune.methods.mae_config import Beta, MaePretrainConfig
from ctune.schedules import scale_learning_rate
from ctune.schema import Fraction, PositiveFloat, Schema

NUM_VIEWS = 2

Momentum = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0)]
Width = Annotated[int, Field(ge=1, le=65536)]


class PretrainingConfig(MaePretrainConfig):
    """Stage 1: the masked autoencoder."""

    recipe: Literal["fb", "jku"] = "jku"
    """As in `mae`; that of MAE-CT's own encoders."""


class HeadConfig(Schema):
    """Projector, predictor and queue. `auto`: as in the model that the job starts from, where the
    job trains its head further, else by the preset."""

    proj_hidden_dim: Width | Literal["auto"] = "auto"
    """Hidden width of the projector; `auto`: 2048, in `small` 512."""
    pred_hidden_dim: Width | Literal["auto"] = "auto"
    """Hidden width of the predictor; `auto`: 4096, in `small` 1024."""
    out_dim: Annotated[int, Field(ge=2, le=65536)] | Literal["auto"] = "auto"
    """Dimensions of the vectors that are compared; `auto`: 256, in `small` 128."""
    queue_size: Annotated[int, Field(ge=2, le=10_000_000)] | Literal["auto"] = "auto"
    """Earlier vectors among which neighbours are looked for, a multiple of `batch_size`; `auto`: up
    to 65536, in `small` 4096, at most half of the training images and at least two batches."""
    queue_init: Literal["random", "prefill"] = "random"
    """What the queue starts with in `head_init`: noise, as published, or vectors of images."""


class NNCLRStageConfig(Schema):
    """What both stages that train the head have."""

    exclude_self: bool = True
    """Whether older vectors of the same image are no neighbours."""
    symmetric: bool = True
    """Both directions between the two views, not only the first view's predictions."""
    transposed: bool = False
    """Compare each prediction with all neighbours, not each neighbour with all predictions."""
    oracle_fraction: Fraction = 1.0
    """Share of a batch for which the variant `oracle` looks at labels."""
    head_weight_decay: Decay = 1e-5
    """Weight decay of the head; not of biases and 1-D parameters."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's two moving averages."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the steps in which the learning rate rises linearly."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patches that the encoder does not see in this stage; 0 is the method."""


class HeadInitConfig(NNCLRStageConfig):
    """Stage 2: the head alone, on the frozen encoder."""

    variant: Literal["nnclr", "no_queue", "oracle"] = "nnclr"
    """`nnclr`: a neighbour in the queue is the positive. `no_queue`: the other view is. `oracle`:
    neighbours of the same class come first, which needs labels."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Passes over the training split."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.15
    """τ: divides the cosine similarities."""
    top_k: Annotated[int, Field(ge=1, le=10_000)] = 1
    """A neighbour is drawn among so many nearest ones."""
    head_base_lr: PositiveFloat = 1e-4
    """Learning rate of the head for 256 views; the rate is this · 2 · `batch_size` / 256."""


class TuningConfig(NNCLRStageConfig):
    """Stage 3: the upper blocks of the encoder and the head. `auto`: the published value for the
    encoder's size and the augmentation, or the one of `small`."""

    variant: Literal["nnclr_ema", "nnclr", "no_queue", "oracle"] = "nnclr_ema"
    """As in `head_init`; `nnclr_ema`: `nnclr`, but a moving average of the projector gives the
    vectors that are looked up."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """Passes over the training split."""
    temperature: Annotated[float, Field(gt=0, le=10)] | Literal["auto"] = "auto"
    """τ: divides the cosine similarities."""
    top_k: Annotated[int, Field(ge=1, le=10_000)] | Literal["auto"] = "auto"
    """A neighbour is drawn among so many nearest ones; `auto`: at most a third of the rows that the
    queue has per class, where classes are known."""
    base_lr: PositiveFloat = 1e-4
    """Learning rate of the encoder for 256 views; the rate is this · 2 · `batch_size` / 256."""
    head_base_lr: PositiveFloat | Literal["auto"] = "auto"
    """The same for the head."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Learning-rate factor per layer below the final norm."""
    weight_decay: Decay = 0.05
    """Weight decay of the encoder; not of biases and 1-D parameters."""
    target_momentum: Momentum | Literal["auto"] = "auto"
    """Share of its old value that the averaged projector keeps in a step, with `nnclr_ema`."""
    ema_momentum: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = "auto"
    """The same for the averaged encoder, which is the result; `auto`: 0.9999, or 1 - 2.5 / steps
    in shorter runs, so that about 8 % of it is the start."""
    num_frozen_blocks: Annotated[int, Field(ge=0, le=1000)] | Literal["auto"] = "auto"
    """Lower blocks that stay as they are, and with one or more what is below them; `auto`: half."""


def peak_lr(base_lr: float, batch_size: int) -> float:
    """Return the learning rate of a batch: both views count."""
    return scale_learning_rate(base_lr, NUM_VIEWS * batch_size)


def averaging_momentum(total_steps: int) -> float:
    """Return the momentum that leaves about e^-2.5 of the start after so many steps, or 0.9999."""
    return max(0.0, min(0.9999, 1 - 2.5 / total_steps))
