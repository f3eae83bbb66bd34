"""Settings for all tests: offline, no telemetry, few threads; and where the optional real material is."""

from __future__ import annotations

import os


os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true",
        "CBD_LAYOUT_CACHE": "off",  # layouts are learned, not remembered from other code
    }
)
