"""ctune: contrastive tuning of image encoders. Importing this package never imports torch."""

__version__ = "0.1.0"
