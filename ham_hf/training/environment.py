"""Environment variables that accelerate and torch read, and how each is handled.

The settings alone define a run. A variable that would change its numbers is therefore fixed (a setting overrules it),
rejected, or recorded in ``report.json``; one that makes libraries round float32 also causes a warning. The launcher
chooses the number of processes and the device, and ``report.json`` records both. The other variables are harmless,
for the reason beside them. A ``*`` in a name stands for any characters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

import yaml

FIXED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--gradient_accumulation_steps decides, not the launcher's {}",
    "ACCELERATE_MIXED_PRECISION": "--mixed_precision decides, not the launcher's {}",
    "ACCELERATE_DYNAMO_BACKEND": "--torch_compile decides, not the launcher's dynamo_backend {}",
    "ACCELERATE_FP8_BACKEND": "--mixed_precision decides and has no FP8: the launcher's fp8_backend {} is not used",
}
"""Variables that a setting overrules, and the warning where they ask for something else."""

_NEUTRAL = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto")}
"""Values of `FIXED` that ask for nothing, besides "no"."""

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: its engine owns the backward, and attacks need gradients of images",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: it trains the transformers that it defines itself, not timm's",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism: images are split by rows alone",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism, which is not tested here",
}
"""Variables that ask for an engine which cannot run attacks, and why."""

SHARDING = {
    "ACCELERATE_USE_FSDP": "",
    "FSDP_VERSION": "",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: true; an attack would move every weight at every step",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: true; dropout would differ when recomputed",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "fsdp_cpu_ram_efficient_loading: true; it cannot carry the buffers of a network"
    ),
    "FSDP_IGNORED_MODULES": "fsdp_ignored_modules; nothing would sum the gradients of such a part over processes",
}
"""Variables of sharding that `ham_hf.training.sharding` reads, and why it refuses an option that is on."""

LAYOUT = {
    "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": -1, "MASTER_PORT": 0,
    "PMI_SIZE": 1, "OMPI_COMM_WORLD_SIZE": 1, "MV2_COMM_WORLD_SIZE": 1,
    "PMI_RANK": 0, "OMPI_COMM_WORLD_RANK": 0, "MV2_COMM_WORLD_RANK": 0,
    "MPI_LOCALRANKID": 0, "OMPI_COMM_WORLD_LOCAL_RANK": 0, "MV2_COMM_WORLD_LOCAL_RANK": 0,
    "MPI_LOCALNRANKS": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 1, "MV2_COMM_WORLD_LOCAL_SIZE": 1,
}  # fmt: skip
"""Numbers that connect processes, and the least each may be."""

DEVICE = {
    "MASTER_ADDR": "where processes meet",
    "ACCELERATE_USE_CPU": "the same as --use_cpu; the report names the device",
    "ACCELERATE_TORCH_DEVICE": "the report names the device; checked, and not with --use_cpu or several processes",
    "USE_TORCH_XLA": "whether TPUs are used; the report names the device",
    "PJRT_DEVICE": "which kind of TPU runtime; the report names the device",
    "*_VISIBLE_DEVICES": "which devices there are; the report names the device",
    "HABANA_VISIBLE_MODULES": "which devices there are; the report names the device",
    "NEURON_RT_VISIBLE_CORES": "which devices there are; the report names the device",
    "ZE_AFFINITY_MASK": "which devices there are; the report names the device",
    "OMP_NUM_THREADS": "threads of a process; the report gives their number",
}
"""Variables of which the report tells the effect: the device, the number of processes and threads."""

ROUNDING = {
    "NVIDIA_TF32_OVERRIDE": ("1",),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("1", "on", "yes", "true", "y"),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("bf16", "f16", "tf32", "any"),
    "DNNL_DEFAULT_FPMATH_MODE": ("bf16", "f16", "tf32", "any"),
    "ACCELERATE_DOWNCAST_BF16": ("1", "true", "yes", "on"),
    "XLA_USE_BF16": ("1",),
    "XLA_DOWNCAST_BF16": ("1",),
}
"""Variables that make libraries round float32 numbers, and the values that do so: recorded, with a warning."""

RECORDED = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DISABLE_ADDMM_CUDA_LT", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "NCCL_ALGO", "NCCL_PROTO", "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_MIOPEN_SUGGEST_NHWC", "PYTORCH_TUNABLEOP_ENABLED", "PT_HPU_LAZY_MODE",
    "TIMM_FUSED_ATTN", "TORCHDYNAMO_DISABLE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_BLAS_PREFER_HIPBLASLT",
    "TORCH_COMPILE_DISABLE",
)  # fmt: skip
"""Variables that choose between ways to compute the same, which differ in the last bits."""

HARMLESS: Mapping[str, Sequence[str]] = yaml.safe_load(
    (files("ham_hf.training") / "harmless_variables.yaml").read_text(encoding="utf-8")
)
"""Variables that change no number, by the reason."""

AT_IMPORT = ("USE_TORCH_XLA", "ACCELERATE_ENABLE_RICH")
"""Flags that accelerate reads on import; its error for an invalid value does not name them."""
_FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY",
          "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC",
          "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "ACCELERATE_USE_MEGATRON_LM", "FORK_LAUNCHED")  # fmt: skip
_SHARDING_FLAGS = ("FSDP_OFFLOAD_PARAMS", "FSDP_USE_ORIG_PARAMS", "FSDP_SYNC_MODULE_STATES", "FSDP_FORWARD_PREFETCH",
                   "FSDP_ACTIVATION_CHECKPOINTING", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD",
                   "FSDP_CPU_RAM_EFFICIENT_LOADING")  # fmt: skip
_ON, _OFF = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
_MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_OURS = re.compile(r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_\w+")


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable is set to one of the words that accelerate takes for yes."""
    return environment.get(name, "no").lower() in _ON


