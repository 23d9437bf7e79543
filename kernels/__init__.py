"""Operators of the model: one folder each, chosen by device behind one function per operator.

`wkv.wkv` mixes tokens over time, `lif.lif` is the spiking neuron. In each folder `reference.py` is
the definition and everything else is checked against it.
"""
