"""Architectures: Hugging Face configs read into one small frozen record, by a table of families.

A new family is one entry of `FAMILIES`: the differences of its layers from Llama's, and the names of its tensors.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jarm.core.files import there
from jarm.core.messages import brief
from jarm.core.outside import integer, maybe, number, read_json, string, struct
from jarm.core.status import JarmError, printable
from jarm.llm.rope import Rope, make_rope

_LLAMA_NAMES = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_AFTER_NAMES = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
_GEMMA_NAMES = _LLAMA_NAMES | _AFTER_NAMES | {"mlp_norm": "pre_feedforward_layernorm"}


@dataclasses.dataclass(frozen=True)
class Family:
    """Differences of a family's layers from Llama's; a flag given as a string names the config's attribute.

    `names` maps parameters to tensors of the checkpoint, without `.weight` and `.bias`; a tensor of several parameters
    holds them one after the other, or head by head if `interleaved`. `ignored` are regular expressions of tensors that
    embedding text does not need. `requires` maps settings to the values that jarm computes.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_NAMES)
    layer_prefix: str = "layers.{}."
    interleaved: bool = False
    transposed: bool = False  # kernels stored as [in, out]
    ignored: tuple[str, ...] = ()
    text_config: str | None = None  # attribute of a multimodal config with the language model's
    encoder: bool = False

    norm: str = "rms"  # or "layer"
    norm_offset: float = 0.0  # added to the stored scale
    eps: str = "rms_norm_eps"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None  # over a "head", or over the whole "projection"
    free_heads: bool = True  # fewer key-value heads, and heads of any size; else width / heads
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    activation: str = "hidden_act"
    gated: bool = True
    mlp_width: str = "intermediate_size"
    parallel: bool | str = False  # attention and MLP read the same input
    rotary: bool = True  # or learned positions
    partial_rotary: bool = False
    rotary_layers: str | None = None  # a list: 0 for a layer without positions
    windows: str = "none"  # "all" layers, or by "layer_types"
    attention_scale: str | None = None  # the scale is this attribute ** -0.5 rather than head_dim ** -0.5
    softcap: str | None = None
    scale_embeddings: bool = False  # by sqrt(width)
    requires: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


_GEMMA2 = Family(
    names=_GEMMA_NAMES,
    norm_offset=1.0,
    post_norm=True,
    activation="hidden_activation",
    windows="layer_types",
    attention_scale="query_pre_attn_scalar",
    softcap="attn_logit_softcapping",
    scale_embeddings=True,
)
_GEMMA3 = dataclasses.replace(_GEMMA2, qk_norm="head")

