"""isofusion: scaling laws for native multimodal models, from data to a recommendation."""

__version__ = "0.1.0"
