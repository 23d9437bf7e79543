"""One token of a whole SpikeGPT in one call: the CPU engine under `spikescale.inference.Decoder`.

An operator of `spikescale.kernels.backend` like the others, except that its reference is the model itself:
`engine.Engine` computes, from a state, what `SpikeGPT.forward` computes for one token a row.
"""
