"""The DeepSpeed engine: its settings from ours, its gradients and weights."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikescale.config import RunConfig
from spikescale.errors import UserError
from spikescale.parallel import Layout
from spikescale.parallel.mpu import require_groups
from spikescale.parallel.shards import full_tensor, is_sharded
from spikescale.parallel.tensor import model_parallel_unit
from spikescale.training.bootstrap import Process
from spikescale.training.offload import optimizer_class, sharding_settings
from spikescale.training.parameter_groups import group_settings, grouped


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
    elif config.parallel.tensor > 1:
        obstacle = "parallel.tensor divides the vocabulary over ranks; use train.fused_loss = auto"
    elif config.train.loss_mask != "none":
        obstacle = "train.loss_mask needs the loss of each token; use train.fused_loss = auto"
    elif config.train.distill_from is not None:
        obstacle = "train.distill_from needs the logits"
    elif importlib.util.find_spec("fla") is None:
        obstacle = "flash-linear-attention is not installed (pip install 'spikescale[gpu]')"
    if config.train.fused_loss == "on" and obstacle:
        raise UserError(f"train.fused_loss = on: {obstacle}")
    return config.train.fused_loss != "off" and not obstacle


def micro_batching(config: RunConfig, data_parts: int) -> tuple[int, int]:
    """(sequences a rank and a forward pass, forward passes an optimizer step).

    `data_parts`: parts that the batch is divided into; the ranks, unless some of them share a model or
    a sequence.
    """
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    shared = config.parallel.tensor * config.parallel.context > 1
    ranks = "groups of ranks" if shared else "ranks"
    if batch % data_parts:
        raise UserError(f"train.batch_size = {batch}: must be a multiple of the {data_parts} {ranks}")
    per_rank = batch // data_parts
    micro = per_rank if micro is None else micro
    if per_rank % micro:
        raise UserError(
            f"train.micro_batch_size = {micro}: must divide the {per_rank} sequences a rank"
            f" (train.batch_size {batch} over {data_parts} {ranks})"
        )
    return micro, per_rank // micro


def deepspeed_settings(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """DeepSpeed's own configuration. It accepts unknown keys silently: nothing of the user's is passed on."""
    micro, accumulation = micro_batching(config, layout.data)
    settings: dict[str, Any] = {
        # As DeepSpeed counts it, for which ranks that read other parts of the same sequences read other ones.
        "train_batch_size": micro * accumulation * (layout.world_size // layout.tensor),
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.clip,
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": config.zero.reduce_bucket_size,
            "allgather_bucket_size": config.zero.allgather_bucket_size,
            **sharding_settings(config, layout.world_size // layout.tensor),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # `optimizer_class` chooses the Adam
        "steps_per_print": 10**9,
    }
    if layout.context > 1:
        # Gradients that are reduced while backward runs would have ranks wait for ranks that wait for them.
        settings["zero_optimization"]["overlap_comm"] = False
    if config.train.precision == "bfloat16":
        # Autocast over float32 weights: WKV, neurons and LayerNorm keep float32 parameters, which
        # DeepSpeed's bf16 mode would round. Gradients are summed over ranks in float32 too.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings


def build_optimizer(
    model: nn.Module, config: RunConfig, device: torch.device | None = None
) -> torch.optim.Optimizer:
    """Adam or AdamW over the groups of `parameter_groups`."""
    train = config.train
    groups = [
        {"params": parameters, **settings}
        for parameters, settings in zip(
            grouped(model.named_parameters(), config.model), _settings(config), strict=True
        )
    ]
    kind, own = optimizer_class(config, device or torch.device("cpu"))
    optimizer: torch.optim.Optimizer = kind(groups, lr=train.lr, betas=train.betas, eps=train.eps, **own)
    return optimizer


def _settings(config: RunConfig) -> list[dict[str, float]]:
    return group_settings(config.model, config.train.weight_decay)


def apply_optimizer_settings(engine: Any, config: RunConfig) -> None:
    """Put the settings of this run over those that a loaded checkpoint brought along."""
    train = config.train
    for group, own in zip(engine.optimizer.param_groups, _settings(config), strict=True):
        group.update(**own, betas=train.betas, eps=train.eps)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = train.clip


def build_engine(model: nn.Module, config: RunConfig, process: Process, layout: Layout) -> Any:
    """A DeepSpeed engine around `model`, sharded as `config.zero` says over the ranks with the same weights.

    Raises UserError if DeepSpeed does not keep to the groups of ranks that `layout` describes.
    """
    import deepspeed

    model.to(process.device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config, process.device),
        config=deepspeed_settings(config, layout),
        mpu=model_parallel_unit(layout),
        dist_init_required=False,
    )
    require_groups(engine, layout)
    return engine


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's whole gradient before clipping; None where DeepSpeed keeps none (stage 0)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def local_gradient_norm(model: nn.Module, tensor_group: Any = None) -> float:
    """Norm of the gradients held here: at ZeRO stage 0, before `engine.step()`, the whole gradient's.

    Where the model is divided, all ranks of its `tensor_group` call this together.
    """
    grads: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.grad is not None:
            grads[is_sharded(parameter)].append(parameter.grad)
    whole = torch.nn.utils.get_total_norm(grads[False])
    if tensor_group is None:
        return float(whole)
    parts = torch.nn.utils.get_total_norm(grads[True]).square()
    torch.distributed.all_reduce(parts, group=tensor_group)
    return float((whole.square() + parts).sqrt())


def full_weights(engine: Any, process: Process, tensor_group: Any = None) -> dict[str, torch.Tensor]:
    """Every parameter in float32 on the CPU, on rank 0; other ranks take part and get an empty dict.

    Under ZeRO 3, or with a model divided over a `tensor_group`, the parameters are gathered one at a time, so
    no rank ever holds two in full beside what rank 0 collects.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if process.is_main:
                    weights[name] = parameter.detach().to("cpu", torch.float32, copy=True)
            continue
        whole = full_tensor(parameter.detach(), parameter, tensor_group)
        if process.is_main and whole is not None:
            weights[name] = whole.to("cpu", torch.float32, copy=True)
    return weights
