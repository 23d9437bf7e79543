"""`cpu.cpp` bound with ctypes: the structures that it reads, and the library."""

import ctypes
import functools
from pathlib import Path

from spikescale.kernels.cpu import load_for
from spikescale.kernels.decode.layout import PANEL

FLOAT32, WIDENED, BFLOAT16 = range(3)  # `Arithmetic` in matmul.h
NEURONS = {"none": 0, "heaviside": 1, "lif": 2}  # `Neuron` in steps.h


class LifOptions(ctypes.Structure):
    """`LifOptions` in steps.h."""

    _fields_ = [
        ("tau", ctypes.c_float),
        ("v_threshold", ctypes.c_float),
        ("v_reset", ctypes.c_float),
        ("soft_reset", ctypes.c_int32),
    ]


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Layer(ctypes.Structure):
    """`Layer` in cpu.cpp: pointers only."""

    _fields_ = _fields(
        ctypes.c_void_p,
        "ln1_weight ln1_bias ln2_weight ln2_bias mu_key mu_value mu_receptance w u channel_mu_key"
        " channel_mu_receptance time_in time_out channel_in channel_out shift wkv_mean wkv_b wkv_base wkv_age"
        " channel_shift v_key v_value v_receptance v_output v_time v_channel_key v_channel_receptance"
        " v_activation v_channel_value v_channel",
    )


class Model(ctypes.Structure):
    """`Model` in cpu.cpp."""

    _fields_ = [
        *_fields(ctypes.c_int64, "layer_count width inner vocabulary batch"),
        *_fields(
            ctypes.c_void_p,
            "layers embedding ln0_weight ln0_bias ln_out_weight ln_out_bias head v_head stream gate"
            " mixed_0 mixed_1 mixed_2 wide",
        ),
        ("eps", ctypes.c_double),
        ("grid", ctypes.c_float),
        *_fields(ctypes.c_int32, "binary_embedding neuron arithmetic skip_zeros"),
        ("lif", LifOptions),
    ]


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    """The engine compiled for `backend`, built at the first call. Raises BuildError."""
    lib = load_for(backend, Path(__file__).with_name("cpu.cpp"))
    lib.decode_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32]
    lib.decode_step.restype = ctypes.c_int64
    lib.decode_activations.argtypes = [ctypes.c_int64, ctypes.c_int64]
    lib.decode_activations.restype = ctypes.c_int64
    lib.decode_advise.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    lib.decode_advise.restype = None
    assert lib.decode_panel() == PANEL
    return lib
