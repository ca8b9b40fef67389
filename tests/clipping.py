"""Norms and clipping as one call each; a training step has other work between their parts."""

from __future__ import annotations

from quadriga.optim.clip import gradient_norms, gradients_of, scale_gradients


def global_norm(gradients, sum_over_stages=None):
    return gradient_norms(gradients, sum_over_stages).total


def clip_gradients(parameters, max_norm, sum_over_stages=None):
    """Clip in place; the norm before."""
    gradients = gradients_of(parameters)
    norm = global_norm(gradients, sum_over_stages)
    scale_gradients(gradients, norm, max_norm)
    return norm
