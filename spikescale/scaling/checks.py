"""What a fit cannot be trusted with: sentences for people, each with the figure that it rests on."""

from collections.abc import Sequence

import numpy as np

from spikescale.scaling.approaches import Optimum, Profile
from spikescale.scaling.parametric import Data, Fitted
from spikescale.scaling.points import Point

POINTS_A_PARAMETER = 3
LEAST_VALUES = 4  # different sizes, and numbers of tokens
LEAST_SPAN = 10.0  # largest over smallest
LARGEST_CONDITION = 300.0
LARGEST_CORRELATION = 0.95
LEAST_DETERMINED = 3  # different sizes, and numbers of tokens: a term has a constant, a factor, an exponent
UNDETERMINED_CONDITION = 1e8  # from here on the points leave a direction of the parameters open
OFF_CENTRE = 0.5  # half-widths
PASSES = 4.0  # over the data, from which on repeated tokens are worth much less than new ones
FLOP_SPREAD = 1.25
BLANKED = "its parameters, intervals and forecasts are left blank"


def check_data(data: Data, points: Sequence[Point], parameters: int) -> list[str]:
    """Warnings about the points themselves, for a form of so many parameters."""
    found = []
    count = len(data.losses)
    if count < POINTS_A_PARAMETER * parameters:
        found.append(f"too few: {count} points for {parameters} parameters; take {POINTS_A_PARAMETER} each")
    for values, what in ((data.sizes, "sizes"), (data.tokens, "numbers of tokens")):
        distinct = len(np.unique(np.round(np.log(values), 3)))
        span = values.max() / values.min()
        if distinct < LEAST_VALUES:
            found.append(f"too few: {distinct} different {what}; take {LEAST_VALUES} or more")
        elif span < LEAST_SPAN:
            found.append(
                f"narrow: the {what} span a factor of {span:.3g}; {LEAST_SPAN:g} or more tell an exponent"
            )
    if count > 2 and np.ptp(data.sizes) > 0 and np.ptp(data.tokens) > 0:
        correlation = float(np.corrcoef(np.log(data.sizes), np.log(data.tokens))[0, 1])
        if abs(correlation) > LARGEST_CORRELATION:
            found.append(
                f"N and D go together (correlation of logs {correlation:.3f}), as in a ladder of fixed"
                f" ratio: the"
                " exponents of the two cannot be told apart; add sizes at other numbers of tokens"
            )
    passes = max((p.tokens / p.unique_tokens for p in points if p.unique_tokens), default=0.0)
    if passes > PASSES:
        found.append(
            f"repeated data: up to {passes:.1f} passes, of which a law of fresh tokens knows nothing"
        )
    factors = data.flop / (data.sizes * data.tokens)
    if factors.max() / factors.min() > FLOP_SPREAD:
        found.append(
            f"FLOP / (N D) runs from {factors.min():.2f} to {factors.max():.2f}, because embeddings and"
            f" head weigh"
            " differently in small and large models: the best N for a compute is a rough figure; losses at a"
            " given N and D do not depend on it"
        )
    return found


def check_fit(fitted: Fitted, data: Data) -> list[str]:
    """Warnings about a parametric fit."""
    found = []
    condition = fitted.condition(data)
    if condition > LARGEST_CONDITION:
        found.append(
            f"ill-conditioned: the condition number of the fit is {condition:.3g} (above"
            f" {LARGEST_CONDITION:g}):"
            " quite different parameters fit nearly as well; trust predictions near the points more than any"
            " single parameter"
        )
    if fitted.at_bound:
        found.append(
            f"at the edge of what is searched: {', '.join(fitted.at_bound)}; the data do not tell it"
        )
    return found


def undetermined(fitted: Fitted, data: Data) -> str | None:
    """Why the points do not determine a parametric fit's parameters at all; None where they do."""
    for values, what in ((data.sizes, "sizes"), (data.tokens, "numbers of tokens")):
        distinct = len(np.unique(np.round(np.log(values), 3)))
        if distinct < LEAST_DETERMINED:
            return f"undetermined: {distinct} different {what}, needs {LEAST_DETERMINED}; {BLANKED}"
    condition = fitted.condition(data)
    if condition > UNDETERMINED_CONDITION:
        return f"undetermined: the condition number of the fit is {condition:.3g}; {BLANKED}"
    return None


def check_profiles(found: Sequence[Profile]) -> list[str]:
    """Warnings about isoFLOP profiles."""
    warnings = []
    if not found:
        return ["no isoFLOP profile: no FLOP is shared by four sizes or more, not even by interpolation"]
    flat = [profile for profile in found if not profile.convex]
    if flat:
        flops = ", ".join(f"{profile.flop:.2g}" for profile in flat)
        warnings.append(f"no minimum: the parabola at {flops} FLOP opens downwards")
    convex = [profile for profile in found if profile.convex]
    border = [profile for profile in convex if profile.optimum().border]
    if border:
        flops = ", ".join(f"{profile.flop:.2g}" for profile in border)
        warnings.append(
            f"at the border: the minimum at {flops} FLOP is at or beyond the smallest or largest size"
            f" tried, and so"
            " an extrapolation of the parabola; add sizes on that side"
        )
    off = [p for p in convex if not p.optimum().border and p.off_centre > OFF_CENTRE]
    if off:
        worst = max(profile.off_centre for profile in off)
        warnings.append(
            f"off centre: {len(off)} of {len(found)} minima lie up to {worst:.2f} half-widths from the"
            f" middle of"
            " the sizes tried, where a parabola, which is symmetric, is biased"
        )
    if any(profile.interpolated for profile in found):
        warnings.append("the profiles are interpolated between lengths: no runs share their FLOP")
    return warnings


def check_envelope(optima: Sequence[Optimum], finished_only: bool) -> list[str]:
    """Warnings about approach 1."""
    if not optima:
        return ["no envelope: fewer than four sizes have training curves at any common FLOP"]
    found = []
    border = sum(optimum.border for optimum in optima) / len(optima)
    if border > OFF_CENTRE:
        found.append(
            f"at the border: at {border:.0%} of the FLOP the smallest or largest size there is the best; its"
            " exponent is not that of the law"
        )
    if finished_only:
        found.append("each size's curve is made of the ends of its runs: there are no training curves")
    return found
