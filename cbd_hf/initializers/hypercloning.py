"""HyperCloning (arXiv 2409.12903): a wider model out of copies of the smaller anchor."""

from __future__ import annotations

from dataclasses import replace

from cbd_hf.initializers.base import Blueprint, TensorSource
from cbd_hf.layout.axes import HEAD_ROLES
from cbd_hf.transforms import Trans


def hypercloning(blueprint: Blueprint) -> TensorSource:
    """
    The smaller anchor cloned into a wider one of the same depth: exactly the same function.

    The rule (arXiv 2409.12903, symmetric tiling without noise): the stream holds n copies of the anchor's. What
    writes into it is repeated, what reads it is repeated and divided by n; gains and shifts are repeated. Heads are
    repeated whole and FFN units likewise, and what reads them is divided by the number of copies.

    Where we go beyond the published code, each exact:

    * a tied head would be divided together with the embedding; we divide the final norm's gain and shift instead,
      where the code wraps the head in another module or unties it, and so leaves the stock class;
    * query heads are repeated within their key/value head, so grouped-query attention is kept as well;
    * heads and FFN units may grow by any factor: the copies of each are counted. Only the stream needs a whole one.

    Raises:
        ValueError: the depths differ; the hidden size is no multiple; something else than the width must change.
    """
    clone = replace(blueprint.small, growth="clone")
    _check(clone)

    def splits(name: str) -> bool:
        spec = blueprint.family.spec(name)
        last_norm = spec.norm is not None and spec.norm.before_tied_head
        if last_norm or spec.axes and spec.axes[0].side == "in":
            return False  # copies among the rows share a weight, so all must be at hand to be counted
        return clone.splits_by_rows(name)

    return TensorSource(lambda name, rows: clone.tensor(name, rows=rows), splits, (clone,))


def _check(clone: Trans) -> None:
    source, target, family = clone.source, clone.target, clone.family
    instead = "initializer='expand', which takes any size."
    if source.layers != target.layers:
        raise ValueError(
            f"Cloning keeps the depth: the smaller anchor has {source.layers} layers, the target {target.layers}. "
            f"Choose a config with {source.layers} layers, initializer='stack', or {instead}"
        )
    if target.hidden % source.hidden:
        raise ValueError(
            f"Cloning needs a hidden size that is a multiple of the smaller anchor's {source.hidden}, got "
            f"{target.hidden}. Choose such a config, or {instead}"
        )
    groups = "query heads per key/value head"
    want = target.widths | {groups: target.group}
    for name, count in (source.widths | {groups: source.group}).items():
        if want[name] < count:
            raise ValueError(
                f"Cloning only adds, but {name} would go from {count} to {want[name]}. Choose a config with at least "
                f"{count}, or {instead}"
            )
    if family.alibi and source.heads != target.heads:
        raise ValueError(
            f"Heads of this {family.model_type} carry a position (ALiBi), so clones of {source.heads} heads do not "
            f"make the target's {target.heads}. Choose a config with {source.heads} heads, or {instead}"
        )
    for local, spec in family.tensors.items():
        # Copies that are read share their weight, copies that are written do not; gains of heads are neither.
        sideless = [axis for axis in spec.axes if axis.side == "none" and not {"fixed", *HEAD_ROLES} & set(axis.roles)]
        if len(spec.axes) > 1 and sideless:
            raise ValueError(
                f"Cloning needs to know what each tensor reads, and of {local} in {family.model_type} this is not "
                f"known. Choose {instead}"
            )
    for role in {spec.norm.role for spec in family.tensors.values() if spec.norm is not None}:
        if target.count(role) % source.count(role):
            raise ValueError(
                f"This {family.model_type} normalises over all of {role}, so cloning needs a multiple of "
                f"{source.count(role)} there, got {target.count(role)}. Choose such a config, or {instead}"
            )


__all__ = ["hypercloning"]
