"""What latents mean: an offline judge, a language model as a judge, and latents made of latents."""

from __future__ import annotations

from c2r_core.artefacts.results import plain
from c2r_core.evaluate.report import Section, section_of
from c2r_core.metrics.auto_interp import InterpretedLatent, measure_auto_interp
from c2r_core.metrics.detection import DetectionReport, measure_detection
from c2r_core.metrics.endpoint import KEY_VARIABLE
from c2r_core.metrics.inputs import Bench
from c2r_core.metrics.meta_sae import MetaSAEReport, measure_meta_sae

Detection = section_of(DetectionReport)
MetaSAE = section_of(MetaSAEReport)


def measure_detection_score(bench: Bench) -> Detection:
    """Can the text alone foretell where latents fire? On held-out tokens, without a language model."""
    n = bench.sizes.detection_latents
    report = measure_detection(bench.firings, n_latents=n, seed=bench.seed)
    if report.n_evaluated == 0:
        raise ValueError(
            f"None of {len(report.latents)} latents could be judged; for example, latent "
            f"{report.latents[0].latent}: {report.latents[0].not_evaluable}."
        )
    return Detection(**plain(report))


class AutoInterp(Section):
    """A language model explains latents, and foretells from the explanation where they fire."""

    autointerp_score: float
    """Mean share of excerpts judged rightly; saying "none" gets about 0.71."""
    autointerp_std_dev: float | None
    """Over latents; null with a single one."""
    num_latents: int
    """With a score."""
    model: str
    """Explainer and judge."""
    latents: list[section_of(InterpretedLatent)]


def measure_auto_interpretation(bench: Bench) -> AutoInterp:
    """Two questions a latent to the endpoint; what it has answered before is not asked again."""
    if bench.endpoint is None:
        raise ValueError(
            "No endpoint is named: give --endpoint URL and --endpoint-model NAME, of any server that "
            f"speaks OpenAI's chat completions; its key, if it wants one, in {KEY_VARIABLE}."
        )
    report = measure_auto_interp(
        bench.firings,
        bench.language_model.tokenizer,
        bench.endpoint,
        n_latents=bench.sizes.autointerp_latents,
        seed=bench.seed,
    )
    if report.n_evaluated == 0:
        raise ValueError(
            f"None of {len(report.latents)} latents got a score; for example, latent "
            f"{report.latents[0].latent}: {report.latents[0].not_evaluable}."
        )
    return AutoInterp(
        autointerp_score=report.mean_score,
        autointerp_std_dev=report.sd_score,
        num_latents=report.n_evaluated,
        model=report.model,
        latents=plain(report.latents),
    )


def measure_composition(bench: Bench) -> MetaSAE:
    """How much of the decoder rows a small SAE on them explains; over all latents, live or not."""
    return MetaSAE(
        **plain(
            measure_meta_sae(bench.sae.W_dec, steps=bench.sizes.meta_sae_steps, seed=bench.seed)
        )
    )
