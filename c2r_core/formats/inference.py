"""An SAE of another library, reduced to what measuring it takes: encode, decode and W_dec."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class InferenceSAE(nn.Module):
    """f = activation(p) with the projection p = (x − b) W_enc, and x̂ = f W_dec + b_dec.

    Weights are kept in float32, whatever the file holds, because metrics are measured in it.

    Parameters
    ----------
    W_enc : Tensor, shape (d_in, d_sae)
    W_dec : Tensor, shape (d_sae, d_in)
    b_dec : Tensor, shape (d_in,)
    activation : ReLU, TopK, JumpReLU or Gated
        Maps projections (..., d_sae) to feature activations; holds the encoder's biases.
    centred : bool
        Whether b_dec is subtracted from x before the encoder (b = b_dec) or not (b = 0).

    Raises ValueError if the shapes do not fit each other; a transposed decoder is named as such.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, activation: nn.Module, *, centred: bool
    ) -> None:
        super().__init__()
        if W_enc.ndim != 2:
            raise ValueError(f"W_enc has shape {tuple(W_enc.shape)}; expected (d_in, d_sae).")
        d_in, d_sae = W_enc.shape
        if W_dec.shape != (d_sae, d_in):
            turned = " It is transposed." if W_dec.shape == (d_in, d_sae) else ""
            raise ValueError(
                f"W_dec has shape {tuple(W_dec.shape)}; expected (d_sae, d_in) = {(d_sae, d_in)}, "
                f"one row per latent, to go with W_enc of shape {tuple(W_enc.shape)}.{turned}"
            )
        _check_shape("b_dec", b_dec, (d_in,))
        for name, tensor in activation.named_buffers():
            if name != "threshold" or tensor.ndim > 0:  # that may be one for all latents
                _check_shape(name, tensor, (d_sae,))
        if isinstance(activation, TopK) and activation.k > d_sae:
            raise ValueError(f"k is {activation.k}; expected at most d_sae = {d_sae}.")
        self.register_buffer("W_enc", W_enc.float())
        self.register_buffer("W_dec", W_dec.float().contiguous())
        self.register_buffer("b_dec", b_dec.float())
        self.activation = activation.float()
        self.centred = centred

    def divide_decoder(self, norms: Tensor) -> None:
        """Divide the decoder rows by positive norms (d_sae,), and let the activations have them instead."""
        # Not in place: a file may hold an encoder and a decoder that share their memory.
        self.W_enc = self.W_enc * norms
        self.activation.b_enc = self.activation.b_enc * norms
        self.W_dec = self.W_dec / norms[:, None]

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., d_sae) of raw activations x (..., d_in)."""
        if x.shape[-1] != self.W_enc.shape[0]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this SAE expects (..., d_in={self.W_enc.shape[0]})."
            )
        return self.activation((x - self.b_dec if self.centred else x) @ self.W_enc)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction (..., d_in) from feature activations (..., d_sae)."""
        return feature_acts @ self.W_dec + self.b_dec

    def with_centred(self, centred: bool) -> InferenceSAE:
        """The same SAE with b_dec subtracted before the encoder or not; its biases make up for it.

        Activations stay what they were, up to rounding.
        """
        if centred == self.centred:
            return self
        shift = (self.b_dec.double() @ self.W_enc.double()) * (1 if centred else -1)
        activation = self.activation.shifted(shift)
        return InferenceSAE(self.W_enc, self.W_dec, self.b_dec, activation, centred=centred)


class Activation(nn.Module):
    """An activation with its biases, in the order of `names`."""

    names: tuple[str, ...] = ("b_enc",)

    def __init__(self, *biases: Tensor) -> None:
        super().__init__()
        for name, bias in zip(self.names, biases, strict=True):
            self.register_buffer(name, bias)

    def shifted(self, shift: Tensor) -> Activation:
        """The activation that does with p − shift what this one does with p; shift is (d_sae,)."""
        b_enc, *rest = (getattr(self, name) for name in self.names)
        return type(self)((b_enc + shift).float(), *rest)


class ReLU(Activation):
    """relu(p + b_enc)."""

    def forward(self, projection: Tensor) -> Tensor:
        return (projection + self.b_enc).relu()


class TopK(Activation):
    """The k largest of relu(p + b_enc) in each sample."""

    def __init__(self, b_enc: Tensor, k: int) -> None:
        super().__init__(b_enc)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; expected a positive integer.")
        self.k = k

    def shifted(self, shift: Tensor) -> TopK:
        """As in `Activation`."""
        return TopK((self.b_enc + shift).float(), self.k)

    def forward(self, projection: Tensor) -> Tensor:
        kept = (projection + self.b_enc).topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(projection).scatter(-1, kept.indices, kept.values.relu())


class JumpReLU(Activation):
    """relu(z) where z = p + b_enc exceeds the threshold, one for each latent or one for all."""

    names = ("b_enc", "threshold")

    def forward(self, projection: Tensor) -> Tensor:
        pre_acts = projection + self.b_enc
        return pre_acts.relu() * (pre_acts > self.threshold)


class Gated(Activation):
    """relu(exp(r_mag) p + b_mag) where p + b_gate is positive."""

    names = ("b_gate", "r_mag", "b_mag")

    def shifted(self, shift: Tensor) -> Gated:
        """As in `Activation`."""
        b_mag = self.b_mag + self.r_mag.double().exp() * shift
        return Gated((self.b_gate + shift).float(), self.r_mag, b_mag.float())

    def forward(self, projection: Tensor) -> Tensor:
        magnitude = (self.r_mag.exp() * projection + self.b_mag).relu()
        return magnitude * (projection + self.b_gate > 0)


def as_numbers(tensors: Mapping[str, object], file: str) -> dict[str, Tensor]:
    """The tensors of a file in float32.

    Raises ValueError if one is not floating-point numbers, states a shape for which the file holds too few,
    or has a NaN, or an infinity that is no threshold's: then it is damaged, or no SAE's.
    """
    numbers = {}
    for name, tensor in tensors.items():
        is_dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not (is_dense and tensor.is_floating_point() and not tensor.is_meta):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{name} in {file} is {kind}; expected floating-point numbers.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} in {file} states the shape {tuple(tensor.shape)}, for which the file is too small."
            )
        numbers[name] = tensor.detach().float()
        is_bad = torch.isnan if name.endswith("threshold") else _not_finite
        if is_bad(numbers[name]).any():
            raise ValueError(f"{name} in {file} holds a NaN or an infinity: the file is damaged.")
    return numbers


def _not_finite(tensor: Tensor) -> Tensor:
    return ~tensor.isfinite()


def take(tensors: Mapping[str, Tensor], *names: str, file: str) -> list[Tensor]:
    """The tensors of the given names, which must be all that a file holds.

    Raises ValueError if one is missing, or the file holds another: then it is not of the architecture that
    the config names, and what the other tensor does would be lost.
    """
    if set(tensors) != set(names):
        raise ValueError(
            f"{file} holds the tensors {sorted(tensors)}; expected {sorted(names)} for the "
            "architecture that its config names."
        )
    return [tensors[name] for name in names]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
