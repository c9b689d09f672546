"""The stage `probe`: cross-entropy on a linear layer over the frozen encoder (lacvit.md 2.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctune.augment import ViewConfig, ViewPipeline
from ctune.backbones import Encoder
from ctune.methods.base import (
    Batch,
    FeatureSource,
    ImageSource,
    Method,
    RunContext,
    Stage,
    StagePlan,
    StepOutput,
)
from ctune.methods.probe_config import ProbeConfig
from ctune.optim import make_optimizer
from ctune.schedules import cosine_to_cube
from ctune.seeding import make_generator


class LinearProbe(Method):
    """A linear classifier on features h [B, D] of a frozen encoder, C classes.

    With `encoder` and `views` the inputs are uint8 images that are augmented and encoded without
    gradient; without them they are the features themselves.
    """

    def __init__(
        self,
        classifier: nn.Linear,
        *,
        encoder: Encoder | None = None,
        views: ViewPipeline | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self._frozen = (encoder, views)  # a tuple, so that train() leaves the encoder in eval mode

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the mean cross-entropy of one batch."""
        logits = self.classifier(self._features(batch, generator))
        loss = F.cross_entropy(logits.float(), batch.labels)
        accuracy = (logits.detach().argmax(dim=1) == batch.labels).float().mean()
        return StepOutput(loss=loss, metrics={"train_top1": accuracy})

    def _features(self, batch: Batch, generator: torch.Generator) -> Tensor:
        encoder, views = self._frozen
        if encoder is None or views is None:
            return batch.inputs
        encoder.eval()
        with torch.no_grad():
            pixels = views(batch.inputs, batch.sizes_px, generator, shard=batch.shard)
            features: Tensor = encoder(pixels)
        return features


def make_classifier(
    embed_dim: int, num_classes: int, *, seed: int, std: float | None = 0.02
) -> nn.Linear:
    """Return the head: bias 0, weight truncated normal of `std`, Xavier-uniform for None."""
    classifier = nn.Linear(embed_dim, num_classes)
    with torch.no_grad():
        generator = make_generator(seed, "classifier")
        if std is None:
            nn.init.xavier_uniform_(classifier.weight, generator=generator)
        else:
            nn.init.trunc_normal_(classifier.weight, std=std, generator=generator)
        classifier.bias.zero_()
    return classifier


def probe_plan(config: ProbeConfig, context: RunContext, classifier: nn.Linear) -> StagePlan:
    """Plan the stage `probe`: the linear head on the encoder as it then is."""
    num_images = len(context.train_labels)
    sampler = config.sampler(num_images, seed=context.seed)

    def start() -> Stage:
        context.encoder.requires_grad_(False)
        context.encoder.eval()
        labels = torch.from_numpy(context.train_labels)
        source: ImageSource | FeatureSource
        if config.augment == "none":
            source = FeatureSource(context.encode_train(), labels.to(context.device))
            method = LinearProbe(classifier)
        else:
            source = ImageSource(context.train_images(), labels, context.device)
            views = ViewConfig(
                size_px=context.encoder.image_size_px,
                scale=(config.crop_scale_min, 1.0),
                mean=context.encoder.mean,
                std=context.encoder.std,
            )
            method = LinearProbe(classifier, encoder=context.encoder, views=ViewPipeline(views))
        return Stage(
            method=method,
            source=source,
            sampler=sampler,
            epochs=config.epochs,
            optimizer=make_optimizer(
                "sgd",
                [{"params": [*classifier.parameters()], "weight_decay": config.weight_decay}],
                lr=config.lr,
                momentum=config.momentum,
            ),
            lr_at=cosine_to_cube(
                lr=config.lr, lr_decay_rate=config.lr_decay_rate, epochs=config.epochs
            ).in_steps(len(sampler), per_epoch=True),
        )

    planned = config.planned(num_images)
    return StagePlan.of(planned, start, finishing=True, trains_encoder=False)
