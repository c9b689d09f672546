"""A run's images of which only a sample is decoded and encoded: it stands for all of them."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctune.backbones import Encoder
from ctune.data import ImageCache, Triple
from ctune.device import synchronize
from ctune.features import RunImages
from ctune.manifest import Split
from ctune.rundir import RunDir
from ctune.samplers import Indices
from ctune.store import PackedStore

ENCODING_S = 3.0
DECODING_S = 2.0
SAMPLE_IMAGES = 256
FIRST_DECODED, FIRST_ENCODED = 16, 2
"""Images that show how many more there is time for."""


class RepeatedImages(ImageCache):
    """A cache of N images of which only the first ones are decoded; they stand for the others."""

    def __init__(self, sample: ImageCache, labels: Indices) -> None:
        self._sample = sample
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size_px(self) -> int:
        """See the base class."""
        return self._sample.size_px

    def batch(self, positions: Sequence[int] | Indices) -> Tensor:
        """See the base class."""
        return self._sample.batch(np.asarray(positions) % len(self._sample))

    def sizes(self, positions: Sequence[int] | Indices) -> Tensor:
        """See the base class."""
        return self._sample.sizes(np.asarray(positions) % len(self._sample))

    def pixel_statistics(self) -> tuple[Triple, Triple]:
        """See the base class."""
        return self._sample.pixel_statistics()


class SampledImages(RunImages):
    """A run's images, of which a sample is decoded and encoded, and how fast that went."""

    def __init__(self, store: PackedStore, run_dir: RunDir, **options: Any) -> None:
        super().__init__(store, run_dir.cache, **options)
        self.decode_images_per_s = 0.0
        self.encode_images_per_s = 0.0
        self.encoded = 0
        """How often all images of a split were asked for."""

    def decoded(self, split: Split, size_px: int) -> ImageCache:
        """Return a sample of a split's images at `size_px` in the place of all of them."""
        key = (split, size_px)
        if key not in self._caches:
            numbers = self.numbers(split)
            sample = self._decode(split, numbers[:FIRST_DECODED], size_px)
            count = min(len(numbers), SAMPLE_IMAGES, int(DECODING_S * self.decode_images_per_s))
            if count > FIRST_DECODED:
                at = np.linspace(0, len(numbers) - 1, count).astype(np.int64)
                sample = self._decode(split, numbers[at], size_px)
            self._caches[key] = RepeatedImages(sample, self.labels(split))
        return self._caches[key]

    def _decode(self, split: Split, numbers: Indices, size_px: int) -> ImageCache:
        folder = self._cache_dir / f"{split}-{size_px}-{len(numbers)}"
        begun = time.perf_counter()
        cache = ImageCache.build(self._store, numbers, size_px, folder, stop=self._stop)
        self.decode_images_per_s = len(numbers) / (time.perf_counter() - begun)
        return cache

    def encode(
        self,
        encoder: Encoder,
        split: Split,
        device: torch.device,
        *,
        positions: Indices | None = None,
    ) -> Tensor:
        """Return features of a sample in the place of all; see the base class."""
        self.encoded += 1
        labels = self.labels(split)
        most = min(len(labels), SAMPLE_IMAGES)
        count, ends = min(FIRST_ENCODED, most), time.perf_counter() + ENCODING_S
        while True:
            begun = time.perf_counter()
            found = super().encode(encoder, split, device, positions=np.arange(count))
            synchronize(device)
            took_s = time.perf_counter() - begun
            self.encode_images_per_s = count / took_s
            if count == most or time.perf_counter() + 4 * took_s > ends:
                break
            count = min(4 * count, most)
        wanted = np.arange(len(labels)) if positions is None else positions
        return found[torch.from_numpy(wanted % count).to(device)]
