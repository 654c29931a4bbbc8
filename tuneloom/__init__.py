"""Tuneloom: from raw records and a base model to a specialised model its owner can trust."""

__version__ = "0.1.0"
