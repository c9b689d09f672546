"""Images and features of the splits of one run: decoded once, encoded as serving encodes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctune.backbones import Encoder
from ctune.child import StopRequest
from ctune.data import ImageCache, working_size_px
from ctune.errors import DivergedError
from ctune.evaluate.protocols import LabelledFeatures
from ctune.events import EventBase, StageStarted
from ctune.manifest import Split
from ctune.samplers import Indices
from ctune.store import PackedStore

ENCODE_PIXELS = 256 * 224**2
"""Pixels encoded at a time: 256 images of 224 px."""
ENCODE_IMAGES = 256


class RunImages:
    """The splits of a packed store as a run uses them.

    With `labelled_only`, training images without a label are left out.
    """

    def __init__(
        self,
        store: PackedStore,
        cache_dir: Path,
        *,
        labelled_only: bool,
        emit: Callable[[EventBase], None],
        stop: StopRequest,
    ) -> None:
        self._store = store
        self._cache_dir = cache_dir
        self._labelled_only = labelled_only
        self._emit = emit
        self._stop = stop
        self._caches: dict[tuple[Split, int], ImageCache] = {}

    def labels(self, split: Split) -> Indices:
        """Return the labels [N] of a split's images, -1 for none."""
        labels: Indices = self._store.labels(split)[self._used(split)]
        return labels

    def decoded(self, split: Split, size_px: int) -> ImageCache:
        """Return a split's images, decoded at `size_px`; every image is decoded once per size."""
        key = (split, size_px)
        if key not in self._caches:
            self._emit(StageStarted(stage="caching"))
            self._caches[key] = ImageCache.build(
                self._store,
                self._store.indices(split)[self._used(split)],
                size_px,
                self._cache_dir / f"{split}-{size_px}",
                stop=self._stop,
            )
        return self._caches[key]

    def for_training(self, image_size_px: int) -> ImageCache:
        """Return the training images at the working size of an encoder."""
        return self.decoded("train", working_size_px(self._store.manifest.summary, image_size_px))

    def encode(self, encoder: Encoder, split: Split, device: torch.device) -> Tensor:
        """Return features h [N, D] of a split, float32 on the device, encoder in eval mode.

        Raises:
            DivergedError: a feature is not finite.
        """
        images = self.decoded(split, encoder.image_size_px)
        batch = max(1, min(ENCODE_IMAGES, ENCODE_PIXELS // encoder.image_size_px**2))
        encoder.eval()
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), batch):
                self._stop.check()
                positions = np.arange(start, min(start + batch, len(images)))
                pixels = images.batch(positions).to(device)
                parts.append(encoder(encoder.preprocessing.normalise(pixels)).float())
        features = torch.cat(parts)
        if not bool(torch.isfinite(features).all()):
            raise DivergedError(
                f"the encoder gives vectors of {split} images that are not finite",
                hint="check the encoder's weights, or lower the learning rate",
            )
        return features

    def features(self, encoder: Encoder, split: Split, device: torch.device) -> LabelledFeatures:
        """Return features and labels of a split."""
        labels = torch.from_numpy(self.labels(split)).to(device)
        return LabelledFeatures(self.encode(encoder, split, device), labels)

    def _used(self, split: Split) -> np.ndarray:
        labels = self._store.labels(split)
        if split == "train" and self._labelled_only:
            return labels >= 0
        return np.ones(len(labels), dtype=bool)