# By `model_type`. SmolLM 1 and 2 are Llamas, Pythia is a GPT-NeoX; MiniLM, BGE, E5 and GTE are BERTs.
FAMILIES: dict[str, Family] = {
    "llama": Family(mlp_bias="mlp_bias"),
    "mistral": Family(qkv_bias=False, out_bias=False, windows="all"),
    "qwen2": Family(qkv_bias=True, out_bias=False, windows="layer_types"),
    "qwen3": Family(qk_norm="head", windows="layer_types"),
    "gemma": Family(norm_offset=1.0, scale_embeddings=True),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": dataclasses.replace(
        _GEMMA3, text_config="text_config", ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",)
    ),
    "smollm3": Family(mlp_bias="mlp_bias", rotary_layers="no_rope_layers", windows="layer_types"),
    "olmo2": Family(names=_LLAMA_NAMES | _AFTER_NAMES, pre_norm=False, post_norm=True, qk_norm="projection"),
    "phi3": Family(
        names=_LLAMA_NAMES
        | {f"attention.{part}": "self_attn.qkv_proj" for part in "qkv"}
        | {"mlp.gate": "mlp.gate_up_proj", "mlp.up": "mlp.gate_up_proj"},
        qkv_bias=False,
        out_bias=False,
        partial_rotary=True,
        windows="all",
    ),
    "gpt_neox": Family(
        names={
            "embed": "embed_in",
            "final_norm": "final_layer_norm",
            "attention.q": "attention.query_key_value",
            "attention.k": "attention.query_key_value",
            "attention.v": "attention.query_key_value",
            "attention.out": "attention.dense",
            "attention_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        interleaved=True,
        ignored=(r"embed_out\.weight", r"layers\.\d+\.attention\.(bias|masked_bias)"),
        norm="layer",
        eps="layer_norm_eps",
        free_heads=False,
        mlp_bias=True,
        gated=False,
        parallel="use_parallel_residual",
        partial_rotary=True,
    ),
    "gpt2": Family(
        names={
            "embed": "wte",
            "positions": "wpe",
            "final_norm": "ln_f",
            "attention.q": "attn.c_attn",
            "attention.k": "attn.c_attn",
            "attention.v": "attn.c_attn",
            "attention.out": "attn.c_proj",
            "attention_norm": "ln_1",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        layer_prefix="h.{}.",
        transposed=True,
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
        norm="layer",
        eps="layer_norm_epsilon",
        free_heads=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation="activation_function",
        gated=False,
        mlp_width="n_inner",
        rotary=False,
        requires={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "bert": Family(
        names={
            "embed": "embeddings.word_embeddings",
            "positions": "embeddings.position_embeddings",
            "types": "embeddings.token_type_embeddings",
            "embed_norm": "embeddings.LayerNorm",
            "attention.q": "attention.self.query",
            "attention.k": "attention.self.key",
            "attention.v": "attention.self.value",
            "attention.out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "mlp_norm": "output.LayerNorm",
        },
        layer_prefix="encoder.layer.{}.",
        ignored=(r"pooler\..*", r"cls\..*", r"embeddings\.position_ids"),
        encoder=True,
        norm="layer",
        eps="layer_norm_eps",
        free_heads=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        rotary=False,
        requires={
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "position_embedding_type": ("absolute", None),
        },
    ),
}

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
"""Name of an activation in configs -> its name in `jarm.llm.layers.ACTIVATIONS`."""


_QUANTISED = "The weights are quantised, which jarm does not read: take the model in bfloat16 or float32."
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), maybe(integer(1, 1000))),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), maybe(integer(1, 1 << 16))),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim"), maybe(integer(1, 1 << 24))),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), maybe(integer(1, 1 << 28))),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), maybe(integer(1, 1 << 28))),
    "sliding_window": maybe(integer(0, 1 << 28)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), number(0, 1)),
}
"""Settings of a config.json, and their range; transformers builds lists of `num_hidden_layers` entries."""


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Differences between layers.

    Attributes:
      window: positions that a token sees, its own included; None for all.
      rope: rotary positions, or None.
    """

    window: int | None
    rope: Rope | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All settings that decide the shapes and the arithmetic of a model; hashable, for a static argument.

    Two are of the devices, not of the checkpoint (`jarm.llm.sharding.suited`): `in_turn`, whether texts and heads are
    computed one after the other; and `capability`, the CUDA compute capability, 0 for devices without one.
    """

    family: str
    encoder: bool
    vocab: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    token_types: int
    layers: tuple[LayerConfig, ...]
    activation: str
    gated: bool
    norm: str
    norm_offset: float
    eps: float
    pre_norm: bool
    post_norm: bool
    qk_norm: str | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    parallel: bool
    learned_positions: bool
    attention_scale: float
    softcap: float | None
    embed_scale: float
    in_turn: bool = False
    capability: float = 0.0


def read_config(folder: pathlib.Path) -> ModelConfig:
    """Read the `config.json` of a checkpoint folder through `transformers.AutoConfig`, which fills in defaults.

    Args:
      folder: a checkpoint as Hugging Face writes it.

    Raises:
      JarmError: no config there, or a setting that jarm does not compute exactly.
    """
    path = folder / "config.json"
    _check_raw(folder)

    AutoConfig = import_transformers().AutoConfig

    try:
        hf = AutoConfig.from_pretrained(folder)
    except Exception as error:  # each library below has its own kinds
        reason = printable(" ".join(str(error).split()))[:500]
        raise JarmError(f"transformers does not accept {path}: {reason}") from error
    try:
        return convert_config(hf)
    except JarmError as error:
        raise JarmError(f"{path}: {printable(error)[:600]}") from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        kind = type(error).__name__
        raise JarmError(
            f"{path} has a value of a wrong type or size ({kind}: {printable(brief(error))[:200]}): download it again."
        ) from error


def _check_raw(folder: pathlib.Path) -> None:
    """Refuse what transformers would not say in a sentence, or what `convert_config` does not see."""
    adapter, path = folder / "adapter_config.json", folder / "config.json"
    if there(adapter):
        said = read_json(adapter, struct({}, {"peft_type": string(), "base_model_name_or_path": maybe(string())}))
        base = said.get("base_model_name_or_path") or "its base model"
        raise JarmError(
            f"{folder} holds a {printable(said.get('peft_type', 'PEFT'))[:80]} adapter (adapter_config.json) of "
            f"{printable(base)[:200]}, which jarm does not apply: merge the two with peft's `merge_and_unload` and "
            "save the result."
        )
    if not there(path):
        raise JarmError(f"{folder} is no checkpoint: it needs a config.json with a `model_type`.")
    raw = read_json(path, struct({}, _SIZES))
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise JarmError(f"{folder} is no checkpoint: it needs a config.json with a `model_type`.")
    if model_type not in FAMILIES:
        shown = printable(model_type)[:80]
        raise JarmError(f"Unknown model_type '{shown}' in {path}: jarm knows {', '.join(FAMILIES)}.")
    inner = raw.get("text_config") if FAMILIES[model_type].text_config else None
    if inner is not None:
        read_json(path, struct({"text_config": struct({}, _SIZES)}))
    for each in (raw, inner or {}):
        for name in ("quantization_config", "compression_config"):
            if each.get(name) is not None:
                raise JarmError(f"{path}: {_QUANTISED}")


