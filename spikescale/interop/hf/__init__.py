"""SpikeGPT as transformers knows models: importing this registers its classes with the Auto classes.

    import spikescale.interop.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("exported/mine")

The folder comes from `spikescale export RUN FOLDER --format hf`, or from `save_pretrained`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from spikescale.interop.hf.cache import RecurrentCache
from spikescale.interop.hf.causal_lm import SpikeGPTForCausalLM
from spikescale.interop.hf.classification import SpikeGPTForSequenceClassification
from spikescale.interop.hf.configuration import SpikeGPTConfig
from spikescale.interop.hf.modeling import SpikeGPTModel, SpikeGPTPreTrainedModel

__all__ = [
    "RecurrentCache",
    "SpikeGPTConfig",
    "SpikeGPTForCausalLM",
    "SpikeGPTForSequenceClassification",
    "SpikeGPTModel",
    "SpikeGPTPreTrainedModel",
]

AutoConfig.register(SpikeGPTConfig.model_type, SpikeGPTConfig, exist_ok=True)
AutoModel.register(SpikeGPTConfig, SpikeGPTModel, exist_ok=True)
AutoModelForCausalLM.register(SpikeGPTConfig, SpikeGPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SpikeGPTConfig, SpikeGPTForSequenceClassification, exist_ok=True)
