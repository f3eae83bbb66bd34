"""Layouts learned from the architectures themselves, and proved before they are used."""

from cbd_hf.families.compatibility import check_same_family
from cbd_hf.families.learn import Proof, get_family, learn


__all__ = ["Proof", "check_same_family", "get_family", "learn"]
