"""Training a pretrained model further: on new text, all of it, its upper layers or LoRA; or to classify texts."""
