"""Sharded weights (FSDP2), and the other engines of accelerate, which are rejected.

Processes make different numbers of passes in an attack, so a collective inside a pass would hang. All attacks of an
update, and all validation, therefore run with *gathered* weights: each process holds the whole network for that long
and frees it before the training forward, which gathers layer by layer. Sharded at rest are weights, gradients and the
optimizer's state.

Checkpoints hold whole tensors, as those of one process do: a run may continue with a different engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ham_hf.invocation import shown_path
from ham_hf.training.environment import REFUSED, SHARDING, is_on

if TYPE_CHECKING:
    from ham_hf.training.config import TrainingConfig

_DDP, _FSDP = shown_path("accelerate/ddp.yaml"), shown_path("accelerate/fsdp.yaml")
_INSTEAD = f"use {_DDP} or {_FSDP}"


def sharding_plugin(environment: Mapping[str, str] = os.environ) -> FullyShardedDataParallelPlugin | None:
    """The launcher's options for sharding; None if weights are not to be sharded.

    Raises:
        ValueError: if the launcher asks for an engine, or an option of one, that this training cannot use.
    """
    for name, why in REFUSED.items():
        if is_on(environment, name):
            raise ValueError(f"accelerate launch asks for {why} ({name}=true); {_INSTEAD}")
    if not is_on(environment, "ACCELERATE_USE_FSDP"):
        return None
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "accelerate launch asks for FSDP 1, whose weights cannot be gathered for an attack; set fsdp_version: 2 "
            f"in the launch configuration, as {_FSDP} does"
        )
    for name, what in SHARDING.items():
        if what and (is_on(environment, name) or (name == "FSDP_IGNORED_MODULES" and environment.get(name))):
            raise ValueError(f"the launch configuration sets {what}; set it to false or leave it out, as {_FSDP} does")
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            f"the launch configuration sets dynamo_backend {environment['ACCELERATE_DYNAMO_BACKEND']}, which cannot "
            f"go with FSDP here; set it to 'no', or use {_DDP} with --torch_compile"
        )
    if not hasattr(FSDPModule, "set_reshard_after_forward"):
        raise ValueError(f"FSDP needs a newer torch than {torch.__version__}, say 2.8; or {_INSTEAD.split(' or ')[0]}")
    try:
        plugin = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise ValueError(
            f"accelerate cannot read the FSDP options of the launch configuration ({error}); write them as "
            f"{_FSDP} does"
        ) from error
    # Autocast decides what is computed in bf16, as everywhere else; this would round the pixels themselves.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return plugin


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let accelerate shard on CPUs too: by itself it takes FSDP for accelerators only and falls back to DDP."""
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = plugin
        # Both hold it, and each is read.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def check_sharded_settings(config: TrainingConfig, *, uses_fawa: bool) -> None:
    """Reject settings that need whole weights at every update; the error names each."""
    if config.mixed_precision == "fp16":
        raise ValueError(
            f"--mixed_precision fp16 scales the loss, which was not tried with sharded weights; use bf16, or {_DDP}"
        )
    refused = {
        f"--ema_decay {config.ema_decay}": (config.ema_decay is not None, "leave it out"),
        "fairness-gated averaging (--fawa)": (uses_fawa, "take --fawa off"),
        f"--awp_gamma {config.awp_gamma}": (config.awp_gamma is not None, "leave it out"),
        "--torch_compile": (config.torch_compile, "leave it out"),
    }
    for what, (asked_for, fix) in refused.items():
        if asked_for:
            raise ValueError(
                f"{what} needs whole weights at every update, and FSDP shards them; {fix}, or launch with {_DDP}"
            )


def memory_format_of(config: TrainingConfig, accelerator: Accelerator) -> torch.memory_format:
    """The layout of weights and images: only contiguous weights can be sharded."""
    channels_last = config.memory_format == "channels_last" and not accelerator.is_fsdp2
    return torch.channels_last if channels_last else torch.contiguous_format


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """``accelerator.prepare``, with autocast around a sharded model too, as around any other."""
    if accelerator.is_fsdp2 and accelerator.native_amp:
        forward = cast(Callable[..., Tensor], model.forward)

        def autocast_forward(x: Tensor) -> Tensor:
            with accelerator.autocast():
                return forward(x)

        model.forward = convert_outputs_to_fp32(autocast_forward)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    parts = _sharded_parts(wrapped)
    for before, part in zip([*parts[:1], *parts], parts, strict=False):
        # By default the backward gathers ahead in the order of all forwards since the last backward, those of attacks
        # included. Their number differs with the process, and so would the order of collectives.
        part.set_modules_to_backward_prefetch([before])
    return wrapped, prepared


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def gathered(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Hold the whole network on every process, for gradients of inputs; call it on all processes."""
    parts = _sharded_parts(module)
    if not parts:
        yield
        return
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        again = accelerator.state.fsdp_plugin.reshard_after_forward
        for number, part in enumerate(parts):
            part.reshard()
            # What the outermost module holds itself is needed at once in the backward: FSDP's own rule keeps it.
            part.set_reshard_after_forward(again and number > 0, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.set_requires_gradient_sync(True, recurse=False)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is on this process; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with whole tensors instead of sharded ones, on the CPU; call it on all processes."""
    return cast("dict[str, Any]", tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), state))


def load_model(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module, sharded or not; call it on all processes."""
    own = module.state_dict()
    module.load_state_dict({name: _like(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the whole tensors of an optimizer's state, sharded or not; call it on all processes."""
    # torch numbers parameters in the order of the groups.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        number: {name: _like(parameters[number], value) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})


def _like(own: object, value: object) -> object:
    """``value`` sharded as ``own`` is, where that is sharded and of the same shape."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and own.shape == value.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
