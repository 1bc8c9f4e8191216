"""DDPM and DDIM schedulers for Hugging Face Diffusers."""

__all__ = ["__version__"]

__version__ = "0.1.0"
