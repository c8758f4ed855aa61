"""C²R in SAELens' own training: importing this module adds four training SAEs to SAELens 6.54.

    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from c2r_core import weight_from_strength
    from c2r_core.training.sae_lens import C2RBatchTopKTrainingSAEConfig

    weight = weight_from_strength(0.2, batch_size=4096, d_sae=8192, mean_square_norm=576)
    sae = C2RBatchTopKTrainingSAEConfig(
        d_in=576, d_sae=8192, k=32, normalize_activations="expected_average_only_in", c2r_weight=weight
    )
    config = LanguageModelSAERunnerConfig(sae=sae, train_batch_size_tokens=4096, **rest)  # as before
    LanguageModelSAETrainingRunner(config).run()

Each is a class of SAELens with the term c2r_weight · C²R in its loss. SAELens' runner trains, logs,
checkpoints and resumes it. What it saves at the end is SAELens' own inference SAE and needs nothing of this
package. To load a training checkpoint, import this module first.

**The weight.** SAELens' error is ‖x − x̂‖², summed over d_in and averaged over the batch, as here. So
c2r_weight is the λ of `C2R`, and `weight_from_strength` gives it. Its `mean_square_norm` is E‖x‖² as the SAE
sees x: with normalize_activations "none" that of the raw activations; with "expected_average_only_in" and
"covariance_whitening" d_in, or more where a few x are very long. With "layer_norm" no conversion holds.

**Decoder rows.** SAELens leaves their norms free. A latent is measured by what it writes, f_i ‖w_i‖, as in
`C2R`. SAELens' activations are that already with rescale_acts_by_decoder_norm, the default but for JumpReLU.

**The gradient.** SAELens cuts its norm at 1. With c2r_every = T > 1 a strong C²R then acts through one cut
step in T, however large the weight.

**The log.** `losses/c2r_loss` is the term, on steps that add it; `metrics/c2r`, on all, C²R without weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from c2r_core.errors import needs_extra
from c2r_core.seeds import mix_seeds
from c2r_core.training.regularisers import C2R

needs_extra("saelens", "sae_lens")

import sae_lens  # noqa: E402
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput  # noqa: E402

NEVER = 2**40  # more steps than any training has


@dataclass(kw_only=True)
class C2RFields:
    """The settings of C²R that each config has beside SAELens' own.

    Parameters
    ----------
    c2r_weight : float
        λ, finite and >= 0; 0 trains as SAELens does.
    c2r_every, c2r_start, c2r_warmup, c2r_alpha, c2r_chunk_size, c2r_decoder_norm
        As in `c2r_core.C2R`, counted in steps of SAELens' trainer.
    c2r_seed : int
        Draws the chunks of each step, >= 0; without c2r_chunk_size nothing is drawn.

    Raises ValueError if a setting is out of its range.
    """

    c2r_weight: float
    c2r_every: int = 1
    c2r_start: int = 0
    c2r_warmup: int = 0
    c2r_alpha: float = 1.0
    c2r_chunk_size: int | None = None
    c2r_decoder_norm: bool = True
    c2r_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()  # SAELens' config
        self.c2r()

    @classmethod
    def architecture(cls) -> str:
        """SAELens' name with `c2r_` before it, by which its registry knows the class."""
        return f"c2r_{super().architecture()}"

    def c2r(self) -> C2R:
        """The regulariser of these settings, for activations as SAELens returns them."""
        weight, names = self.c2r_weight, ("every", "start", "warmup", "alpha", "chunk_size")
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(
                f"c2r_weight is {weight!r}; expected a finite number >= 0. Take 0 for none, or one "
                "from c2r_core.weight_from_strength(0.2, batch_size=…, d_sae=…, mean_square_norm=…)."
            )
        settings = {name: getattr(self, f"c2r_{name}") for name in names}
        by_norm = self.c2r_decoder_norm and not getattr(self, "rescale_acts_by_decoder_norm", False)
        try:
            return C2R(weight, decoder_norm=by_norm, **settings)
        except ValueError as error:
            raise ValueError(f"c2r_{error}") from None


