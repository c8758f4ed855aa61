"""Study `strength`, of notebook 11: how far a λ, or its dimensionless strength, carries to other sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, StrengthProfile, ToyProfile, training_seeds
from c2r_core.data.batches import StoreBatches
from c2r_core.experiments.batch_norms import (
    FiringBlocks,
    firing_blocks,
    log_slopes,
    mean_batch_norms,
    neighbour_similarities,
    rate_groups,
)
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    arm_of,
    of_trained,
    standard_arms,
    trained,
    training_data,
    training_store,
)
from c2r_core.experiments.study import NamedArm, Study, arm_table
from c2r_core.experiments.toy import c2r_of, toy_arm, toy_cells
from c2r_core.losses import c2r_from_norms
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.reconstruction import streamed
from c2r_core.saes import SAE
from c2r_core.statistics import cost_at

TOY_ARCHITECTURE = "batch_topk"
RULES = {"same λ": 0.0, "λ ∝ 1/√B": 0.5, "λ ∝ 1/B": 1.0}
"""Three ways to take a λ to another batch size, with the exponent of 1/B; the second keeps the strength."""

_CHUNK = 8192


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """The toys' points; then, on the language model, norms by batch size and runs at other batch sizes."""
    strength, sources = profile.strength, Sources(profile)
    made = toy_cells("strength", _toy_arms(profile), profile, strength.toy_seeds, seed, device)
    first, *others = training_seeds(strength.seeds, seed)
    made.append(
        Study("strength", profile, [first], device).cell(
            "norms",
            measure_norms,
            arm=standard_arms(sources.lm, device)["baseline"],
            sources=sources,
            sizes=_NormSizes.of(strength),
            batch_size=sources.lm.batch_size,
        )
    )
    for one in (first, *others):
        study = Study("strength", profile, [one], device)
        for (batch_size, title), arm in batch_size_arms(profile, device).items():
            made.append(
                study.cell(
                    f"B = {batch_size}, {title}, seed {one}",
                    measure_similarities,
                    arm=arm,
                    sources=sources,
                    groups=strength.groups,
                )
            )
    return made


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


def _toy_arms(profile: Profile) -> Iterator[NamedArm]:
    for name, toy in toy_settings(profile.toy, profile.strength).items():
        for point in profile.strength.strengths:
            penalty = c2r_of(toy, point)
            about = {"arm": name, "strength": point, "weight": penalty.weight}
            yield NamedArm(f"{name}, {point:g}", toy_arm(toy, TOY_ARCHITECTURE, penalty), about)


def strength_table(values: Mapping[str, Any], profile: Profile) -> pd.DataFrame:
    """BatchTopK with C²R: `arm` (the setting), `strength`, `weight` (λ), seed, fields of `ToyReport`."""
    return arm_table(values, _toy_arms(profile))


def needed_weights(table: pd.DataFrame, failure: str, target: float) -> pd.DataFrame:
    """Smallest strength, and λ, that brings the mean failure down to a target in each setting.

    The failure is a column of a `strength_table`, averaged over seeds. Columns: `arm`, `strength`, `weight`,
    interpolated on a logarithmic scale; NaN where no point reaches the target, and where the first one has
    reached it already, since then the smallest is not known.
    """
    rows = []
    for arm, points in table.groupby("arm", sort=False):
        means = points.groupby("strength")[[failure, "weight"]].mean().sort_index()
        found = {"arm": arm}
        for column, values in (("strength", means.index), ("weight", means["weight"])):
            logs = [math.log(value) for value in values]
            known = means[failure].iloc[0] > target
            found[column] = math.exp(cost_at(means[failure], logs, target)) if known else math.nan
        rows.append(found)
    return pd.DataFrame(rows)


def spread(values: Sequence[float]) -> float:
    """Largest over smallest of the values that are not NaN; NaN if fewer than two are."""
    known = [value for value in values if not math.isnan(value)]
    return max(known) / min(known) if len(known) > 1 else math.nan


# -- norms over a batch ---------------------------------------------------------------------------


class _NormSizes(NamedTuple):
    batch_sizes: tuple[int, ...]
    tokens: int
    least_firings: int
    groups: int

    @classmethod
    def of(cls, strength: StrengthProfile) -> _NormSizes:
        return cls(
            tuple(sorted(strength.norm_batch_sizes)),
            strength.norm_tokens,
            strength.least_firings,
            strength.groups,
        )


