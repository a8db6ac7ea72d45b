"""FastShift: fast one-shot neural architecture search by Supernet Shifting."""

from __future__ import annotations

__version__ = "0.1.0"
