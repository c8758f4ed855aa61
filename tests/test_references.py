"""Every architecture's training objective against a plain reference of its published loss, in float64.

The references are slow and obvious: one sample at a time, one latent at a time, and nothing of
c2r_core in them. Value and gradient of the whole objective must agree.
"""

from __future__ import annotations

import math

import pytest
import torch

from architectures import D_IN, D_SAE, batch, every_architecture, make
from c2r_core.saes import StepInput

AUX_K = 1 / 32


def pre_activations(p, x):
    """z[b][i], one number at a time."""
    return [
        [(sample - p["b_dec"]) @ p["W_enc"][:, i] + p["b_enc"][i] for i in range(D_SAE)]
        for sample in x
    ]


def positive(z):
    return z if z > 0 else 0 * z


def squared_error(p, sample, acts, latents=range(D_SAE)):
    """‖x − b_dec − Σ_i f_i w_i‖² of one sample, over the given latents."""
    x_hat = p["b_dec"]
    for i in latents:
        x_hat = x_hat + acts[i] * p["W_dec"][i]
    return ((sample - x_hat) ** 2).sum()


def mean(terms):
    terms = list(terms)
    return sum(terms) / len(terms)


def relu(p, x, dead):
    """Bricken et al. 2023: mean of ‖x − x̂‖² + λ ‖f‖₁."""
    acts = [[positive(z) for z in row] for row in pre_activations(p, x)]
    return mean(squared_error(p, s, f) + 0.01 * sum(f) for s, f in zip(x, acts, strict=True))


def relu_april(p, x, dead):
    """April update 2024: mean of ‖x − x̂‖² + λ Σ_i f_i ‖w_i‖."""
    acts = [[positive(z) for z in row] for row in pre_activations(p, x)]
    row_norms = [(row**2).sum().sqrt() for row in p["W_dec"]]
    return mean(
        squared_error(p, s, f) + 0.01 * sum(a * n for a, n in zip(f, row_norms, strict=True))
        for s, f in zip(x, acts, strict=True)
    )


