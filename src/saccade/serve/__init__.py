"""Pretrained models for many requests at once (`pip install saccade[serve]`): an engine, and a server around it."""

from saccade.serve.engine import Engine, Request

__all__ = ["Engine", "Request"]
