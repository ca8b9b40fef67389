"""[model] and [quantize.*]: the model, and its layers that compute in 8 bits."""

from __future__ import annotations

from typing import Literal

from quadriga.config.schema.section import Layers, Name, Names, Positive, Rows, Section, Width

Converter = Literal[
    "quantize.linear.float8", "quantize.linear.mx", "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"
]


class Model(Section):
    """The model: family, size, tokenizer, and overrides of single dimensions."""

    name: Name = "llama3"
    """Model family."""

    flavor: Name = "debugmodel"
    """Size within the family."""

    hf_assets_path: Name = "builtin:bytes"
    """Folder with `tokenizer.json` (or `tokenizer.model`), or `builtin:bytes`, which needs no files."""

    converters: tuple[Converter, ...] = ()
    """Conversions of the model before training. Each reads its table in `[quantize]`."""

    print_after_conversion: bool = False
    """Print the module tree after the conversions."""

    dim: Width | None = None
    """Override of the flavor: width of the model."""

    n_layers: Layers | None = None
    """Override of the flavor: number of transformer blocks."""

    n_heads: Width | None = None
    """Override of the flavor: attention heads."""

    n_kv_heads: Width | None = None
    """Override of the flavor: key and value heads; must divide the attention heads."""

    ffn_dim: Width | None = None
    """Override of the flavor: inner width of the feed-forward layers."""

    vocab_size: Rows | None = None
    """Override of the flavor: rows of the embedding; at least the size of the tokenizer."""

    rope_theta: Positive | None = None
    """Override of the flavor: base of the rotary frequencies."""

    rope_scaling: Literal["flavor", "none", "llama3.1", "llama3.2"] = "flavor"
    """Scaling of the rotary frequencies: that of the flavor, none (Llama 3), that of Llama 3.1, or of Llama 3.2."""

    tie_embeddings: bool | None = None
    """Override of the flavor: let the output layer share the weight of the embedding."""

    depth_init: bool = True
    """Standard deviation of initial `wo`, `w2`, `w3`: 0.02/sqrt(2(layer+1)), or with `false` 0.02/sqrt(2 n_layers)."""


class LinearFloat8(Section):
    """Linear layers in float8 (converter `quantize.linear.float8`)."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather sharded weights in float8 (tensorwise scaling only)."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights in one all-reduce after each step (with `enable_fsdp_float8_all_gather`)."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Scaling recipe; none is tensorwise with the two switches above."""

    filter_fqns: Names = ("output",)
    """Layers to exclude, by parts of their names; `auto_filter_small_kn` excludes layers too small to gain speed."""

    emulate: bool = False
    """Emulate float8 on hardware without it, in eager mode only."""


class LinearMX(Section):
    """Linear layers in microscaling formats (converter `quantize.linear.mx`)."""

    mxfp8_dim1_cast_kernel_choice: Literal["triton", "cuda", "torch"] = "triton"
    """Kernel of the cast along the second dimension."""

    recipe_name: Name = "mxfp8_cublas"
    """Microscaling recipe."""

    filter_fqns: Names = ("output",)
    """Layers to exclude, by parts of their names."""


class GroupedFloat8(Section):
    """Grouped matrix products of experts in float8 (mixture-of-experts models only)."""

    fqns: Names | str = ()
    """Modules to convert."""


class GroupedMX(Section):
    """Grouped matrix products of experts in microscaling formats (mixture-of-experts models only)."""

    recipe_name: Literal["mxfp8"] = "mxfp8"
    """Microscaling recipe."""

    fqns: Names | str = ()
    """Modules to convert."""


class Linear(Section):
    """Quantized linear layers."""

    float8: LinearFloat8 = LinearFloat8()
    mx: LinearMX = LinearMX()


class GroupedMM(Section):
    """Quantized grouped matrix products."""

    float8: GroupedFloat8 = GroupedFloat8()
    mx: GroupedMX = GroupedMX()


class Quantize(Section):
    """Settings of the converters. A table is read only if `model.converters` names it."""

    linear: Linear = Linear()
    grouped_mm: GroupedMM = GroupedMM()
