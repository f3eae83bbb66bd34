"""A teacher's predictions on disk, so that training needs no teacher."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from cbd_hf.distillation.cache.build import CacheReport, build_cache
    from cbd_hf.distillation.cache.manifest import CacheManifest, CacheSettings
    from cbd_hf.distillation.cache.reader import TeacherCache

# Imported when first used: reading needs far less than building, and every worker of a DataLoader reads.
_MODULES = {
    "CacheManifest": "manifest",
    "CacheReport": "build",
    "CacheSettings": "manifest",
    "TeacherCache": "reader",
    "build_cache": "build",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = ["CacheManifest", "CacheReport", "CacheSettings", "TeacherCache", "build_cache"]
