"""SpikeGPT as a classifier: the mean over a text's vectors and a small network (SpikeGPT Sec. 3.6)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from spikescale.finetune.pooling import ClassificationHead, mean_over_text
from spikescale.interop.hf.configuration import SpikeGPTConfig
from spikescale.interop.hf.modeling import SpikeGPTModel, SpikeGPTPreTrainedModel


class SpikeGPTForSequenceClassification(SpikeGPTPreTrainedModel):
    """Labels of whole texts; padding may be on either side, given an attention mask."""

    def __init__(self, config: SpikeGPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = SpikeGPTModel(config)
        inner = config.classifier_hidden_size or config.hidden_size
        self.classifier = ClassificationHead(
            config.hidden_size, inner, config.num_labels, config.classifier_dropout
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits (B, labels), and with `labels` the loss.

        By `config.problem_type`, or else by the labels: mean squared error for one number (B,), cross-entropy
        in nats for class numbers (B,) int64, binary cross-entropy for several labels (B, labels). Without
        `attention_mask` every token counts.
        """
        others.pop("num_items_in_batch", None)
        others["use_cache"] = False
        read = self.backbone(input_ids, attention_mask, **others)
        logits = self.classifier(mean_over_text(read.last_hidden_state, attention_mask))
        loss = None if labels is None else self._loss(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            whole = labels.dtype in (torch.int64, torch.int32)
            kind = "single_label_classification" if whole else "multi_label_classification"
            kind = "regression" if self.num_labels == 1 else kind
        if kind == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).squeeze(-1))
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.view(-1).long())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
