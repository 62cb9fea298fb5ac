"""Mechanisms inside pretrained Hugging Face models (`pip install saccade[hf]`): `apply`, and the handle it returns."""

from saccade.hf.handle import Handle, apply

__all__ = ["Handle", "apply"]
