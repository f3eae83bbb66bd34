"""Put the probes, the modules and the packings together into the specs of every parameter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cbd_hf.families.modules import Observed, kind_of, observe, writes_by_name
from cbd_hf.families.packings import ALIBI, Measured, Scaling, candidates
from cbd_hf.families.probes import Probes
from cbd_hf.layout import Axis, Family, LayoutError, Norm, Segment, TensorSpec
from cbd_hf.layout.axes import Group, Side


if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ANSWERS = 27  # three packed modules with three packings each; every trial costs a forward
_HIDDEN = (Segment("hidden"),)


@dataclass
class Open:
    """
    A question that sizes leave open.

    Args:
        subject (`str`): module whose parameters share the answer, by its name within a layer.
        role (`"heads"` or `"ffn"`): what kind of question.
        options (`tuple[tuple[Segment, ...], ...]`): the packings that fit.
    """

    subject: str
    role: str
    options: tuple[tuple[Segment, ...], ...]

    @property
    def key(self) -> Key:
        """What identifies it: a module may have several, of different lengths."""
        return self.subject, self.options


Key = tuple[str, tuple[tuple[Segment, ...], ...]]
Packings = Mapping[Key, tuple[Segment, ...]]


@dataclass
class Draft:
    """
    A layout whose packings are not yet decided.

    Args:
        probes (`Probes`): what moved.
        seen (`Observed`): the modules.
        questions (`list[Open]`): every packing to decide, each with at least two options.
        fused (`list[str]`): modules with several parts on an axis, also where one packing alone fits.
    """

    probes: Probes
    seen: Observed
    questions: list[Open]
    fused: list[str]

    def answers(self, role: str, decided: Packings) -> Iterator[dict[Key, tuple[Segment, ...]]]:
        """Every way to answer the questions of one kind, added to what is decided; the likeliest first."""
        open_ones = [question for question in self.questions if question.role == role]
        answers = itertools.product(*(question.options for question in open_ones))
        for answer in itertools.islice(answers, MOST_ANSWERS):
            yield dict(decided) | {q.key: option for q, option in zip(open_ones, answer, strict=True)}


def draft(probes: Probes, model: PreTrainedModel) -> Draft:
    """
    Look at a small model and list what is open.

    Args:
        probes (`Probes`): of its config.
        model (`PreTrainedModel`): built from `probes.config`, float32, on the CPU.

    Raises:
        LayoutError: a tensor is packed in an unknown way; names it and what to declare.
    """
    seen = observe(model, getattr(probes.config, probes.fields["layers"]))
    result = Draft(probes, seen, [], [])
    asked = set()
    for name, measured in probes.axes.items():
        for dim, axis in enumerate(measured):
            options = _options(result, name, dim, axis)
            if not options:
                per = ", ".join(f"{count} per {role}" for role, count in axis.per.items())
                raise LayoutError(
                    f"{probes.config.model_type}: axis {dim} of {name} has {per} and {axis.rest} further entries, "
                    "which no known packing explains. Declare it in PACKINGS of cbd_hf/families/packings.py."
                )
            subject = _local(seen, name).rpartition(".")[0]
            fused = len(axis.per) > 1 or any(
                count > (axis.head_dim if role in ("query", "key_value") else 1) for role, count in axis.per.items()
            )
            if fused and subject not in result.fused:
                result.fused.append(subject)
            role = "ffn" if all(s.role.startswith("ffn") for option in options for s in option) else "heads"
            question = Open(subject, role, tuple(options))
            if len(options) > 1 and question.key not in asked:
                asked.add(question.key)
                result.questions.append(question)
    return result


def _local(seen: Observed, name: str) -> str:
    if not name.startswith(seen.layer_prefix):
        return name
    return name.removeprefix(seen.layer_prefix).partition(".")[2]


def _options(draft: Draft, name: str, dim: int, axis: Measured) -> list[tuple[Segment, ...]]:
    """The packings that fit one axis."""
    probes = draft.probes
    if probes.heads_fill_hidden and axis.per == {"query": axis.head_dim} and not axis.rest:
        return [_HIDDEN] if _is_stream(draft, name, dim) else [(Segment("query", axis.head_dim),)]
    derived, per_channel = _derived_ffn(draft), _per_channel(probes, axis)
    if derived and per_channel and per_channel % derived == 0:
        return candidates(Measured({"ffn": per_channel // derived}, 0, axis.head_dim, axis.grouped))
    return candidates(axis)


def _per_channel(probes: Probes, axis: Measured) -> int:
    """Entries per channel of an axis that follows the hidden size alone, more than one; else 0."""
    unit = axis.per.get("query", 0) // axis.head_dim if probes.heads_fill_hidden else axis.per.get("hidden", 0)
    return unit if unit > 1 and len(axis.per) == 1 and not axis.rest else 0


def _is_stream(draft: Draft, name: str, dim: int) -> bool:
    """Whether an axis as long as the hidden size is the stream, where heads x head_dim is as long."""
    parent, module, attribute = draft.seen.owner[name]
    kind = kind_of(module)
    if parent in draft.seen.norms:  # of queries before attention, of heads' outputs after it, or of the stream
        made, read = draft.seen.producer.get(parent), draft.seen.consumer.get(parent)
        if made is not None and f"{made}.weight" in draft.probes.axes:
            return _is_stream(draft, f"{made}.weight", _out_dim(draft.seen, made))
        if read is not None and f"{read}.weight" in draft.probes.axes:
            return _is_stream(draft, f"{read}.weight", 1 - _out_dim(draft.seen, read))
        return True  # before a tied head
    if kind not in ("linear", "conv1d"):
        return True  # embeddings
    side_out = _side(draft.seen, name, dim) == "out"
    weight = draft.probes.axes[f"{parent}.weight"]
    alike = [axis.per == {"query": axis.head_dim} and not axis.rest for axis in weight]
    if not all(alike):
        # Only one axis of the weight is that long, and the other is FFN, vocabulary, a fused q|k|v or fixed.
        other = next(axis for axis, same in zip(weight, alike, strict=True) if not same)
        return True if other.per or other.rest else side_out
    # A square projection: what several projections read is the stream, what one reads alone the heads' output.
    reads_stream = parent in draft.seen.shared_input
    return reads_stream != side_out


def _out_dim(seen: Observed, module: str) -> int:
    return 0 if _side(seen, f"{module}.weight", 0) == "out" else 1


def _derived_ffn(draft: Draft) -> int | None:
    """FFN units per channel where no attribute holds them: the longer axis that some projection reads."""
    if "ffn" in draft.probes.fields:
        return None
    found = {
        _per_channel(draft.probes, axis)
        for name, measured in draft.probes.axes.items()
        for dim, axis in enumerate(measured)
        if _side(draft.seen, name, dim) == "in"
    } - {0}
    return found.pop() if len(found) == 1 else None


def _side(seen: Observed, name: str, dim: int) -> Side:
    parent, module, attribute = seen.owner[name]
    kind = kind_of(module)
    if attribute == "bias" and kind in ("linear", "conv1d"):
        return "out"
    if kind == "linear":
        return "out" if dim == 0 else "in"
    if kind == "conv1d":
        return "in" if dim == 0 else "out"
    if kind == "embedding":
        return "none" if dim == 0 else "out"
    return "none"


def assemble_family(draft: Draft, packings: Packings, scaling: Scaling) -> Family:
    """
    The family under given answers.

    Args:
        draft (`Draft`): from [`draft`].
        packings (`Packings`): the answer to every question.
        scaling (`Scaling`): of embeddings and of the stream.

    Raises:
        LayoutError: layers of one name differ in their tensors' meaning.
    """
    probes, seen = draft.probes, draft.seen
    specs: dict[str, TensorSpec] = {}
    for name in probes.axes:
        local = _local(seen, name)
        spec = _spec(draft, name, packings, scaling)
        if specs.setdefault(local, spec) != spec:
            raise LayoutError(
                f"{probes.config.model_type}: {local} means different things in different layers; this is not "
                "supported."
            )
    stream_kinds = {spec.norm.kind for spec in specs.values() if spec.norm is not None and spec.norm.role == "hidden"}
    stream_kinds |= set(seen.bare_readers.values())
    if len(stream_kinds) > 1:
        raise LayoutError(f"{probes.config.model_type} mixes LayerNorm and RMSNorm on its stream; not supported.")
    norm = stream_kinds.pop() if stream_kinds else "rms"
    normed = {spec.norm.role for spec in specs.values() if spec.norm is not None} - {"hidden"}
    for local, spec in specs.items():
        out_roles = {role for axis in spec.axes if axis.side == "out" for role in axis.roles}
        specs[local] = replace(
            spec, mean_padded=norm == "layer" and spec.writes_stream, feeds_norm=bool(out_roles & normed)
        )
    config = probes.config
    return Family(
        model_type=config.model_type,
        layer_prefix=seen.layer_prefix,
        tensors=specs,
        norm=norm,
        fields=dict(probes.fields),
        eps_fields=() if scaling.stream else probes.eps_fields,
        heads_fill_hidden=probes.heads_fill_hidden,
        ffn_per_hidden=probes.ffn_per_hidden or _derived_ffn(draft),
        follows_hidden=probes.follows_hidden,
        alibi=_alibi(draft),
        inert=probes.inert,
        uniform=_uniform(seen, probes),
    )


def _uniform(seen: Observed, probes: Probes) -> bool:
    locals_of: dict[str, set[str]] = {}
    for name in probes.axes:
        if name.startswith(seen.layer_prefix):
            layer, _, local = name.removeprefix(seen.layer_prefix).partition(".")
            locals_of.setdefault(layer, set()).add(local)
    return len(set(map(frozenset, locals_of.values()))) <= 1


def _alibi(draft: Draft) -> str | None:
    config = draft.probes.config
    rule = ALIBI.get(config.model_type)
    nested = getattr(config, "attn_config", None)
    default = config.model_type == "bloom"
    uses = getattr(config, "alibi", getattr(nested, "alibi", default))
    return rule if rule and uses else None


def _spec(draft: Draft, name: str, packings: Packings, scaling: Scaling) -> TensorSpec:
    seen = draft.seen
    parent, module, attribute = seen.owner[name]
    subject = _local(seen, name).rpartition(".")[0]
    in_layer = name.startswith(seen.layer_prefix)
    axes = []
    for dim, measured in enumerate(draft.probes.axes[name]):
        options = _options(draft, name, dim, measured)
        chosen = packings[subject, tuple(options)] if len(options) > 1 else options[0]
        axes.append(Axis(chosen, _side(seen, name, dim)))
    kind = kind_of(module)
    if parent in seen.norms and attribute in ("weight", "bias"):
        return _norm_spec(draft, name, axes, scaling)
    if kind == "other":
        axes = _raw_sides(axes, attribute)
        if len(axes) == 1 and axes[0].roles == ("hidden",) and "bias" in attribute:
            axes = [replace(axes[0], side="out")]  # added to the stream by the module itself
    spec = TensorSpec(tuple(axes), _group(draft, name, axes, in_layer))
    if spec.writes_stream:
        embeds = module is seen.model.get_input_embeddings()
        power = scaling.embedding if embeds else 0.0
        return replace(spec, block_output=in_layer, width_power=power, pad_power=scaling.stream)
    if parent in seen.bare_readers and any(axis.roles == ("hidden",) and axis.side == "in" for axis in axes):
        return replace(spec, pad_power=0.5)  # what a gain would take
    return spec


def _norm_spec(draft: Draft, name: str, axes: list[Axis], scaling: Scaling) -> TensorSpec:
    seen = draft.seen
    parent, _, attribute = seen.owner[name]
    kind, offset = seen.norms[parent]
    axis = axes[-1]
    if len(axis.segments) != 1 or axis.segments[0].role == "fixed":
        return TensorSpec(tuple(axes), "norms")
    writes = parent in seen.stream_norms
    before_head = seen.tied and not parent.startswith(seen.layer_prefix) and not writes
    norm = Norm(kind, axis.segments[0].role, offset, writes, before_head)  # type: ignore[arg-type]
    power, pad_power = 0.0, 0.0
    if before_head:  # a tied head is scaled with the embedding, so what meets it is scaled the other way
        power, pad_power = -scaling.embedding, -scaling.stream
    elif writes or norm.role == "hidden" and seen.producer.get(parent, "").startswith(seen.layer_prefix):
        pad_power = scaling.stream  # given to the stream
    gain = attribute == "weight"
    return TensorSpec(tuple(axes), "norms", norm=norm, norm_gain=gain, width_power=power, pad_power=pad_power)


def _raw_sides(axes: list[Axis], attribute: str) -> list[Axis]:
    """Sides of a stack of experts' matrices: hidden -> ffn, or back."""
    roles = [axis.roles[0] for axis in axes]
    variable = [role for role in roles if role != "fixed"]
    if len(axes) < 2 or not variable or not any(role.startswith("ffn") for role in roles):
        if len(axes) > 1 and variable == ["hidden"]:  # a router reads the stream
            side: Side = "out" if writes_by_name(attribute) else "in"
            return [replace(axis, side=side) if axis.roles == ("hidden",) else axis for axis in axes]
        return axes
    if "hidden" not in roles:  # biases of experts
        return [replace(axis, side="out") if axis.roles[0].startswith("ffn") else axis for axis in axes]
    writes = writes_by_name(attribute)
    sides: dict[str, Side] = {"hidden": "out" if writes else "in", "ffn": "in" if writes else "out"}
    return [replace(axis, side=sides.get(axis.roles[0].partition(":")[0], "none")) for axis in axes]


def _group(draft: Draft, name: str, axes: list[Axis], in_layer: bool) -> Group:
    if not in_layer:
        return "embeddings"
    parent, _, _ = draft.seen.owner[name]

    def of(roles: set[str]) -> Group | None:
        if any(role.startswith("ffn") for role in roles):
            return "ffn"
        return "attention" if roles & {"query", "key_value", "group"} else None

    here = of({role for axis in axes for role in axis.roles})
    if here is not None:
        return here
    # A bias of an output projection, a router: what its neighbours are.
    for prefix in (parent, parent.rpartition(".")[0]):
        roles = set()
        for other, measured in draft.probes.axes.items():
            if other.startswith(prefix + "."):
                for dim, axis in enumerate(measured):
                    roles |= {s.role for option in _options(draft, other, dim, axis) for s in option}
        if of(roles) is not None:
            return of(roles) or "attention"
    return "attention"


__all__ = ["Draft", "Open", "assemble_family", "draft"]
