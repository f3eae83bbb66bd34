"""
The layout of each supported family: for every parameter, what its axes mean.

To add a family, add one `Family` to `FAMILIES`; tests/layout/test_families.py then checks it against the real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal


if TYPE_CHECKING:
    from transformers import PretrainedConfig

Side = Literal["in", "out", "none"]

ROLES = ("ffn", "head_dim", "hidden", "key_value", "positions", "query", "vocab")


@dataclass(frozen=True)
class Axis:
    """
    One axis of a parameter.

    Args:
        roles (`tuple[str, ...]`): the dimensions laid end to end along the axis; more than one where a tensor is
            packed, such as GPT-2's q|k|v.
        side (`"in"`, `"out"` or `"none"`): whether the layer reads these coordinates or produces them.
    """

    roles: tuple[str, ...]
    side: Side


@dataclass(frozen=True)
class TensorSpec:
    """
    Meaning of one parameter.

    Args:
        axes (`tuple[Axis, ...]`): one entry per axis, in storage order.
        norm_gain (`bool`): the multiplicative weight of a norm over the residual stream.
        block_output (`bool`): belongs to a projection whose output a block adds to the residual stream. A block whose
            such parameters are all zero is the identity.
    """

    axes: tuple[Axis, ...]
    norm_gain: bool = False
    block_output: bool = False

    @property
    def writes_stream(self) -> bool:
        """Whether its output lands in the residual stream."""
        return any(axis.roles == ("hidden",) and axis.side == "out" for axis in self.axes)

    @property
    def free(self) -> bool:
        """
        Whether its entries at coordinates that an anchor lacks may hold any value without changing the expanded
        anchor's function: those entries only meet zeros (reads of, or units that feed into, zero entries elsewhere).
        """
        if self.norm_gain:
            return True
        return not self.writes_stream and all(axis.side != "none" or axis.roles == ("vocab",) for axis in self.axes)


@dataclass(frozen=True)
class Family:
    """
    Layout of one architecture.

    Args:
        model_types (`tuple[str, ...]`): values of `config.model_type` that share this layout.
        layer_prefix (`str`): the name of the layer list, with a trailing dot.
        tensors (`Mapping[str, TensorSpec]`): specs of the parameters outside the layers by full name, and of those in
            a layer by the name after `<layer_prefix><index>.`.
        norm (`"rms"` or `"layer"`): the norm of the residual stream.
        fields (`Mapping[str, str]`): dimension -> config attribute.
        eps_field (`str`): config attribute of the norm's epsilon.
        must_agree (`tuple[str, ...]`): config attributes that shape the function, so that anchors must share them.
        unsupported (`Mapping[str, object]`): config attribute -> the only value supported here.
        heads_fill_hidden (`bool`): the architecture requires heads x head_dim = hidden.
    """

    model_types: tuple[str, ...]
    layer_prefix: str
    tensors: Mapping[str, TensorSpec]
    norm: Literal["rms", "layer"]
    fields: Mapping[str, str]
    eps_field: str
    must_agree: tuple[str, ...]
    unsupported: Mapping[str, object] = field(default_factory=dict)
    heads_fill_hidden: bool = False

    def spec(self, name: str) -> TensorSpec:
        """Spec of parameter `name`. Raises `ValueError` for a parameter this family does not declare."""
        _, local = self.split(name)
        try:
            return self.tensors[local]
        except KeyError:
            raise ValueError(
                f"Parameter {name} is not in the declared layout of {', '.join(self.model_types)}; declare its axes "
                "in cbd_hf/layout/families.py."
            ) from None

    def split(self, name: str) -> tuple[int | None, str]:
        """(layer index or `None`, name within the layer) of a parameter."""
        if not name.startswith(self.layer_prefix):
            return None, name
        index, _, local = name.removeprefix(self.layer_prefix).partition(".")
        return int(index), local

    def join(self, layer: int | None, local: str) -> str:
        """Inverse of [`Family.split`]."""
        return local if layer is None else f"{self.layer_prefix}{layer}.{local}"


def _reads(*roles: str) -> Axis:
    return Axis(roles, "in")


def _writes(*roles: str) -> Axis:
    return Axis(roles, "out")


def _linear(out: tuple[str, ...], into: str, block_output: bool = False) -> TensorSpec:
    return TensorSpec((_writes(*out), _reads(into)), block_output=block_output)  # nn.Linear stores [out, in]


def _conv1d(into: str, out: tuple[str, ...], block_output: bool = False) -> TensorSpec:
    return TensorSpec((_reads(into), _writes(*out)), block_output=block_output)  # GPT-2's Conv1D stores [in, out]


def _bias(*roles: str, block_output: bool = False) -> TensorSpec:
    return TensorSpec((_writes(*roles),), block_output=block_output)


_ROWS = Axis(("vocab",), "none")
_NORM_AXIS = Axis(("hidden",), "none")
_GAIN = TensorSpec((_NORM_AXIS,), norm_gain=True)
_SHIFT = TensorSpec((_NORM_AXIS,))
_HEAD_NORM = TensorSpec((Axis(("head_dim",), "none"),))

GPT2 = Family(
    model_types=("gpt2",),
    layer_prefix="transformer.h.",
    tensors={
        "transformer.wte.weight": TensorSpec((_ROWS, _writes("hidden"))),
        "transformer.wpe.weight": TensorSpec((Axis(("positions",), "none"), _writes("hidden"))),
        "transformer.ln_f.weight": _GAIN,
        "transformer.ln_f.bias": _SHIFT,
        "lm_head.weight": TensorSpec((_ROWS, _reads("hidden"))),
        "ln_1.weight": _GAIN,
        "ln_1.bias": _SHIFT,
        "ln_2.weight": _GAIN,
        "ln_2.bias": _SHIFT,
        "attn.c_attn.weight": _conv1d("hidden", ("query", "key_value", "key_value")),
        "attn.c_attn.bias": _bias("query", "key_value", "key_value"),
        "attn.c_proj.weight": _conv1d("query", ("hidden",), block_output=True),
        "attn.c_proj.bias": _bias("hidden", block_output=True),
        "mlp.c_fc.weight": _conv1d("hidden", ("ffn",)),
        "mlp.c_fc.bias": _bias("ffn"),
        "mlp.c_proj.weight": _conv1d("ffn", ("hidden",), block_output=True),
        "mlp.c_proj.bias": _bias("hidden", block_output=True),
    },
    norm="layer",
    fields={"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "ffn": "n_inner", "positions": "n_positions"},
    eps_field="layer_norm_epsilon",
    must_agree=("activation_function", "scale_attn_weights", "tie_word_embeddings"),
    unsupported={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    heads_fill_hidden=True,
)

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layer_prefix="model.layers.",
    tensors={
        "model.embed_tokens.weight": TensorSpec((_ROWS, _writes("hidden"))),
        "model.norm.weight": _GAIN,
        "lm_head.weight": TensorSpec((_ROWS, _reads("hidden"))),
        "input_layernorm.weight": _GAIN,
        "post_attention_layernorm.weight": _GAIN,
        "self_attn.q_proj.weight": _linear(("query",), "hidden"),
        "self_attn.q_proj.bias": _bias("query"),
        "self_attn.k_proj.weight": _linear(("key_value",), "hidden"),
        "self_attn.k_proj.bias": _bias("key_value"),
        "self_attn.v_proj.weight": _linear(("key_value",), "hidden"),
        "self_attn.v_proj.bias": _bias("key_value"),
        "self_attn.q_norm.weight": _HEAD_NORM,
        "self_attn.k_norm.weight": _HEAD_NORM,
        "self_attn.o_proj.weight": _linear(("hidden",), "query", block_output=True),
        "self_attn.o_proj.bias": _bias("hidden", block_output=True),
        "mlp.gate_proj.weight": _linear(("ffn",), "hidden"),
        "mlp.gate_proj.bias": _bias("ffn"),
        "mlp.up_proj.weight": _linear(("ffn",), "hidden"),
        "mlp.up_proj.bias": _bias("ffn"),
        "mlp.down_proj.weight": _linear(("hidden",), "ffn", block_output=True),
        "mlp.down_proj.bias": _bias("hidden", block_output=True),
    },
    norm="rms",
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "ffn": "intermediate_size",
    },
    eps_field="rms_norm_eps",
    must_agree=(
        "attention_bias",
        "hidden_act",
        "mlp_bias",
        "rope_parameters",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
    ),
)

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA)


def get_family(config: PretrainedConfig) -> Family:
    """
    The layout of `config`'s architecture.

    Raises:
        ValueError: the family is not supported, or the config uses a variant of it that is not.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            break
    else:
        known = sorted(kind for family in FAMILIES for kind in family.model_types)
        raise ValueError(
            f"Model type {config.model_type!r} is not supported yet; supported: {', '.join(known)}. Its tensor layout "
            "must be known before its weights can be resized: add it to cbd_hf/layout/families.py."
        )
    for name, value in family.unsupported.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"{config.model_type} with {name}={getattr(config, name)!r} is not supported; only {value!r} is."
            )
    return family


__all__ = ["FAMILIES", "ROLES", "Axis", "Family", "TensorSpec", "get_family"]
