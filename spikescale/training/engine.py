"""The DeepSpeed engine: its settings from ours, and a checkpoint reader that executes nothing."""

import importlib.util
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.training.bootstrap import Process


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that it is the faster choice."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    return any(feature in features for feature in ("avx512_bf16", "amx_bf16", " bf16"))


def uses_fused_loss(config: RunConfig, device: torch.device) -> bool:
    """Whether head and loss are one computation on this device. Raises UserError if they must but cannot."""
    obstacle = ""
    if device.type != "cuda":
        obstacle = f"its kernels run on GPUs, not on {device.type}"
    elif config.zero.stage == 3:
        obstacle = "zero.stage 3 shards the head's weights; use a stage up to 2"
    elif importlib.util.find_spec("fla") is None:
        obstacle = "flash-linear-attention is not installed (pip install 'spikescale[gpu]')"
    if config.train.fused_loss == "on" and obstacle:
        raise UserError(f"train.fused_loss = on: {obstacle}")
    return config.train.fused_loss != "off" and not obstacle


def micro_batching(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(sequences a rank and a forward pass, forward passes an optimizer step)."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch % world_size:
        raise UserError(f"train.batch_size = {batch}: must be a multiple of the {world_size} ranks")
    per_rank = batch // world_size
    micro = per_rank if micro is None else micro
    if per_rank % micro:
        raise UserError(
            f"train.micro_batch_size = {micro}: must divide the {per_rank} sequences a rank"
            f" (train.batch_size {batch} over {world_size} ranks)"
        )
    return micro, per_rank // micro


def deepspeed_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. It accepts unknown keys silently: nothing of the user's is passed on."""
    micro, accumulation = micro_batching(config, world_size)
    settings: dict[str, Any] = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.clip,
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "allgather_bucket_size": config.zero.allgather_bucket_size,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.train.precision == "bfloat16":
        # Autocast over float32 weights: WKV, neurons and LayerNorm keep float32 parameters, which
        # DeepSpeed's bf16 mode would round. Gradients are summed over ranks in float32 too.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Adam or AdamW. Weight decay applies to matrices only: decays, mixes and norms are not shrunk."""
    train = config.train
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def apply_optimizer_settings(engine: Any, config: RunConfig) -> None:
    """Put the settings of this run over those that a loaded checkpoint brought along."""
    train = config.train
    for group, decay in zip(engine.optimizer.param_groups, (train.weight_decay, 0.0), strict=True):
        group.update(weight_decay=decay, betas=train.betas, eps=train.eps)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = train.clip


def build_engine(model: nn.Module, config: RunConfig, process: Process) -> Any:
    """A DeepSpeed engine around `model`, sharded as `config.zero` says."""
    import deepspeed

    model.to(process.device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config),
        config=deepspeed_settings(config, process.world_size),
        dist_init_required=False,
    )
    engine.checkpoint_engine = restricted_reader(engine.checkpoint_engine)
    return engine


def restricted_reader(checkpoint_engine: Any) -> Any:
    """DeepSpeed's checkpoint engine, made to read tensors and plain values only.

    DeepSpeed unpickles whatever stands in a checkpoint. The classes below are all that its own
    checkpoints hold; a file that names any other is refused instead of executed.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

    def load(path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"names {found.group(1)}" if found else "is no pickle of tensors"
            raise UserError(f"{path}: {what}, which no checkpoint of ours holds; it was not loaded") from None

    checkpoint_engine.load = load
    return checkpoint_engine


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's whole gradient before clipping; None where DeepSpeed keeps none (stage 0)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def local_gradient_norm(model: nn.Module) -> float:
    """Norm of the gradients held here: at ZeRO stage 0, before `engine.step()`, the whole gradient's."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def full_weights(engine: Any, process: Process) -> dict[str, torch.Tensor]:
    """Every parameter in float32 on the CPU, on rank 0; other ranks take part and get an empty dict.

    Under ZeRO 3 the parameters are gathered one at a time, so no rank ever holds two in full beside
    what rank 0 collects.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if process.is_main:
                    weights[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        elif process.is_main:
            weights[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return weights
