"""Evermesh: a distributed training runtime and launcher for large language models."""

__version__ = "0.1.0"
