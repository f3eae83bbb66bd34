"""
Which causal LM architectures of Transformers a chain can be made of, tried end to end with tiny random models.

    python benchmarks/coverage.py [--types gpt2,llama] [--json | --markdown]

For every model type: a tiny config, two anchors with random weights (gains, biases and buffers too), the larger one
wider and deeper; both saved; a chain made of them; then through `CBDModel.from_chain`:

* a model between the two, expanded from the smaller anchor, has its logits and generates the same tokens;
* the anchors' own configs give their weights bit for bit;
* the expanded model cut back to the smaller anchor's shape gives its weights;
* what is saved and loaded again is equal, and tied weights stay tied.

`works`: all of it. `refuses`: a `ValueError` says why before anything is written. `wrong`: anything else. Nothing of
the package's own proof of a layout is used, and tokens, windows and weights are others than there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from cbd_hf.layout import Family, Shape

TOLERANCE = 1e-3  # of logits, in units of their deviation: weights are made in float32, and many norms compute in it
LENGTH = 24  # tokens; windows are shrunk to 8
SECONDS = 240  # allowed for one type

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Values without which no model can be built from the type's default config.
REPAIRED: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "cohere_compass_text": {
        "rope_parameters": {name: dict(_ROPE) for name in ("full_attention", "sliding_attention")}
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}
# Norms that write the residual stream itself; with a gain that is not uniform, expansion is not exact
# (docs/building.md), so theirs is.
UNIFORM = {"bloom": "word_embeddings_layernorm.weight", "mbart": "layernorm_embedding.weight"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention", "index_topk")


@dataclass
class Result:
    """
    What was found for one model type.

    Args:
        verdict (`"works"`, `"refuses"` or `"wrong"`): see above.
        error (`float`, *optional*): of the expanded model's logits, in units of their deviation.
        seconds (`float`): all of it.
        reason (`str`): why it does not work.
    """

    verdict: str
    error: float | None = None
    seconds: float = 0.0
    reason: str = ""


class Refused(Exception):
    """The package says that it does not support a type."""


class Broken(Exception):
    """An invariant that does not hold."""


class Late(BaseException):
    """The time of one type is over."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's default config with one layer of every kind, small widths and short windows."""
    from transformers import AutoConfig

    from cbd_hf.layout.miniature import miniature

    try:
        default = AutoConfig.for_model(model_type, **REPAIRED.get(model_type, {}))
    except Exception as error:  # of the class's own validation
        raise ValueError(f"The class refuses its own default config ({error}).") from error
    config = miniature(default)
    short = {name: 8 for name in WINDOWS if type(getattr(config, name, None)) is int and getattr(config, name) > 8}
    values = config.to_dict() | short | {"bos_token_id": 0, "eos_token_id": None}
    try:  # without padding, whose row some classes zero whenever a checkpoint is loaded
        return type(config).from_dict(values | {"pad_token_id": None})
    except Exception:  # of the class's own validation: it needs one
        return type(config).from_dict(values | {"pad_token_id": 1})


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model with no weight at its initial value."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())).eval()
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if UNIFORM.get(config.model_type, "-") in name:
                tensor.fill_(0.7)
            elif tensor is embedding:
                tensor.copy_(noise)
            elif tensor.dim() < 2:
                tensor.add_(0.15 * noise)
            else:
                tensor.copy_(noise / math.sqrt(max(tensor.shape[1:]) if tensor.dim() > 2 else tensor.shape[1]))
    return model


def wider_shapes(shape: Shape, family: Family) -> Iterator[tuple[Shape, Shape]]:
    """(middle, large) widths beyond `shape`, from the finest steps to coarse ones."""

    def grown(kv: int, group: int, channels: int, units: int) -> Shape:
        heads = shape.heads if "heads" not in family.fields else kv * group
        new = replace(shape, heads=heads, kv_heads=kv if heads > 1 else shape.kv_heads)
        step = math.lcm(2, heads)
        hidden = math.ceil((shape.hidden + channels) / step) * step
        new = replace(new, hidden=heads * shape.head_dim if family.heads_fill_hidden else hidden)
        ffn = shape.ffn + units if "ffn" in family.fields else (family.ffn_per_hidden or 0) * new.hidden
        return replace(new, ffn=ffn, extra=tuple((name, count + units) for name, count in shape.extra))

    kv, group = shape.kv_heads, shape.group
    if "heads" not in family.fields:
        steps = [((kv, group), (kv, group))]
    elif "kv_heads" in family.fields or kv < shape.heads:
        steps = [((kv + 1, group), (kv + 2, group)), ((kv, 2 * group), (2 * kv, 2 * group))]
    else:
        steps = [((kv + 1, group), (kv + 2, group))]
    steps += [((2 * kv, group), (4 * kv, group))]
    for (middle, large), channels in itertools.product(steps, (math.lcm(8, shape.heads), shape.hidden)):
        yield grown(*middle, channels, 24), grown(*large, 2 * channels, 48)
    yield grown(kv, group, shape.hidden, 32), grown(kv, group, 3 * shape.hidden, 64)  # heads as they are


