"""Presets and recipes as YAML, read through `spikescale.config`."""
