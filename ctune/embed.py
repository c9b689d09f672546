"""From a model directory to vectors and classes: the code that export checks and that serves.

Letters: n images, D dimensions, C classes, s side of the input in pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ctune import model_dir as names
from ctune.backbones import Encoder, build_encoder
from ctune.encoders import FileEncoder
from ctune.errors import EncoderError
from ctune.model_dir import ModelInfo, check_files, read_info
from ctune.preprocess import Preprocessing
from ctune.schema import Schema

BATCH = 64
Images = Sequence[Image.Image] | Sequence[Tensor] | Tensor
"""RGB images, or uint8 [3, s, s] each as `LoadedModel.prepare` makes them."""
MIN_COSINE = 0.999
EPS = 1e-12


class Verification(Schema):
    """How far a loaded model is from the reference vectors of its export."""

    num_images: int
    min_cosine: float
    """Smallest cosine between a vector and its reference."""
    max_abs_diff: float
    """Largest difference of two coordinates."""


class LoadedModel:
    """An exported encoder, ready to embed; made by `load_model`."""

    def __init__(
        self,
        encoder: Encoder,
        info: ModelInfo,
        *,
        model_dir: Path,
        classifier: tuple[Tensor, Tensor] | None,
        device: torch.device,
    ) -> None:
        self.info = info
        self.device = device
        self.preprocessing: Preprocessing = encoder.preprocessing
        self._encoder = encoder.to(device).eval().requires_grad_(False)
        self._model_dir = model_dir
        self._classifier = classifier and tuple(part.to(device) for part in classifier)

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of `classify`; none for a model without a classifier."""
        return self.info.classes if self._classifier else None

    @property
    def size_bytes(self) -> int:
        """Memory of weights and buffers."""
        tensors = [*self._encoder.parameters(), *self._encoder.buffers(), *(self._classifier or ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return an RGB image as uint8 [3, s, s]."""
        return self.preprocessing.to_uint8(image)

    def embed(self, images: Images, *, normalize: bool = False) -> Tensor:
        """Return vectors, float32 [n, D] on the CPU.

        Args:
            images: n of them; encoded in batches of 64.
            normalize: scale each vector to unit length; a vector of zeros stays as it is.

        Raises:
            EncoderError: ``not_finite``: the model gives NaN or infinity.
            ValueError: images of another mode, shape or type.
        """
        vectors = self._features(images).cpu()
        return F.normalize(vectors, dim=1, eps=EPS) if normalize else vectors

    def classify(self, images: Images) -> Tensor:
        """Return the probabilities of the classes, float32 [n, C] on the CPU.

        Raises:
            EncoderError: ``no_classifier``; otherwise as `embed`.
        """
        return self.probabilities(self._features(images))

    def probabilities(self, vectors: Tensor | NDArray[np.float32]) -> Tensor:
        """Return the probabilities [n, C] that belong to vectors [n, D] of `embed`, not normalised.

        Raises:
            EncoderError: ``no_classifier``: the model has none.
        """
        if self._classifier is None:
            raise EncoderError(
                "the model has no classifier",
                hint="train with a method that makes one, for example lacvit",
                code="no_classifier",
            )
        weight, bias = self._classifier
        logits = F.linear(torch.as_tensor(vectors).to(self.device), weight, bias)
        return logits.softmax(dim=1).cpu()

    def verify(self) -> Verification:
        """Embed the reference images and compare with their vectors.

        Raises:
            EncoderError: ``vectors_differ``: a cosine is not above 0.999.
        """
        wanted = load_file(self._model_dir / names.VECTORS)["vectors"]
        vectors = self.embed(read_reference_images(self._model_dir))
        if vectors.shape != wanted.shape:
            raise EncoderError(
                f"{names.VECTORS} is {list(wanted.shape)}, the model gives {list(vectors.shape)}",
                hint="export the model again",
                code="vectors_differ",
            )
        cosine = _cosines(vectors, wanted).min().item()
        found = Verification(
            num_images=len(wanted),
            min_cosine=cosine,
            max_abs_diff=(vectors - wanted).abs().max().item(),
        )
        if not cosine > MIN_COSINE:
            raise EncoderError(
                f"the model does not give its reference vectors: the smallest cosine is"
                f" {cosine:.6f}, the largest difference {found.max_abs_diff:.3g}",
                hint="a different timm or torch may build another network from this model;"
                f" it was made with {self.info.provenance.get('versions')}",
                code="vectors_differ",
            )
        return found

    @torch.inference_mode()
    def _features(self, images: Images) -> Tensor:
        parts = []
        for start in range(0, len(images), BATCH):
            chunk = [
                self.prepare(image) if isinstance(image, Image.Image) else image
                for image in images[start : start + BATCH]
            ]
            pixels = self.preprocessing.normalise(torch.stack(chunk).to(self.device))
            parts.append(self._encoder(pixels).float())
        if not parts:
            return torch.zeros(0, self.info.embed_dim)
        vectors = torch.cat(parts)
        if not bool(vectors.isfinite().all()):
            raise EncoderError(
                "the model gives vectors that are not finite",
                hint="its training diverged; use another model",
                code="not_finite",
            )
        return vectors


def load_model(model_dir: Path, *, device: str | torch.device | None = "cpu") -> LoadedModel:
    """Load an exported model; every file is compared with its sha256 first.

    `device` None takes the GPU where there is one.

    Raises:
        EncoderError: ``model_damaged``: a file is missing or changed; otherwise as
            `ctune.backbones.build_encoder`.
    """
    info = read_info(model_dir)
    check_files(model_dir, info)
    config = FileEncoder(path=str(model_dir))
    encoder = build_encoder(config, pool="auto", encoder_dir=None, allow_noncommercial_weights=True)
    classifier = None
    if info.head is not None:
        stored = load_file(model_dir / names.head_file(names.CLASSIFIER))
        classifier = (stored["weight"], stored["bias"])
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        # A patch embedding is a convolution; TF32 would cost the agreement with timm on a CPU.
        torch.backends.cudnn.allow_tf32 = False
    return LoadedModel(
        encoder, info, model_dir=model_dir, classifier=classifier, device=torch.device(device)
    )


def read_reference_images(model_dir: Path) -> list[Image.Image]:
    """Return the reference images of a model directory, in the order of their vectors."""
    images = []
    for path in sorted((model_dir / names.REFERENCE).glob("*.png")):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images


def _cosines(vectors: Tensor, wanted: Tensor) -> Tensor:
    """Cosines of pairs of rows; two rows of zeros agree."""
    cosines = F.cosine_similarity(vectors.double(), wanted.double(), dim=1)
    both_zero = (vectors == 0).all(dim=1) & (wanted == 0).all(dim=1)
    return torch.where(both_zero, 1.0, cosines)
