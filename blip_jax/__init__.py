"""BLIP in JAX: vision-language pre-training that cleans its own data."""

__version__ = "0.1.0"
