"""Targets of the original model: a weight that corrects a part of the error in its input.

A linear W reads x̃ where it reads x in the original model, because the linears before it are quantized. GPTQ fits Q x̃ to
W x̃. The weight whose output on x̃ is closest to W x is W E[x x̃ᵀ] E[x̃ x̃ᵀ]⁻¹ (Qronos, https://arxiv.org/abs/2505.11695;
GPTAQ, https://arxiv.org/abs/2504.02692). But x̃ has noise, so a regression on x̃ also shrinks the output, and every later
linear shrinks it again. fewbit regresses on the midpoint of x and x̃ instead, and corrects only a part of the error:

    W* = W + α D,   D = W S (M + λI)⁻¹,   S = E[(x - x̃) mᵀ],   M = E[m mᵀ],   m = (x + x̃) / 2

    α = target · r,   r = <W S', D> / <W S, D> limited to [0, 1],   λ = damp · mean M_jj

S is measured on most calibration windows and S' on the others. r is the factor of D that fits the held-out windows
best: near 1 if S is reliable, and 0 if it is noise. The codes are then chosen for W* instead of W.
"""

from __future__ import annotations

from collections.abc import Sequence

from fewbit.lazy import Tensor, torch
from fewbit.products import in_tf32
from fewbit.stats import Shift


def moved(weights: Sequence[Tensor], shift: Shift, targets: Sequence[float], damp: float) -> list[tuple[Tensor, float]]:
    """(W*, α) of each of the weights [N, K], which read the same input."""
    damped = shift.middle.to(weights[0].dtype, copy=True)
    damped.diagonal().add_(damp * float(damped.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed or not torch.isfinite(factor).all():
        return [(w, 0.0) for w in weights]
    found = []
    for w, target in zip(weights, targets, strict=True):
        if not target:
            found.append((w, 0.0))
            continue
        with in_tf32(w.device):
            fit, held_out = w @ shift.fit.to(w.dtype), w @ shift.held_out.to(w.dtype)
        step = torch.cholesky_solve(fit.T, factor).T
        gain = float((fit * step).sum())
        reliable = float((held_out * step).sum()) / gain if gain > 0 else 0.0
        strength = target * min(max(reliable, 0.0), 1.0)
        found.append((torch.add(w, step, alpha=strength), strength))
    return found
