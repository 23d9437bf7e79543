"""Marks for torch.compile that do not import the compiler: that takes seconds, and few runs use it."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def assume_constant_result(function: Callable[P, T]) -> Callable[P, T]:
    """As `torch.compiler.assume_constant_result`: the result is found once, while tracing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """As `torch.compiler.disable`: a compiled program calls the function as it is."""
    shielded = torch._disable_dynamo(function)  # imports the compiler when it is called

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return shielded(*args, **kwargs) if "torch._dynamo" in sys.modules else function(*args, **kwargs)

    return call