def fate(name: str) -> str | None:
    """Name of the list of this module that holds a variable; None if none does."""
    lists: dict[str, Sequence[str] | Mapping[str, object]] = {
        "fixed": FIXED,
        "refused": REFUSED,
        "sharding": SHARDING,
        "layout": LAYOUT,
        "device": DEVICE,
        "rounding": ROUNDING,
        "recorded": RECORDED,
        "harmless": [name for names in HARMLESS.values() for name in names],
    }
    for which, known in lists.items():
        if any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) for pattern in known):
            return which
    return None


def check_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Reject values that accelerate or torch would fail on; the error names the variable and the fix."""
    for name, least in LAYOUT.items():
        value = environment.get(name, str(least))
        if not re.fullmatch(r"\s*[-+]?[0-9]{1,9}\s*", value) or int(value) < least:
            raise ValueError(
                f"{_shown(name, value)} in the environment: expected a whole number of at least {least}; unset it, or "
                "start the run with accelerate launch, which sets it"
            )
    check_flags(_FLAGS, environment)
    if is_on(environment, "ACCELERATE_USE_FSDP"):
        check_flags(_SHARDING_FLAGS, environment)
    world, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if rank >= world:
        raise ValueError(
            f"RANK={rank} in the environment: expected less than WORLD_SIZE, which is "
            f"{environment.get('WORLD_SIZE', 'not set')}; unset both, or start the run with accelerate launch"
        )
    by = "LOCAL_RANK" if int(environment.get("LOCAL_RANK", "-1")) >= 0 else "WORLD_SIZE" if world > 1 else None
    missing = [name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if by is not None and missing:
        raise ValueError(
            f"{_shown(by, environment[by])} in the environment says that a launcher started this process, and "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: unset {by} for a run of one "
            "process, or start the run with accelerate launch"
        )


def check_flags(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Reject variables that are set to neither yes nor no; the error names the variable and the fix."""
    for name in names:
        value = environment.get(name, "no")
        if value.lower() not in _ON + _OFF:
            raise ValueError(f"{_shown(name, value)} in the environment: expected true or false; unset it, or set one")


def mpi_processes(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """The variable by which MPI says how many processes it has started, and their number; None without MPI."""
    for name in _MPI_SIZES:
        if name in environment:
            return name, int(environment[name])
    return None


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among those that were launched together, on CPUs also by MPI; else 0."""
    names = ("RANK", *_MPI_RANKS) if is_on(environment, "ACCELERATE_USE_CPU") else ("RANK",)
    value = next((environment[name] for name in names if name in environment), "0").strip()
    return int(value) if value.isdecimal() else 0


def overruled(environment: Mapping[str, str] = os.environ, *, mixed_precision: str = "no") -> Iterator[str]:
    """One sentence for each variable that a setting overrules."""
    for name, sentence in FIXED.items():
        value = environment.get(name, "no")
        decided = (mixed_precision,) if name == "ACCELERATE_MIXED_PRECISION" else ()
        if value.lower() not in ("", "no", *decided, *_NEUTRAL.get(name, ())):
            yield sentence.format(value)


def rounding(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """One sentence for each variable that makes a library round float32 numbers."""
    return tuple(
        f"{_shown(name, environment[name])} was set in the environment, which makes libraries round float32 numbers."
        for name, values in ROUNDING.items()
        if environment.get(name, "").lower() in values
    )


def unknown(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Variables named like accelerate's that are in none of the lists: of another version, or misspelled."""
    return tuple(sorted(name for name in environment if _OURS.fullmatch(name) and fate(name) is None))


def recorded(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """``NAME=value`` of all variables that may change numbers, for the report; none of them can hold a secret."""
    names = (*RECORDED, *ROUNDING, "ACCELERATE_USE_FSDP")
    return tuple(sorted({_shown(name, environment[name]) for name in names if environment.get(name)}))


def _shown(name: str, value: str) -> str:
    return f"{name}={value[:40]}" if value.strip() else f"{name}= (empty)"
