"""Known devices, with the figures of their data sheets."""

from dataclasses import dataclass

from spikescale.errors import UserError

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """A device that one rank trains on. Rates are those of `source`, none of them measured unless it says so.

    `matrix_peaks`: dense multiply-adds, counted as two operations, a second and by precision, with float32
    accumulation; float32 without TF32, which torch leaves off. `link`: bytes a second that one device sends
    to the others of its machine. `baseline`: bytes of a process before it holds a model: contexts,
    communicators, workspaces on a GPU (assumed); libraries on a CPU (measured).
    """

    name: str
    memory: int
    bandwidth: float
    matrix_peaks: dict[str, float]
    link: float
    host_link: float
    efficiency: float
    baseline: int
    source: str
    on_cpu: bool = False


GPU_BASELINE = round(1.2 * GIB)
GPU_EFFICIENCY = 0.5  # of the peak, for large matrix products within a training step; assumed
HOST_BASELINE = round(1.5 * GIB)  # libraries of a process that drives a GPU; assumed
CPU_BASELINE = round(0.4 * GIB)  # Python, torch, DeepSpeed and the compiled operators; measured

DEVICES = {
    "h100": Device(
        "NVIDIA H100 SXM 80 GB",
        80 * GIB,
        3350 * GIGA,
        {"bfloat16": 989.4 * TERA, "float32": 66.9 * TERA},
        450 * GIGA,
        64 * GIGA,
        GPU_EFFICIENCY,
        GPU_BASELINE,
        "NVIDIA H100 data sheet, dense rates",
    ),
    "a100-80": Device(
        "NVIDIA A100 SXM 80 GB",
        80 * GIB,
        2039 * GIGA,
        {"bfloat16": 312 * TERA, "float32": 19.5 * TERA},
        300 * GIGA,
        32 * GIGA,
        GPU_EFFICIENCY,
        GPU_BASELINE,
        "NVIDIA A100 data sheet, dense rates",
    ),
    "a100-40": Device(
        "NVIDIA A100 SXM 40 GB",
        40 * GIB,
        1555 * GIGA,
        {"bfloat16": 312 * TERA, "float32": 19.5 * TERA},
        300 * GIGA,
        32 * GIGA,
        GPU_EFFICIENCY,
        GPU_BASELINE,
        "NVIDIA A100 data sheet, dense rates",
    ),
    "mi300x": Device(
        "AMD Instinct MI300X",
        192 * GIB,
        5300 * GIGA,
        {"bfloat16": 1307.4 * TERA, "float32": 163.4 * TERA},
        448 * GIGA,
        64 * GIGA,
        GPU_EFFICIENCY,
        GPU_BASELINE,
        "AMD Instinct MI300X data sheet, dense rates",
    ),
    "rtx4090": Device(
        "NVIDIA GeForce RTX 4090",
        24 * GIB,
        1008 * GIGA,
        {"bfloat16": 165.2 * TERA, "float32": 82.6 * TERA},
        32 * GIGA,
        32 * GIGA,
        GPU_EFFICIENCY,
        GPU_BASELINE,
        "NVIDIA Ada architecture paper, dense rates",
    ),
    # The bandwidth is what operators reach within a step; a plain copy reaches 25 GB/s on an idle core.
    "cpu": Device(
        "CPU, one core a rank",
        12 * GIB,
        5 * GIGA,
        {"bfloat16": 0.2 * TERA, "float32": 0.087 * TERA},
        2 * GIGA,
        25 * GIGA,
        0.95,
        CPU_BASELINE,
        "measured on an AMD EPYC with avx512_bf16; the link is assumed",
        on_cpu=True,
    ),
}


def find_device(name: str) -> Device:
    """The device of a name. Raises UserError for an unknown one."""
    if name not in DEVICES:
        raise UserError(f"--device {name}: unknown; there are {', '.join(DEVICES)}")
    return DEVICES[name]
