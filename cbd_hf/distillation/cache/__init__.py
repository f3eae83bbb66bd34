"""A teacher's predictions on disk, so that training needs no teacher."""

from __future__ import annotations

from cbd_hf.distillation.cache.build import CacheReport, build_cache
from cbd_hf.distillation.cache.manifest import CacheManifest, CacheSettings
from cbd_hf.distillation.cache.reader import TeacherCache


__all__ = ["CacheManifest", "CacheReport", "CacheSettings", "TeacherCache", "build_cache"]
