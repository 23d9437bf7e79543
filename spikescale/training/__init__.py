"""Pretraining under DeepSpeed: from settings to a trained model and its report."""
