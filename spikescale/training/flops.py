"""How much arithmetic a token costs, and how much this machine can do."""

import time

import torch

from spikescale.config import ModelConfig


def training_flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of forward and backward for one token: 6 for each weight of a Linear.

    The embedding is a lookup and costs none; WKV, neurons, norms and mixes are left out (a few
    hundred operations a channel, against 78 d for the projections), so a share of the peak computed
    from this is a slight understatement.
    """
    d = config.width
    projections = config.layers * 13 * d * d + d * int(config.vocab_size or 0)
    return 6 * projections


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of one large matrix product on this process's device and threads, the best of several."""
    size = 4096 if device.type == "cuda" else 768
    # From a generator of its own: measuring must not move the random numbers that training draws.
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
