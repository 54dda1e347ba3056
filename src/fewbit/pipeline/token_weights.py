"""How much each calibration token counts in the statistics.

A token t counts by the norm of its hidden state at the block's input, |h_t|, so attention sinks, which all other tokens
attend to, get small errors. But a model may give one token a norm that is far above all others:

    weight of t  =  min(|h_t|, 64 m_h) * min(1, 4 m_x / |x_t|)²        m: median over the tokens of a window

x_t is the linear's input. In the squares of outputs, its row counts as if |x_t| were at most 4 medians. In layer 28 of
SmolLM2, down_proj reads 40 medians at the first token, whose state has 35. MXFP4 holds the weight that multiplies it
with an error of 13 %. Without the limits, GPTQ spreads this error over all columns of that row, and the outputs at
other tokens change by 63 %. The state's norm has a higher limit, because such a token is a sink that most others attend
to. KL divergence of GPTQ on SmolLM2 (32 x 512 tokens, groups of 64 symmetric, two seeds at 4 bits):

    limits of |h|, |x|     4 bits           3 bits    mxfp4
    none                   0.144, 0.156     0.511     0.669
    none, 4                0.148, 0.155     0.510     0.196
    64, 16                 0.143, 0.149     0.496     0.446
    64, 4                  0.146, 0.153     0.498     0.196
    16, 4                  0.152, 0.157     0.511     0.187
    4, 4                   0.164, 0.169     0.532     0.190

On `tiny` all of them are within 1 % of one another.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OF_STATES, _OF_INPUTS = 64.0, 4.0  # limits, in medians


def of_tokens(states: Tensor) -> Tensor:
    """The weights of tokens [windows, tokens], from the states [windows, tokens, H] that enter the block."""
    return _limited(_norms(states), _OF_STATES).clamp(min=1e-6)


def of_rows(x: Tensor, weights: Tensor) -> Tensor | None:
    """The weights [n] of the rows of an input x [..., K], from those of the tokens. None if its rows are others."""
    if weights.numel() != x.numel() // max(1, x.shape[-1]):
        return None
    norms = _norms(x).view_as(weights)
    share = torch.where(norms > 0, _limited(norms, _OF_INPUTS) / norms, 1)
    return (weights * share.square()).flatten()


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms


def _limited(norms: Tensor, most: float) -> Tensor:
    """Norms, limited to `most` times the median of their window, unless that is 0."""
    median = norms.median(dim=-1, keepdim=True).values
    return torch.where(median > 0, norms.minimum(most * median), norms)
