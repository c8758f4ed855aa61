"""How far a λ, or its dimensionless strength, carries over: toy settings, batch norms, batch sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from c2r_core.artefacts.profiles import LanguageModelProfile, StrengthProfile, ToyProfile
from c2r_core.data.batches import StoreBatches
from c2r_core.data.store import ActivationStore
from c2r_core.experiments.batch_norms import (
    FiringBlocks,
    firing_blocks,
    log_slopes,
    mean_batch_norms,
    neighbour_similarities,
    rate_groups,
)
from c2r_core.experiments.language_model import Activations, LanguageModelArm, train_arm
from c2r_core.experiments.synthetic import c2r_of, train_toy_arms
from c2r_core.experiments.toy import toy_table
from c2r_core.losses import c2r_from_norms
from c2r_core.metrics.fronts import price_at
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.saes import SAE, fold_norm_factor

if TYPE_CHECKING:
    import pandas as pd

TOY_ARCHITECTURE = "batch_topk"
RULES = {"same λ": 0.0, "λ ∝ 1/√B": 0.5, "λ ∝ 1/B": 1.0}
"""Three ways to take a λ to another batch size, with the exponent of 1/B; the second keeps the strength."""

_CHUNK = 8192


# -- toys -----------------------------------------------------------------------------------------


def toy_settings(toy: ToyProfile, strength: StrengthProfile) -> dict[str, ToyProfile]:
    """The profile's toy as the reference, and with one of its sizes changed at a time."""
    settings = {"reference": toy}
    for batch_size in strength.toy_batch_sizes:
        settings[f"B = {batch_size}"] = toy.model_copy(update={"batch_size": batch_size})
    for d_sae in strength.toy_widths:
        settings[f"{d_sae} latents"] = toy.model_copy(update={"d_sae": d_sae})
    for k in strength.toy_ks:
        own = toy.architectures | {TOY_ARCHITECTURE: {"k": k}}
        settings[f"k = {k}"] = toy.model_copy(update={"architectures": own})
    return settings


def strength_sweep(
    settings: Mapping[str, ToyProfile],
    strengths: Sequence[float],
    seeds: Sequence[int],
    device: str = "cpu",
) -> pd.DataFrame:
    """BatchTopK with C²R at every strength in every setting.

    Returns
    -------
    DataFrame with `arm` (the setting), `strength`, `weight` (λ), seed and the fields of `ToyReport`
    """
    import pandas as pd

    tables = []
    for name, toy in settings.items():
        arms = {strength: c2r_of(toy, strength) for strength in strengths}
        runs = train_toy_arms(toy, TOY_ARCHITECTURE, arms, seeds, device)
        table = toy_table(toy, runs).rename(columns={"arm": "strength"})
        table["weight"] = [arms[strength].weight for strength in table["strength"]]
        tables.append(table.assign(arm=name))
    return pd.concat(tables, ignore_index=True)


def needed_weights(table: pd.DataFrame, failure: str, target: float) -> pd.DataFrame:
    """Smallest strength, and λ, that brings the mean failure down to a target in each setting.

    Parameters
    ----------
    table : DataFrame
        From `strength_sweep`.
    failure : str
        Column that should be low; averaged over seeds.
    target : float

    Returns
    -------
    DataFrame with `arm`, `strength`, `weight`
        Interpolated on a logarithmic scale; NaN where no point reaches the target, and where the
        first one has reached it already, since then the smallest is not known.
    """
    import pandas as pd

    rows = []
    for arm, points in table.groupby("arm", sort=False):
        means = points.groupby("strength")[[failure, "weight"]].mean().sort_index()
        found = {"arm": arm}
        for column, values in (("strength", means.index), ("weight", means["weight"])):
            logs = [math.log(value) for value in values]
            known = means[failure].iloc[0] > target
            found[column] = math.exp(price_at(means[failure], logs, target)) if known else math.nan
        rows.append(found)
    return pd.DataFrame(rows)


def spread(values: Sequence[float]) -> float:
    """Largest over smallest of the values that are not NaN; NaN if fewer than two are."""
    known = [value for value in values if not math.isnan(value)]
    return max(known) / min(known) if len(known) > 1 else math.nan


# -- norms over a batch ---------------------------------------------------------------------------


def training_blocks(
    sae: SAE, store: ActivationStore, strength: StrengthProfile, seed: int
) -> FiringBlocks:
    """The SAE's activations on random training tokens, summed over blocks of the smallest batch."""
    chunk = min(_CHUNK, max(strength.norm_batch_sizes))
    batches = StoreBatches(store, chunk, seed)
    n_chunks = min(strength.norm_tokens, len(store)) // chunk
    return firing_blocks(sae, map(batches, range(n_chunks)), min(strength.norm_batch_sizes))