def pick_shapes(config: PretrainedConfig, family: Family) -> tuple[PretrainedConfig, Shape]:
    """A wider and deeper config than `config`, and a shape between; models of both can be built and run."""
    import torch
    from transformers import AutoModelForCausalLM

    from cbd_hf.layout import config_with_shape, shape_of
    from cbd_hf.sizing import lattice_config

    shape = shape_of(config, family)
    failure: Exception | None = None
    for middle, large in wider_shapes(shape, family):
        for repeats in ([3] * shape.layers, [1] * (shape.layers - 1) + [3]):
            layers = [layer for layer, count in enumerate(repeats) for _ in range(count)]
            depth = (shape.layers + len(layers)) // 2
            try:
                wide = config_with_shape(config, replace(large, layers=len(layers)), family, layers=layers)
                between = lattice_config(config, wide, replace(middle, layers=depth), family)
                for candidate in (wide, between):
                    copy = type(candidate).from_dict(candidate.to_dict())
                    with torch.no_grad():
                        AutoModelForCausalLM.from_config(copy).eval()(input_ids=tokens_of(copy), use_cache=False)
                return wide, replace(middle, layers=depth)
            except Exception as problem:  # sizes that the architecture does not allow
                failure = failure or problem
    raise Broken(f"no wider model can be built ({type(failure).__name__}: {failure})")


def tokens_of(config: PretrainedConfig) -> torch.Tensor:
    """Fixed token ids, shape (2, `LENGTH`)."""
    import torch

    top = min(60, int(config.vocab_size))
    return torch.randint(4, top, (2, LENGTH), generator=torch.Generator().manual_seed(7))


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64 where the class can, whose experts run one by one (the grouped kernels know no float64)."""
    import torch
    from transformers import AutoModelForCausalLM

    config = type(model.config).from_dict(model.config.to_dict())
    config._experts_implementation = "eager"
    for dtype in (torch.float64, torch.float32):
        copy = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        copy.load_state_dict(model.state_dict())
        copy.tie_weights()
        try:
            logits(copy)
            break
        except RuntimeError:  # it knows no float64
            pass
    return copy


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Float64, shape (2, `LENGTH`, vocab)."""
    import torch

    with torch.no_grad():
        return model(input_ids=tokens_of(model.config), use_cache=False).logits.double()


def difference(model: PreTrainedModel, expected: torch.Tensor) -> float:
    """Largest difference of a model's logits from others, in units of their deviation."""
    error = float((logits(in_float64(model)) - expected).abs().max() / expected.std())
    return error if math.isfinite(error) else math.inf


def generated(model: PreTrainedModel) -> torch.Tensor | None:
    """Four tokens, greedily; `None` where the model cannot."""
    tokens = tokens_of(model.config)
    try:
        return model.generate(
            tokens, attention_mask=tokens.new_ones(tokens.shape), do_sample=False, max_new_tokens=4, min_new_tokens=4
        )
    except Exception:  # of a random stock model, whatever it lacks
        return None