class AddsC2R:
    """What makes a training SAE of SAELens one with C²R: a further term of its auxiliary loss."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens' own terms, scalars, and `c2r_loss` with its weight on steps on which C²R acts."""
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        if factor := self._factor(step_input):
            losses["c2r_loss"] = factor * self.c2r(feature_acts, step_input)
        return losses

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens, and the metric `c2r` on steps that are logged."""
        output = super().training_forward_pass(step_input)
        if step_input.is_logging_step:
            with torch.no_grad():
                output.metrics["c2r"] = self.c2r(output.feature_acts, step_input)
        return output

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """SAELens' own and `c2r_step`, which counts the steps and is in SAELens' checkpoint."""
        # `n_training_steps` is one too low after a resume, which would shift c2r_every.
        return super().get_coefficients() | {"c2r_step": TrainCoefficientConfig(NEVER, NEVER)}

    @torch.compiler.disable  # it checks values and counts steps, which a compiled graph cannot
    def c2r(self, feature_acts: Tensor, step_input: TrainStepInput) -> Tensor:
        """C²R of SAELens' activations (batch, d_sae), dense or sparse: a scalar, without its weight."""
        generator = Generator().manual_seed(mix_seeds(self.cfg.c2r_seed, _step(step_input)))
        precision = torch.promote_types(self.W_dec.dtype, torch.float32)
        with torch.autocast(self.W_dec.device.type, enabled=False):
            acts = feature_acts.to_dense().to(precision)
            return self.cfg.c2r()(acts, self.W_dec.to(precision), generator)

    @torch.compiler.disable
    def _factor(self, step_input: TrainStepInput) -> float:
        penalty = self.cfg.c2r()
        return penalty.weight * penalty.strength_at(_step(step_input))


def _step(step_input: TrainStepInput) -> int:
    """Steps taken before this one; in a loop without SAELens' schedulers, what the loop says."""
    counted = step_input.coefficients.get("c2r_step", NEVER)
    return int(counted) if counted < NEVER else step_input.n_training_steps


@dataclass
class C2RTopKTrainingSAEConfig(C2RFields, sae_lens.TopKTrainingSAEConfig):
    """SAELens' TopKTrainingSAEConfig with the settings of `C2RFields`."""

    def get_inference_config_class(self) -> type[sae_lens.SAEConfig]:
        """As SAELens saves a TopK SAE for use."""
        return sae_lens.TopKSAEConfig


@dataclass
class C2RBatchTopKTrainingSAEConfig(C2RFields, sae_lens.BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopKTrainingSAEConfig with the settings of `C2RFields`."""


@dataclass
class C2RMatryoshkaBatchTopKTrainingSAEConfig(
    C2RFields, sae_lens.MatryoshkaBatchTopKTrainingSAEConfig
):
    """SAELens' MatryoshkaBatchTopKTrainingSAEConfig with the settings of `C2RFields`."""


@dataclass
class C2RJumpReLUTrainingSAEConfig(C2RFields, sae_lens.JumpReLUTrainingSAEConfig):
    """SAELens' JumpReLUTrainingSAEConfig with the settings of `C2RFields`."""

    def get_inference_config_class(self) -> type[sae_lens.SAEConfig]:
        """As SAELens saves a JumpReLU SAE for use."""
        return sae_lens.JumpReLUSAEConfig


class C2RTopKTrainingSAE(AddsC2R, sae_lens.TopKTrainingSAE):
    """SAELens' TopKTrainingSAE with C²R in its loss."""


class C2RBatchTopKTrainingSAE(AddsC2R, sae_lens.BatchTopKTrainingSAE):
    """SAELens' BatchTopKTrainingSAE with C²R in its loss."""


class C2RMatryoshkaBatchTopKTrainingSAE(AddsC2R, sae_lens.MatryoshkaBatchTopKTrainingSAE):
    """SAELens' MatryoshkaBatchTopKTrainingSAE with C²R in its loss."""


class C2RJumpReLUTrainingSAE(AddsC2R, sae_lens.JumpReLUTrainingSAE):
    """SAELens' JumpReLUTrainingSAE with C²R in its loss."""


for _sae, _config in (
    (C2RTopKTrainingSAE, C2RTopKTrainingSAEConfig),
    (C2RBatchTopKTrainingSAE, C2RBatchTopKTrainingSAEConfig),
    (C2RMatryoshkaBatchTopKTrainingSAE, C2RMatryoshkaBatchTopKTrainingSAEConfig),
    (C2RJumpReLUTrainingSAE, C2RJumpReLUTrainingSAEConfig),
):
    sae_lens.register_sae_training_class(_config.architecture(), _sae, _config)
