"""All that a metric may use of an SAE, so that any library's SAE can be measured."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AnySAE(Protocol):
    """An SAE that takes the activations it is given: raw ones after `fold_norm_factor`.

    x is (batch, d_in), feature_acts (batch, d_sae), W_dec (d_sae, d_in), one row per latent.
    """

    W_dec: Tensor

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, feature_acts: Tensor) -> Tensor: ...