def measure_norms(
    arm: LanguageModelArm,
    sources: Sources,
    sizes: _NormSizes,
    batch_size: int,
    seeds: Sequence[int],
    device: str,
) -> dict[str, Any]:
    """`norm_rows` of a trained SAE on random training tokens, and the exponent of its whole penalty."""
    sae = trained(arm, training_data(sources.lm, device), seeds[0], device)
    store = training_store(sources.lm, device)
    chunk = min(_CHUNK, max(sizes.batch_sizes))
    batches = StoreBatches(store, chunk, seeds[0])
    n_chunks = min(sizes.tokens, len(store)) // chunk
    blocks = firing_blocks(sae, map(batches, range(n_chunks)), min(sizes.batch_sizes))
    exponent = penalty_exponent(sae, blocks, [batch_size // 4, batch_size])
    return {"rows": norm_rows(blocks, sizes), "penalty_exponent": exponent}


def norm_rows(blocks: FiringBlocks, sizes: _NormSizes) -> list[dict[str, Any]]:
    """Mean batch norms by firing rate and batch size.

    Records have `arm` (the group by firing rate), `rate` (its median), `batch_size`, `firings`
    (expected in a batch, at that rate), `norm` (the median of n_i over the root mean square of the
    latent's activations), and `slope`, `slope_low`, `slope_high` (median and quartiles of the slope
    of log n_i on log B over all batch sizes)
    """
    norms = mean_batch_norms(blocks, sizes.batch_sizes)
    slopes = log_slopes(sizes.batch_sizes, norms)
    relative = norms / blocks.magnitudes
    n_samples = len(blocks.energies) * blocks.size
    groups = rate_groups(blocks.rates, sizes.groups, sizes.least_firings / n_samples)
    rows = []
    for number, latents in enumerate(groups):
        rate = float(blocks.rates[latents].median())
        low, middle, high = torch.nanquantile(
            slopes[latents], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        for size, norm in zip(
            sizes.batch_sizes, relative[:, latents].median(dim=1).values, strict=True
        ):
            rows.append(
                {
                    "arm": group_name(number, sizes.groups),
                    "rate": rate,
                    "batch_size": size,
                    "firings": rate * size,
                    "norm": float(norm),
                    "slope": middle,
                    "slope_low": low,
                    "slope_high": high,
                }
            )
    return rows


@torch.no_grad()
def penalty_exponent(sae: SAE, blocks: FiringBlocks, batch_sizes: Sequence[int]) -> float:
    """Slope of the logarithm of C²R (α = 1) on log B for an SAE that does not change.

    The loss is linear in the norms, so that its mean over batches follows from their means. λ in
    proportion to B to the power of minus this keeps the penalty of this SAE as it is. `blocks` are its own;
    at least two batch sizes.
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


def batch_size_arms(profile: Profile, device: str) -> dict[tuple[int, str], LanguageModelArm]:
    """SAEs of `small_d_sae` latents to be trained with equal steps at several batch sizes.

    At the profile's own batch size there is the baseline and C²R; at the others the baseline and, by each
    of RULES, the λ that follows.
    """
    lm, strength = profile.language_model, profile.strength
    reference, at_reference = lm.batch_size, strength.language_model_strength
    arms = {}
    for batch_size in (reference, *strength.batch_sizes):
        own = {"baseline": 0.0}
        if batch_size == reference:
            own["C²R"] = at_reference
        else:
            own |= {r: strength_by_rule(at_reference, r, batch_size, reference) for r in RULES}
        for title, value in own.items():
            changes = {"d_sae": lm.small_d_sae, "batch_size": batch_size, "c2r_strength": value}
            arms[batch_size, title] = arm_of(lm, device, steps=strength.steps, **changes)
    return arms


@of_trained
def measure_similarities(inputs: Inputs, groups: int) -> list[dict[str, float]]:
    """Mean s_i of each group of latents by firing rate on held-out tokens, with FVU, L0 and live share."""
    report, density = streamed(inputs)
    similarities = neighbour_similarities(inputs.sae.W_dec, density > 0)
    whole = {"fvu": report.fvu, "l0": report.l0, "live_share": report.frac_alive}
    return [
        {
            "group": number,
            "rate": float(density[latents].median()),
            "similarity": float(similarities[latents].mean()),
        }
        | whole
        for number, latents in enumerate(rate_groups(density, groups))
    ]


def batch_size_table(values: Mapping[str, Any], profile: Profile, seed: int = 0) -> pd.DataFrame:
    """What `measure_similarities` found, with the batch size, arm and seed.

    `relative` is `similarity` over that of the baseline of equal batch size, seed and group.
    """
    rows = []
    for one in training_seeds(profile.strength.seeds, seed):
        for batch_size, title in batch_size_arms(profile, "cpu"):
            base = values[slug(f"B = {batch_size}, baseline, seed {one}")]
            for row, reference in zip(
                values[slug(f"B = {batch_size}, {title}, seed {one}")], base, strict=True
            ):
                of_baseline = reference["similarity"]
                relative = row["similarity"] / of_baseline if of_baseline else math.nan
                about = {"batch_size": batch_size, "arm": title, "seed": one}
                rows.append(about | {"relative": relative} | row)
    return pd.DataFrame(rows)


def distance_from_reference(table: pd.DataFrame, reference: int) -> pd.DataFrame:
    """How far each rule's effect is from the reference's, in factors: `batch_size`, `arm`, `group`, `factor`.

    From a `batch_size_table`: `relative` over that of C²R at the reference batch size. 1 is an equal effect,
    more is less effect.
    """
    own = table[(table["batch_size"] == reference) & (table["arm"] == "C²R")]
    goal = own.set_index("group")["relative"]
    others = table[table["arm"].isin(RULES)]
    factor = others["relative"].to_numpy() / goal.loc[others["group"]].to_numpy()
    return others[["batch_size", "arm", "group"]].assign(factor=factor).reset_index(drop=True)
