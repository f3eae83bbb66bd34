"""Trans: structural transformation of an anchor to another shape."""

from cbd_hf.transforms.depth import LayerMap, align_layers, spread
from cbd_hf.transforms.trans import EXPANSIONS, Expansion, Trans
from cbd_hf.transforms.width import resize, resized_eps


__all__ = ["EXPANSIONS", "Expansion", "LayerMap", "Trans", "align_layers", "resize", "resized_eps", "spread"]
