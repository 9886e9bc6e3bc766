"""Compiler options for each platform, beyond XLA's defaults."""

import functools

import jax

# docs/tpu.md says how much each helped, and which others did not.
TPU_OPTIONS: dict[str, dict[str, str]] = {
    # Fast memory for each fusion, twice the default; 65536 doubles the time to compile.
    "resnet": {"xla_tpu_scoped_vmem_limit_kib": "32768"},
    # An array is copied to fast memory only if its uses there save 2.5 times the copies' bytes:
    # fewer bytes and less time to compile than by default.
    "vit": {"xla_tpu_msa_inefficient_use_to_copy_ratio": "2.5"},
}

CPU_OPTIONS = {
    # YNNPACK's defaults without convolutions: its own use one core where a kernel has fewer than
    # 128 outputs, Eigen's use all cores (docs/benchmarks.md).
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    ),
}


def compiler_options(platform: str, encoder: str | None = None) -> dict[str, str] | None:
    """The options to compile a network with; None means XLA's defaults.

    Args:
        platform: "cpu", "gpu" or "tpu".
        encoder: `config.model.encoder` of a train step, for which `TPU_OPTIONS` were chosen; None:
            without them.
    """
    if platform == "tpu":
        return dict(TPU_OPTIONS[encoder]) if encoder else None
    if platform == "cpu":
        return {k: v for k, v in CPU_OPTIONS.items() if _is_known(k, v)} or None
    return None


@functools.cache
def _is_known(name: str, value: str) -> bool:
    """Whether XLA's CPU backend accepts an option; an experimental one may be removed."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