def require(condition: bool, what: str) -> None:
    """Raise [`Broken`] unless the condition holds."""
    if not condition:
        raise Broken(what)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same state dict, bit for bit."""
    import torch

    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def check(model_type: str, directory: Path) -> float:
    """
    Try everything for one type; the error of the expanded model's logits.

    Raises:
        Refused: it is refused, before anything is made.
        Broken: an invariant does not hold.
    """
    from transformers import AutoModelForCausalLM

    from cbd_hf import CBDModel, DistillationChain
    from cbd_hf.families import get_family
    from cbd_hf.sizing import lattice_config

    try:
        config = tiny_config(model_type)
        family = get_family(config)
        wide, shape = pick_shapes(config, family)
        for name, anchor_config in (("large", wide), ("small", config)):
            random_model(anchor_config, seed=len(name)).save_pretrained(directory / name)
        chain = DistillationChain.from_anchors([directory / "large", directory / "small"], directory / "chain")
        between = lattice_config(chain["small"].config, chain["large"].config, shape, family)
    except ValueError as refusal:  # before anything is made; later ones are defects
        raise Refused(str(refusal)) from refusal
    anchors = {anchor.name: anchor.load_model() for anchor in chain}
    small = anchors["small"]
    in_doubles = in_float64(small)
    expected = logits(in_doubles)
    require(bool(expected.isfinite().all()) and float(expected.std()) > 0, "the anchor's logits are not finite")

    middle = CBDModel.from_chain(chain, config=between, initializer="expand")
    error = difference(middle, expected)
    require(error <= TOLERANCE, f"expanded logits differ by {error:.2g}")
    planned = CBDModel.from_chain(chain, sum(chain.sizes) / 2, initializer="expand")
    worse = difference(planned, expected)
    require(worse <= TOLERANCE, f"logits at a planned size differ by {worse:.2g}")
    mixed = CBDModel.from_chain(chain, config=between)
    require(bool(logits(in_float64(mixed)).isfinite().all()), "interpolated logits are not finite")
    for anchor in chain:
        for initializer in ("cut", "expand", "chain"):
            model = CBDModel.from_chain(chain, config=anchor.config, initializer=initializer)
            require(
                same(model, anchors[anchor.name]), f"{initializer} to the {anchor.name} anchor is not the identity"
            )
    check_subset(chain, small, middle, family)
    wanted = generated(in_doubles)
    if wanted is not None:
        found = generated(in_float64(middle))
        require(found is not None and bool((found == wanted).all()), "generation differs")
    middle.save_pretrained(directory / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(directory / "saved")
    require(same(loaded, middle), "saved and loaded again it is another model")
    require(is_tied(small) == is_tied(middle) == is_tied(loaded), "tied weights came apart")
    return max(error, worse)


def check_subset(chain: Any, small: PreTrainedModel, middle: PreTrainedModel, family: Family) -> None:
    """Cut the expanded model back: the smaller anchor's weights, up to the rounding of the norms' factor."""
    import torch

    from cbd_hf.layout import shape_of, weights_of
    from cbd_hf.sizing import corresponding_layers
    from cbd_hf.transforms import LayerMap, StateDict, Trans

    own, wide = (shape_of(model.config, family) for model in (small, middle))
    inserted = corresponding_layers(small.config, chain[0].config, middle.config, family)[0].inserted
    kept = tuple(layer for layer, new in enumerate(inserted) if not new)
    trans = Trans(StateDict(middle.state_dict()), family, wide, own, LayerMap(kept, (False,) * own.layers))
    for name, weight in weights_of(small).items():
        back = trans.tensor(name)
        require(
            back.shape == weight.shape and torch.allclose(back.to(weight.dtype), weight, rtol=1e-5, atol=1e-5),
            f"cut back, {name} is not the anchor's",
        )


def examine(model_type: str) -> Result:
    """[`check`] with every way to fail told apart."""
    started = time.perf_counter()
    signal.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
            result = Result("works", check(model_type, Path(directory)))
    except Broken as problem:
        result = Result("wrong", reason=str(problem))
    except Refused as refusal:
        result = Result("refuses", reason=str(refusal))
    except Late:
        result = Result("wrong", reason=f"takes more than {SECONDS} s")
    except Exception as crash:
        result = Result("wrong", reason=f"{type(crash).__name__}: {crash}")
    finally:
        signal.alarm(0)
    result.seconds = time.perf_counter() - started
    return result


def short(reason: str, length: int = 110) -> str:
    """One line of a table."""
    line = " ".join(reason.split()).replace("|", "\\|")
    return line if len(line) <= length else line[: length - 1].rsplit(" ", 1)[0] + " …"


def markdown(results: dict[str, Result]) -> str:
    """The table of the documentation."""
    rows = ["| type | verdict | error | seconds | reason |", "|---|---|---|---|---|"]
    for name, found in sorted(results.items(), key=lambda item: (item[1].verdict != "works", item[0])):
        error = "" if found.error is None else f"{found.error:.0e}"
        rows.append(f"| {name} | {found.verdict} | {error} | {found.seconds:.1f} | {short(found.reason)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, comma-separated; by default all causal LMs")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "CBD_LAYOUT_CACHE": "off"}  # every layout is learned here
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def late(*_: Any) -> None:
        raise Late

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, late)
    types = args.types.split(",") if args.types else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = {}
    for name in types:
        results[name] = found = examine(name)
        print(f"{name:28} {found.verdict:8} {found.seconds:6.1f} s  {short(found.reason, 300)}", file=sys.stderr)
    of = {
        verdict: [name for name, found in results.items() if found.verdict == verdict]
        for verdict in ("works", "refuses", "wrong")
    }
    if args.json:
        print(json.dumps(of))
    elif args.markdown:
        print(markdown(results))
    else:
        for name, found in results.items():
            error = "" if found.error is None else f"{found.error:.0e}"
            print(f"{name:28} {found.verdict:8} {error:6} {found.seconds:6.1f} s  {short(found.reason)}")
    print(", ".join(f"{len(names)} {verdict}" for verdict, names in of.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
