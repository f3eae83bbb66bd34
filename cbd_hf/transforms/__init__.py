"""Trans: structural transformation of an anchor to another shape."""

from cbd_hf.transforms.depth import LayerMap, align_layers, spread
from cbd_hf.transforms.selection import SELECTIONS, EvenEntries, First, MostImportant, Selection, Stride
from cbd_hf.transforms.trans import EXPANSIONS, Expansion, Reader, StateDict, Trans
from cbd_hf.transforms.width import GROWTHS, Growth, WidthMap, resize, resized_eps


__all__ = [
    "EXPANSIONS",
    "GROWTHS",
    "SELECTIONS",
    "EvenEntries",
    "Expansion",
    "First",
    "Growth",
    "LayerMap",
    "MostImportant",
    "Reader",
    "Selection",
    "StateDict",
    "Stride",
    "Trans",
    "WidthMap",
    "align_layers",
    "resize",
    "resized_eps",
    "spread",
]