def convert_config(hf: Any) -> ModelConfig:
    """The `ModelConfig` of a config object of transformers.

    Args:
      hf: a `PreTrainedConfig` of a family in `FAMILIES`.

    Raises:
      JarmError: an architecture, layer type, rope type, activation or setting that jarm does not have.
    """
    family_name = hf.model_type
    if family_name not in FAMILIES:
        raise JarmError(f"Unknown model_type '{family_name}': jarm knows {', '.join(FAMILIES)}.")
    family = FAMILIES[family_name]
    if getattr(hf, "quantization_config", None) is not None:
        raise JarmError(_QUANTISED)
    if family.text_config:
        hf = getattr(hf, family.text_config)
    causal = {} if family.encoder else {"is_causal": (True, None), "use_bidirectional_attention": (False, None)}
    for name, allowed in {**causal, **family.requires}.items():
        if (value := getattr(hf, name, allowed[0])) not in allowed:
            raise JarmError(f"`{name} = {value}` is a variant of {family_name} that jarm does not compute.")

    def setting(value: bool | str) -> bool:
        return bool(getattr(hf, value)) if isinstance(value, str) else value

    activation = getattr(hf, family.activation)
    if activation not in ACTIVATIONS:
        raise JarmError(f"Unknown activation '{printable(activation)[:80]}': jarm knows {', '.join(ACTIVATIONS)}.")
    width, heads = hf.hidden_size, hf.num_attention_heads
    head_dim = (family.free_heads and getattr(hf, "head_dim", None)) or width // heads
    kv_heads = (family.free_heads and getattr(hf, "num_key_value_heads", None)) or heads
    if head_dim < 1:
        raise JarmError(
            f"A hidden size of {width} is too small for {heads} attention heads: download the config again."
        )
    if heads % kv_heads:
        raise JarmError(f"{heads} attention heads cannot share {kv_heads} key-value heads: one must divide the other.")
    scale = getattr(hf, family.attention_scale) if family.attention_scale else head_dim
    softcap = getattr(hf, family.softcap) if family.softcap else None
    return ModelConfig(
        family=family_name,
        encoder=family.encoder,
        vocab=hf.vocab_size,
        width=width,
        mlp_width=getattr(hf, family.mlp_width) or 4 * width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=hf.max_position_embeddings,
        token_types=getattr(hf, "type_vocab_size", 0),
        layers=_layers(hf, family, head_dim),
        activation=ACTIVATIONS[activation],
        gated=family.gated,
        norm=family.norm,
        norm_offset=family.norm_offset,
        eps=float(getattr(hf, family.eps)),
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        qk_norm=family.qk_norm,
        qkv_bias=setting(family.qkv_bias),
        out_bias=setting(family.out_bias),
        mlp_bias=setting(family.mlp_bias),
        parallel=setting(family.parallel),
        learned_positions=not family.rotary,
        attention_scale=float(scale) ** -0.5,
        softcap=float(softcap) if softcap else None,
        embed_scale=width**0.5 if family.scale_embeddings else 1.0,
    )


def _layers(hf: Any, family: Family, head_dim: int) -> tuple[LayerConfig, ...]:
    depth, window = hf.num_hidden_layers, getattr(hf, "sliding_window", None)
    usual = "sliding_attention" if family.windows == "all" and window else "full_attention"
    types = list(getattr(hf, "layer_types", None) or [usual] * depth)
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise JarmError(f"Unknown layer type '{unknown[0]}': jarm knows full_attention and sliding_attention.")
    if len(types) != depth or (family.windows != "layer_types" and set(types) != {usual}):
        raise JarmError(f"`layer_types` does not fit a {hf.model_type} of {depth} layers: drop it from the config.")
    if "sliding_attention" in types and not window:
        raise JarmError("A layer is of the type sliding_attention, but there is no `sliding_window` in the config.")

    rotary = getattr(hf, family.rotary_layers) if family.rotary_layers else [1] * depth
    parameters = getattr(hf, "rope_parameters", None) or {}
    by_type = {name: parameters.get(name) if name in parameters else parameters for name in set(types)}

    def rope(layer: int) -> Rope | None:
        if not (family.rotary and rotary[layer]):
            return None
        return make_rope(by_type[types[layer]], head_dim, hf.max_position_embeddings, partial=family.partial_rotary)

    return tuple(
        LayerConfig(window=int(window) if window and types[i] == "sliding_attention" else None, rope=rope(i))
        for i in range(depth)
    )


def import_transformers() -> Any:
    """The package transformers, heavy and unused by those who only read embeddings; it misses no PyTorch aloud."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
    return transformers
