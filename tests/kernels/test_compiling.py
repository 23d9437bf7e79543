"""Marks for torch.compile, without importing it."""

import torch

from spikescale.kernels.compiling import assume_constant_result, not_compiled


def test_marks_for_the_compiler_are_those_of_torch():
    def constant():
        return 1

    ours = vars(assume_constant_result(lambda: 1))
    assert ours and vars(torch.compiler.assume_constant_result(constant)) == ours

    @not_compiled
    def not_traced(x):
        return x * float(x.sum())  # reading a number out is what tracing cannot do

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.arange(3.0)
    assert torch.equal(torch.compile(lambda x: not_traced(x + 1) - 1, backend=backend)(x), (x + 1) * 6 - 1)
    assert len(graphs) == 2 and all("sum" not in graph.code for graph in graphs)