def norm_table(blocks: FiringBlocks, strength: StrengthProfile) -> pd.DataFrame:
    """Mean batch norms by firing rate and batch size.

    Returns
    -------
    DataFrame with `arm` (the group by firing rate), `rate` (its median), `batch_size`, `firings`
    (expected in a batch, at that rate), `norm` (the median of n_i over the root mean square of the
    latent's activations), and `slope`, `slope_low`, `slope_high` (median and quartiles of the slope
    of log n_i on log B over all batch sizes)
    """
    import pandas as pd

    sizes = sorted(strength.norm_batch_sizes)
    norms = mean_batch_norms(blocks, sizes)
    slopes = log_slopes(sizes, norms)
    relative = norms / blocks.magnitudes
    n_samples = len(blocks.energies) * blocks.size
    groups = rate_groups(blocks.rates, strength.groups, strength.least_firings / n_samples)
    rows = []
    for number, latents in enumerate(groups):
        rate = float(blocks.rates[latents].median())
        low, middle, high = torch.nanquantile(
            slopes[latents], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        for size, norm in zip(sizes, relative[:, latents].median(dim=1).values, strict=True):
            rows.append(
                {
                    "arm": group_name(number, strength.groups),
                    "rate": rate,
                    "batch_size": size,
                    "firings": rate * size,
                    "norm": float(norm),
                    "slope": middle,
                    "slope_low": low,
                    "slope_high": high,
                }
            )
    return pd.DataFrame(rows)


@torch.no_grad()
def penalty_exponent(sae: SAE, blocks: FiringBlocks, batch_sizes: Sequence[int]) -> float:
    """Slope of the logarithm of C²R (α = 1) on log B for an SAE that does not change.

    The loss is linear in the norms, so that its mean over batches follows from their means. λ in
    proportion to B to the power of minus this keeps the penalty of this SAE as it is.

    Parameters
    ----------
    blocks : FiringBlocks
        Of this SAE.
    batch_sizes : sequence of at least two int
    """
    W_dec = sae.W_dec.cpu().double()
    norms = mean_batch_norms(blocks, batch_sizes) * torch.linalg.vector_norm(W_dec, dim=-1)
    penalties = torch.stack([c2r_from_norms(of_size, W_dec) for of_size in norms])
    return float(log_slopes(batch_sizes, penalties.unsqueeze(1)))


def group_name(number: int, n_groups: int) -> str:
    """Name of a group by firing rate, the rarest being number 0.

    Examples
    --------
    >>> [group_name(i, 3) for i in range(3)]
    ['1, rarest', '2', '3, most frequent']
    """
    ends = {0: ", rarest", n_groups - 1: ", most frequent"}
    return f"{number + 1}{ends.get(number, '')}"


# -- training at other batch sizes ----------------------------------------------------------------


def strength_by_rule(strength: float, rule: str, batch_size: int, reference: int) -> float:
    """Strength that a λ has after a rule of RULES took it to another batch size.

    Examples
    --------
    >>> strength_by_rule(0.3, "λ ∝ 1/√B", batch_size=512, reference=2048)
    0.3
    >>> strength_by_rule(0.3, "same λ", batch_size=512, reference=2048)
    0.15
    """
    return strength * (batch_size / reference) ** (0.5 - RULES[rule])


def batch_size_table(
    lm: LanguageModelProfile,
    strength: StrengthProfile,
    activations: Activations,
    seed: int,
    device: str = "cpu",
) -> pd.DataFrame:
    """SAEs of `small_d_sae` latents trained with equal steps at several batch sizes.

    At the profile's own batch size there is the baseline and C²R; at the others the baseline and,
    by each of RULES, the λ that follows. All are measured on held-out tokens.

    Returns
    -------
    DataFrame with `batch_size`, `arm`, `group` (number, by the SAE's own firing rates), `rate`
    (median in the group), `similarity` (mean s_i in it), `relative` (the same over that of the
    baseline of equal batch size), `fvu`, `l0`, `live_share`
    """
    import pandas as pd

    reference, rows = lm.batch_size, []
    for batch_size in (reference, *strength.batch_sizes):
        own = lm.model_copy(update={"batch_size": batch_size, "steps": strength.steps})
        arms = {"baseline": 0.0}
        if batch_size == reference:
            arms["C²R"] = strength.language_model_strength
        else:
            arms |= {
                rule: strength_by_rule(
                    strength.language_model_strength, rule, batch_size, reference
                )
                for rule in RULES
            }
        baseline: list[float] = []
        for name, of_arm in arms.items():
            arm = LanguageModelArm(lm.small_d_sae, c2r_strength=of_arm)
            sae = train_arm(own, arm, activations.train, seed, device)
            groups = similarity_rows(sae, activations.held_out, strength)
            baseline = baseline or [row["similarity"] for row in groups]
            for row, base in zip(groups, baseline, strict=True):
                relative = row["similarity"] / base if base else math.nan
                about = {"batch_size": batch_size, "arm": name, "relative": relative}
                rows.append(about | row)
    return pd.DataFrame(rows)


def similarity_rows(
    sae: SAE, held_out: ActivationStore, strength: StrengthProfile
) -> list[dict[str, float]]:
    """Mean s_i of each group by firing rate, with the SAE's FVU, L0 and share of live latents."""
    report = evaluate_reconstruction(fold_norm_factor(sae), held_out.chunks(_CHUNK))
    similarities = neighbour_similarities(sae.W_dec, report.density > 0)
    groups = rate_groups(report.density, strength.groups)
    whole = {"fvu": report.fvu, "l0": report.l0, "live_share": report.live_share}
    return [
        {
            "group": number,
            "rate": float(report.density[latents].median()),
            "similarity": float(similarities[latents].mean()),
        }
        | whole
        for number, latents in enumerate(groups)
    ]


def distance_from_reference(table: pd.DataFrame, reference: int) -> pd.DataFrame:
    """How far each rule's effect is from the reference's, in factors, by group.

    Parameters
    ----------
    table : DataFrame
        From `batch_size_table`.
    reference : int
        Batch size of the reference.

    Returns
    -------
    DataFrame with `batch_size`, `arm`, `group` and `factor`
        `relative` over that of C²R at the reference batch size; 1 is an equal effect, more is less
        effect.
    """
    own = table[(table["batch_size"] == reference) & (table["arm"] == "C²R")]
    goal = own.set_index("group")["relative"]
    others = table[table["arm"].isin(RULES)]
    factor = others["relative"].to_numpy() / goal.loc[others["group"]].to_numpy()
    return others[["batch_size", "arm", "group"]].assign(factor=factor).reset_index(drop=True)
