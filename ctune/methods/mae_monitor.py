"""What a masked autoencoder makes of held-out images while it trains (mae.md 5 and 7).

Letters: n images, s their side in pixels, L patches.
"""

import functools
import math

import torch
from torch import Tensor

from ctune.events import EventBase, Metrics, Warned
from ctune.image_table import ImageTable
from ctune.masked_autoencoder import MaskedAutoencoder, Reconstruction
from ctune.methods.base import PicturedModule
from ctune.patches import reconstructed_images
from ctune.preprocess import Preprocessing

LOOKS = 100
FEWEST_STEPS = 10
"""Between two looks. One costs a third of a step: its images are at most those of a batch."""
SHOWN_IMAGES = 4
RISE = 1.05
RISEN_LOOKS = 10
COLUMNS = ("Image", "Seen", "Filled in")


class HeldoutReconstruction(PicturedModule):
    """Loss and pictures of a fixed batch under fixed masks, from time to time.

    The training does not depend on it. All processes look alike. What a resumed run must remember
    is in buffers.

    Args:
        pixels: held-out images, uint8 [n, 3, s, s].
        noise: hides their patches, [n, L].
        preprocessing: how the encoder takes images.
        mask_ratio: as in training.
        stage: name of the stage.
        total_steps: its optimizer steps.
        autocast_dtype: as in training.
    """

    pixels: Tensor
    noise: Tensor
    best_loss: Tensor
    train_loss_at_best: Tensor
    risen: Tensor
    shown: Tensor

    def __init__(
        self,
        pixels: Tensor,
        noise: Tensor,
        *,
        preprocessing: Preprocessing,
        mask_ratio: float,
        stage: str,
        total_steps: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self._preprocessing = preprocessing
        self._mask_ratio = mask_ratio
        self._stage = stage
        self._total_steps = total_steps
        self._every = max(FEWEST_STEPS, math.ceil(total_steps / LOOKS))
        self._autocast_dtype = autocast_dtype
        self.register_buffer("pixels", pixels, persistent=False)
        self.register_buffer("noise", noise, persistent=False)
        self.register_buffer("best_loss", torch.full((), math.inf))
        self.register_buffer("train_loss_at_best", torch.full((), math.inf))
        self.register_buffer("risen", torch.zeros((), dtype=torch.int64))
        first = pixels[:SHOWN_IMAGES]
        self.register_buffer("shown", torch.stack([first, first, first], dim=1))

    def look(
        self, step: int, autoencoder: MaskedAutoencoder, train_loss: Tensor
    ) -> list[EventBase]:
        """Return the metric `val_loss` where a look is due, and the warning that it calls for.

        `overfitting`: at ten looks in a row the loss is more than 5 % above its lowest, and that of
        the training images below what it was then.

        Args:
            step: optimizer step just made, from 0.
            autoencoder: in training mode, and left in it.
            train_loss: mean over the last batches.
        """
        if (step + 1) % self._every and step + 1 < self._total_steps:
            return []
        loss, trained = float(self._reconstruct(autoencoder).loss), float(train_loss)
        if loss < float(self.best_loss):
            self.best_loss.fill_(loss)
            self.train_loss_at_best.fill_(trained)
        lowest = float(self.best_loss)
        rises = loss > RISE * lowest and trained < float(self.train_loss_at_best)
        told = int(self.risen) >= RISEN_LOOKS
        if not told:
            self.risen.copy_(self.risen + 1 if rises else torch.zeros_like(self.risen))
        found: list[EventBase] = [
            Metrics(stage=self._stage, step=step, values={"val_loss": loss}),
        ]
        if not told and int(self.risen) == RISEN_LOOKS:
            found.append(
                Warned(
                    code="overfitting",
                    message=f"{self._stage}, step {step}: the loss of held-out images is"
                    f" {loss:.3f} and was {lowest:.3f}, while that of the training images falls",
                    hint="train fewer epochs, crop more, or start from a published encoder: the"
                    " images are few",
                )
            )
        return found

    @torch.no_grad()
    def _reconstruct(self, autoencoder: MaskedAutoencoder) -> Reconstruction:
        """Reconstruct the batch, and keep the pictures of the first images."""
        imgs = self._preprocessing.normalise(self.pixels)
        autoencoder.eval()
        dtype = self._autocast_dtype
        with torch.autocast(imgs.device.type, dtype=dtype, enabled=dtype is not None):
            result: Reconstruction = autoencoder(imgs, self._mask_ratio, self.noise)
        autoencoder.train()
        pred = result.pred[:SHOWN_IMAGES]
        paste = functools.partial(
            reconstructed_images,
            imgs[:SHOWN_IMAGES],
            mask=result.mask[:SHOWN_IMAGES],
            patch_size=autoencoder.patch_size,
        )
        seen = paste(torch.zeros_like(pred), norm_pix_loss=False)
        made = paste(pred, norm_pix_loss=autoencoder.norm_pix_loss)
        self.shown[:, 1] = self._preprocessing.to_pixels(seen)
        self.shown[:, 2] = self._preprocessing.to_pixels(made)
        return result

    def pictures(self) -> list[ImageTable]:
        """Return images, what was visible of them and their reconstructions, by the last look."""
        if self.best_loss.isinf():
            return []
        return [
            ImageTable(
                title="Reconstructions",
                text=f"Held-out images at the end of stage {self._stage}. The encoder saw what"
                " is not grey; the decoder has filled in the rest.",
                columns=COLUMNS,
                images=self.shown.permute(0, 1, 3, 4, 2).cpu().numpy(),
            )
        ]
