"""Rotary position embedding: inverse frequencies for every supported scaling, old spellings and new.

transformers 5 writes `rope_parameters` ({rope_type, rope_theta, ...}, or one such object per layer type); older
files have `rope_theta` and an optional `rope_scaling` with the kind in `rope_type` or `type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from trio_llm.errors import UnsupportedError
from trio_llm.model.config import ModelConfig

DEFAULT_THETA = 10_000.0


@attrs.frozen(eq=False)
class Rope:
    """Frequencies of one kind of layer.

    Attributes:
        inv_freq: [D / 2] float32; zero for dimensions that are not rotated.
        factor: Multiplies cos and sin (YaRN's attention factor, else 1).
    """

    inv_freq: Tensor
    factor: float = 1.0

    def to(self, device: torch.device) -> Rope:
        return Rope(self.inv_freq.to(device), self.factor)


def make_rope(config: ModelConfig, head_dim: int, layer_type: str | None = None) -> Rope:
    """Build the rope that config.json names.

    Args:
        config: The text config.
        layer_type: Selects among per-layer-type parameters ("full_attention", "sliding_attention").
    Raises:
        UnsupportedError: The rope type is not supported.
    """
    params = _parameters(config, layer_type)
    kind = params.get_str("rope_type", params.values.get("type") or "default")
    if kind not in _KINDS:
        raise UnsupportedError(f"{params.source}: rope_type {kind!r} is not supported; {', '.join(_KINDS)} are")
    theta = params.get_float("rope_theta", config.values.get("rope_theta") or DEFAULT_THETA)
    return _KINDS[kind](params, config, theta, head_dim)


def _parameters(config: ModelConfig, layer_type: str | None) -> ModelConfig:
    for key in ("rope_parameters", "rope_scaling"):
        if config.has(key):
            params = config.section(key)
            return params.section(layer_type) if layer_type and params.has(layer_type) else params
    return ModelConfig({}, config.source)


def _base(theta: float, dim: int) -> Tensor:
    """Return theta^(-2i/dim) for i < dim/2, in float32 as the reference computes it."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _default(params: ModelConfig, config: ModelConfig, theta: float, head_dim: int) -> Rope:
    if params.get_float("partial_rotary_factor", config.get_float("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError(f"{params.source}: partial_rotary_factor is supported for rope_type proportional only")
    return Rope(_base(theta, head_dim))


def _linear(params: ModelConfig, config: ModelConfig, theta: float, head_dim: int) -> Rope:
    return Rope(_default(params, config, theta, head_dim).inv_freq / params.get_float("factor"))


def _llama3(params: ModelConfig, config: ModelConfig, theta: float, head_dim: int) -> Rope:
    """Stretch long wavelengths by `factor`, keep short ones, blend in between (Llama 3.1)."""
    freq = _default(params, config, theta, head_dim).inv_freq
    factor = params.get_float("factor")
    low, high = params.get_float("low_freq_factor"), params.get_float("high_freq_factor")
    original = params.get_int("original_max_position_embeddings")
    wavelength = 2 * math.pi / freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * freq / factor + blend * freq
    stretched = torch.where(wavelength > original / low, freq / factor, freq)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return Rope(torch.where(medium, blended, stretched))


def _yarn(params: ModelConfig, config: ModelConfig, theta: float, head_dim: int) -> Rope:
    """Interpolate slow dimensions, keep fast ones, ramp in between.

    Source: Peng et al. 2023 (arXiv:2309.00071), sections 3.2 and 3.4.
    """
    factor = params.get_float("factor")
    original = params.get_int("original_max_position_embeddings", config.get_int("max_position_embeddings"))

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(params.get_float("beta_fast", 32.0)), dimension(params.get_float("beta_slow", 1.0))
    if params.get_bool("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001  # the reference's guard against a ramp of zero width
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    freq = _default(params, config, theta, head_dim).inv_freq
    return Rope(freq / factor * interpolated + freq * (1 - interpolated), _yarn_factor(params, factor))


def _yarn_factor(params: ModelConfig, factor: float) -> float:
    def mscale(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if params.has("attention_factor"):
        return params.get_float("attention_factor")
    if params.has("mscale") and params.has("mscale_all_dim"):
        return mscale(params.get_float("mscale")) / mscale(params.get_float("mscale_all_dim"))
    return mscale(1.0)


def _proportional(params: ModelConfig, _: ModelConfig, theta: float, head_dim: int) -> Rope:
    """Rotate the first part of the dimensions only, with frequencies spread over the full head size (Gemma 4)."""
    freq = _base(theta, head_dim) / params.get_float("factor", 1.0)
    rotated = int(params.get_float("partial_rotary_factor", 1.0) * head_dim // 2)
    freq[rotated:] = 0.0
    return Rope(freq)


def _frequency_factors(params: ModelConfig, config: ModelConfig, theta: float, head_dim: int) -> Rope:
    """Divide each frequency by its own factor: GGUF stores Llama 3's scaling this way."""
    freq = _default(params, config, theta, head_dim).inv_freq
    return Rope(freq / torch.tensor(params.floats("factors", len(freq))))


_KINDS: dict[str, Callable[[ModelConfig, ModelConfig, float, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
    "frequency_factors": _frequency_factors,
}
