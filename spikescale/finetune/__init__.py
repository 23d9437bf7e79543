"""Training a pretrained model further: on new text (all of it, upper layers, LoRA), or to classify texts."""