def aux_k(p, x, z, acts, dead):
    """2406.04093, A.2: what is left over, by the d/2 strongest dead latents; over its variance."""
    left_over, errors = [], []
    for sample, f in zip(x, acts, strict=True):
        x_hat = p["b_dec"] + sum(f[i] * p["W_dec"][i] for i in range(D_SAE))
        left_over.append((sample - x_hat).detach())
    for e, row in zip(left_over, z, strict=True):
        strongest = sorted((i for i in range(D_SAE) if dead[i]), key=lambda i: -row[i].item())
        e_hat = sum(positive(row[i]) * p["W_dec"][i] for i in strongest[: D_IN // 2])
        errors.append(((e - e_hat) ** 2).sum())
    centre = mean(left_over)
    return mean(errors) / mean(((e - centre) ** 2).sum() for e in left_over)


def topk(p, x, dead, k=3):
    """2406.04093: the k largest of each sample; mean of ‖x − x̂‖², and aux-k."""
    z = pre_activations(p, x)
    acts = []
    for row in z:
        largest = sorted(range(D_SAE), key=lambda i: -row[i].item())[:k]
        acts.append([positive(row[i]) if i in largest else 0 * row[i] for i in range(D_SAE)])
    error = mean(squared_error(p, s, f) for s, f in zip(x, acts, strict=True))
    return error + AUX_K * aux_k(p, x, z, acts, dead)


def largest_of_batch(z, k):
    """The batch · k largest of all activations."""
    entries = [(b, i) for b in range(len(z)) for i in range(D_SAE)]
    kept = set(sorted(entries, key=lambda e: -z[e[0]][e[1]].item())[: len(z) * k])
    return [
        [positive(z[b][i]) if (b, i) in kept else 0 * z[b][i] for i in range(D_SAE)]
        for b in range(len(z))
    ]


def batch_topk(p, x, dead):
    """2412.06410: mean of ‖x − x̂‖² over the batch · k largest, and aux-k."""
    z = pre_activations(p, x)
    acts = largest_of_batch(z, 3)
    error = mean(squared_error(p, s, f) for s, f in zip(x, acts, strict=True))
    return error + AUX_K * aux_k(p, x, z, acts, dead)


def matryoshka_batch_topk(p, x, dead):
    """2503.17547: the same with every prefix of the dictionary, their mean."""
    z = pre_activations(p, x)
    acts = largest_of_batch(z, 3)
    ends = [1, 4, 9, 19, 40]  # of 40 latents: 1/32, 3/32, 7/32, 15/32, all; to the nearest
    error = mean(
        mean(squared_error(p, s, f, range(end)) for s, f in zip(x, acts, strict=True))
        for end in ends
    )
    return error + AUX_K * aux_k(p, x, z, acts, dead)


def jump_relu(p, x, dead, target=3, width=0.3):
    """2407.14435, equations 9 to 12, and its loss for a fixed L0: (L0 / target − 1)².

    The pseudo-derivatives enter as terms of value 0 and the wanted slope in θ.
    """
    acts, active = [], []
    for row in pre_activations(p, x):
        f, on = [], []
        for z, theta in zip(row, p["threshold"], strict=True):
            now = theta.item()
            moved = theta - now
            kernel = 1.0 if 0 < z.item() and abs(z.item() - now) < width / 2 else 0.0
            jump = 1.0 if z.item() > now else 0.0
            f.append(z * jump - now / width * kernel * moved)
            on.append(jump - kernel / width * moved)
        acts.append(f)
        active.append(sum(on))
    error = mean(squared_error(p, s, f) for s, f in zip(x, acts, strict=True))
    return error + 1.0 * (mean(active) / target - 1) ** 2


def gated(p, x, dead):
    """2404.16014, equations 3 to 8: ‖x − x̂(f)‖² + λ ‖relu(g)‖₁ + ‖x − x̂_frozen(relu(g))‖²."""
    frozen = {"W_dec": p["W_dec"].detach(), "b_dec": p["b_dec"].detach()}
    losses = []
    for sample in x:
        acts, gates = [], []
        for i in range(D_SAE):
            along = (sample - p["b_dec"]) @ p["W_enc"][:, i]
            gate = along + p["b_enc"][i]
            magnitude = positive(along * p["r_mag"][i].exp() + p["b_mag"][i])
            acts.append(magnitude if gate > 0 else 0 * magnitude)
            gates.append(positive(gate))
        main = squared_error(p, sample, acts)
        losses.append(main + 0.01 * sum(gates) + squared_error(frozen, sample, gates))
    return mean(losses)


def p_anneal(p, x, dead, exponent=0.2):
    """2408.00113, section 4: mean of ‖x − x̂‖² + λ_p ‖f‖_p^p, at the end of the annealing.

    λ_p keeps the penalty's strength: λ times the ratio of the two norms, constant.
    """
    acts = [[positive(z) for z in row] for row in pre_activations(p, x)]
    powers = sum(a**exponent for f in acts for a in f if a > 0)
    ratio = sum(a.item() for f in acts for a in f) / powers.item()
    error = mean(squared_error(p, s, f) for s, f in zip(x, acts, strict=True))
    return error + 0.01 * ratio * powers / len(x)


REFERENCES = {
    f.__name__: f
    for f in (
        relu,
        relu_april,
        topk,
        batch_topk,
        matryoshka_batch_topk,
        jump_relu,
        gated,
        p_anneal,
    )
}


@every_architecture
@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stack"])
def test_objective_is_the_published_one(architecture, stacked):
    if architecture not in REFERENCES:
        pytest.skip(f"no published loss of {architecture} among REFERENCES")
    seeds = [3, 4] if stacked else 3
    sae = make(architecture, seed=seeds).double()
    singles = sae.unstack() if stacked else [sae]
    x = torch.stack([batch(i, torch.float64) for i in range(len(singles))])
    dead = torch.arange(D_SAE) % 4 == 0
    ours = sae.training_losses(
        StepInput(x if stacked else x[0], dead=dead.expand(2, -1) if stacked else dead)
    ).total(AUX_K)
    names = [name for name, _ in sae.named_parameters()]
    gradients = torch.autograd.grad(ours.sum(), list(sae.parameters()))
    for i, single in enumerate(singles):
        parameters = {n: v.detach().clone().requires_grad_() for n, v in single.named_parameters()}
        expected = REFERENCES[architecture](parameters, x[i], dead)
        torch.testing.assert_close(ours[i] if stacked else ours, expected)
        wanted = torch.autograd.grad(expected, [parameters[name] for name in names])
        for name, gradient, reference in zip(names, gradients, wanted, strict=True):
            assert reference.abs().max() > 0, f"the test does not reach {name}"
            torch.testing.assert_close(
                gradient[i] if stacked else gradient, reference, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_p_anneal_starts_as_plain_l1():
    sae = make("p_anneal").double()
    x = batch(dtype=torch.float64)
    for progress in (0.0, sae.anneal_start):
        losses = sae.training_losses(StepInput(x, progress=progress))
        torch.testing.assert_close(losses.sparsity, 0.01 * losses.feature_acts.sum(-1).mean())
    assert sae.p_at(0.55) == pytest.approx(0.6) and math.isclose(sae.p_at(1.0), 0.2)


def test_the_april_updates_weight_rises():
    sae = make("relu_april").double()
    x = batch(dtype=torch.float64)
    whole = sae.training_losses(StepInput(x)).sparsity
    for progress, share in ((0.0, 0.0), (0.02, 0.4), (0.05, 1.0), (0.5, 1.0)):
        torch.testing.assert_close(
            sae.training_losses(StepInput(x, progress=progress)).sparsity, share * whole
        )
