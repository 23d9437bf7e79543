"""Weights and models to and from other programs: see docs/interoperability.md.

Nothing heavy is imported here: `spikescale.interop.hf` needs transformers and is imported by whoever wants
its classes, `spikescale.interop.nir_graph` needs nir.
"""
