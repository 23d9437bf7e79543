"""Eight bits for weights and activations of a trained model, by torchao: for inference."""

from spikescale.quantization.int8 import apply_int8, is_quantized, quantized_tensors
from spikescale.quantization.settings import Quantization

__all__ = ["Quantization", "apply_int8", "is_quantized", "quantized_tensors"]
