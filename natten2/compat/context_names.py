"""The flags of `natten.context`, by what they do."""

from __future__ import annotations

HAS = (
    "has_bfloat",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
)
SWITCHES = {
    "use_deterministic_algorithms": "deterministic",
    "use_gemm_na": "gemm_na",
    "use_kv_parallelism_in_fused_na": "kv_parallelism",
    "use_tf32_in_gemm_na": "tf32",
    "use_tiled_na": "tiled_na",
}
STATES = {
    "are_deterministic_algorithms_enabled": ("deterministic", False),
    "is_autotuner_enabled_for_backward": ("autotune_backward", False),
    "is_autotuner_enabled_for_forward": ("autotune_forward", False),
    "is_autotuner_thorough_for_backward": ("thorough_backward", False),
    "is_autotuner_thorough_for_forward": ("thorough_forward", False),
    "is_flex_compile_allowed": ("flex_compile", False),
    "is_flex_compile_backprop_allowed": ("flex_compile_backprop", False),
    "is_fna_enabled": ("fused_na", False),
    "is_fused_na_enabled": ("fused_na", False),
    "is_gemm_na_enabled": ("gemm_na", True),
    "is_kv_parallelism_in_fused_na_enabled": ("kv_parallelism", True),
    "is_tf32_in_gemm_na_enabled": ("tf32", False),
    "is_tiled_na_enabled": ("tiled_na", True),
}
OLD_SWITCHES = {
    f"{verb}_{name}": (flag, verb == "enable")
    for verb in ("enable", "disable")
    for name, flag in (("gemm_na", "gemm_na"), ("tf32", "tf32"), ("tiled_na", "tiled_na"))
}
_FUNCTIONS = {
    "memory": (
        "get_memory_usage_preference",
        "is_memory_usage_default",
        "is_memory_usage_strict",
        "is_memory_usage_unrestricted",
        "set_memory_usage_preference",
    ),
    "flex": (
        "allow_flex_compile",
        "allow_flex_compile_backprop",
        "disable_flex_compile",
        "disable_flex_compile_backprop",
    ),
    "fused": (
        "disable_autotuner",
        "force_flex_attention",
        "is_autotuner_enabled",
        "use_autotuner",
        "use_flex_attention",
        "use_fna",
        "use_fused_na",
    ),
}
_SHARED = (
    "are_deterministic_algorithms_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
)
V15 = ("has_cuda", *(name for name in HAS if name not in ("has_fna", "has_fused_na")), *OLD_SWITCHES)
V21 = (
    *_SHARED,
    *_FUNCTIONS["memory"],
    *_FUNCTIONS["flex"],
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
)
V17 = (
    "has_cuda",
    *HAS,
    *SWITCHES,
    *(name for name in STATES if "flex" not in name),
    *OLD_SWITCHES,
    *_FUNCTIONS["memory"],
    *_FUNCTIONS["fused"],
)
ALL = tuple(sorted({*V15, *V17, *V21}))
