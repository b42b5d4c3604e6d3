"""Tiny models of every family, and the outcome when EVA initialises their adapters."""

from .family import Family
from .language import LANGUAGE
from .others import OTHERS

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {**LANGUAGE, **OTHERS}
