"""Targets of the original model: a weight that corrects a part of the error in its input.

A linear W reads x̃ where it reads x in the original model, because the linears before it are quantized. GPTQ fits Q x̃ to
W x̃. The weight whose output on x̃ is closest to W x is W E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹ (Qronos, https://arxiv.org/abs/2505.11695;
GPTAQ, https://arxiv.org/abs/2504.02692). But x̃ has noise, so a regression on x̃ also shrinks the output, and every later
linear shrinks it again. fewbit regresses on the midpoint of x and x̃ instead, and corrects only a part of the error:

    W* = W + α W S (H + λI)⁻¹,     S = E[(x - x̃) mᵀ],   m = (x + x̃) / 2,   H = E[x̃ x̃ᵀ]

    α = target · r,   r = <W S', D> / <W S, D> limited to [0, 1],   D = W S (H + λI)⁻¹

S is measured on most calibration windows and S' on the others. r is the factor of D that fits the held-out windows
best: near 1 if S is reliable, and 0 if it is noise. The codes are then chosen for W* instead of W.
"""

from __future__ import annotations

from collections.abc import Callable

from fewbit.lazy import Tensor
from fewbit.stats import Shift


def moved(w: Tensor, shift: Shift, solve: Callable[[Tensor], Tensor], target: float) -> tuple[Tensor, float]:
    """W* [N, K] of the weight w [N, K], and α. solve: A [N, K] -> A (H + λI)⁻¹."""
    fit, held_out = w @ shift.fit.to(w.dtype), w @ shift.held_out.to(w.dtype)
    step = solve(fit)
    gain = float((fit * step).sum())
    reliable = float((held_out * step).sum()) / gain if gain > 0 else 0.0
    strength = target * min(max(reliable, 0.0), 1.0)
    return w + strength * step, strength
