"""Spikes as bits on GPUs: one Triton kernel each way. No operators: packed bits are never differentiated.

The flattened tensor is cut into blocks of 8 BLOCK elements, a program each. Beside its bits a program keeps a
flag: whether anything in the block was neither 0 nor 1. To read the flags, the CPU has to wait for the GPU.
Whoever is sure of the spikes need not: then the flags stay with the bits, and a block with a flag is unpacked
as NaN.
"""

# A kernel's parameters have Triton's types.
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from spikescale.kernels import gpu

BLOCK = 1024  # bytes of one program


@triton.jit
def pack_kernel(spikes, bits, flags, size, BLOCK: tl.constexpr):
    byte, element, place = _elements(BLOCK)
    inside = element < size
    spike = tl.load(spikes + element, mask=inside, other=0.0).to(tl.float32)
    fired = spike == 1.0
    word = tl.sum(fired.to(tl.int32) << place[None, :], 1)
    tl.store(bits + byte, word.to(tl.uint8), mask=byte * 8 < size)
    strange = tl.where(fired, False, spike != 0.0)
    tl.store(flags + tl.program_id(0), tl.max(tl.max(strange.to(tl.int32), 1), 0).to(tl.uint8))


@triton.jit
def unpack_kernel(bits, flags, spikes, size, BLOCK: tl.constexpr):
    byte, element, place = _elements(BLOCK)
    word = tl.load(bits + byte, mask=byte * 8 < size, other=0).to(tl.int32)
    spike = ((word[:, None] >> place[None, :]) & 1).to(tl.float32)
    if flags is not None:
        spike = tl.where(tl.load(flags + tl.program_id(0)) != 0, float("nan"), spike)
    tl.store(spikes + element, spike.to(spikes.dtype.element_ty), mask=element < size)


@triton.jit
def _elements(BLOCK: tl.constexpr):
    """This program's bytes (BLOCK,), their elements (BLOCK, 8), and the places of these in a byte (8,)."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)
    return byte, byte[:, None] * 8 + place[None, :], place


def pack_spikes_triton(spikes: Tensor, sure: bool = False) -> Tensor | None:
    """As `pack_spikes`, for float32, bfloat16 and float16 on a GPU; as `pack_sure_spikes` if `sure`."""
    spikes = spikes.detach().contiguous()
    size = spikes.numel()
    count, programs = _bytes(size), triton.cdiv(_bytes(size), BLOCK)
    packed = torch.empty(count + programs, dtype=torch.uint8, device=spikes.device)
    bits, flags = packed.split((count, programs))
    if size:
        with gpu.on_device(spikes):
            pack_kernel[(programs,)](
                spikes, bits, flags, size, BLOCK=BLOCK, num_warps=gpu.warps(256), enable_fp_fusion=False
            )
    if sure:
        return packed
    return None if bool(flags.any()) else bits


def unpack_spikes_triton(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As `unpack_spikes`, on a GPU."""
    spikes = torch.empty(shape, dtype=dtype, device=bits.device)
    size = spikes.numel()
    flags = bits[_bytes(size) :]
    if size:
        with gpu.on_device(bits):
            unpack_kernel[(triton.cdiv(_bytes(size), BLOCK),)](
                bits, flags if flags.numel() else None, spikes, size,
                BLOCK=BLOCK, num_warps=gpu.warps(256), enable_fp_fusion=False,
            )  # fmt: skip
    return spikes


def _bytes(size: int) -> int:
    return -(-size // 8)
