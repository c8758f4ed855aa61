"""C²R in SAELens: the same penalty as ours, trained, logged, saved and resumed by SAELens itself."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator
from torch.func import functional_call

from c2r_core.formats import open_sae
from c2r_core.saes import StepInput, create_sae
from c2r_core.seeds import mix_seeds
from c2r_core.training import C2R
from conftest import PROJECT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="the extra saelens is not installed")
    from datasets import Dataset
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput

    from c2r_core.training import sae_lens as plugin

pytestmark = pytest.mark.filterwarnings("ignore")

D_IN, D_SAE, BATCH = 16, 64, 32
SETTINGS = {
    "TopK": {"k": 4},
    "BatchTopK": {"k": 4},
    "MatryoshkaBatchTopK": {"k": 4, "matryoshka_widths": [16, D_SAE]},
    "JumpReLU": {"jumprelu_init_threshold": 0.25, "l0_coefficient": 0.02},
}
OURS = {
    "TopK": ("topk", {"k": 4}),
    "BatchTopK": ("batch_topk", {"k": 4}),
    "MatryoshkaBatchTopK": ("matryoshka_batch_topk", {"k": 4, "group_fractions": (0.25, 0.75)}),
    "JumpReLU": ("jump_relu", {"target_l0": 4, "bandwidth": 0.05}),
}
SAVED_AS = {"TopK": "topk"} | dict.fromkeys(list(SETTINGS)[1:], "jumprelu")
every_kind = pytest.mark.parametrize("kind", SETTINGS)


def config(kind, **settings):
    make = getattr(plugin, f"C2R{kind}TrainingSAEConfig")
    return make(**{"d_in": D_IN, "d_sae": D_SAE, **SETTINGS[kind], **settings})


def new_sae(kind, *, seed=0, **settings):
    """A training SAE whose biases are not 0 and whose decoder rows have many norms."""
    sae = sae_lens.TrainingSAE.from_dict(config(kind, **settings).to_dict())
    rng = Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=rng) / D_IN**0.5)
        sae.W_enc.copy_(sae.W_dec.T)
        sae.W_dec.mul_(0.5 + torch.rand(D_SAE, 1, generator=rng))
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=rng))
        sae.b_dec.copy_(0.1 * torch.randn(D_IN, generator=rng))
    return sae


def batch(step, dtype=torch.float32):
    """Sparse sums of 40 directions, a pure function of the step."""
    directions = torch.randn(40, D_IN, generator=Generator().manual_seed(99))
    rng = Generator().manual_seed(mix_seeds(7, step))
    strengths = torch.rand(BATCH, 40, generator=rng)
    strengths *= torch.rand(BATCH, 40, generator=rng) < 0.1
    return (strengths @ directions).to(dtype)


def batches(first=0):
    return map(batch, itertools.count(first))


def step_input(x, step=0, *, logs=False):
    counted = {"l0": 0.02, "c2r_step": float(step)}
    return TrainStepInput(x, counted, None, n_training_steps=step, is_logging_step=logs)


def trainer(sae, steps, first=0, **settings):
    recipe = SAETrainerConfig(steps * BATCH, BATCH, lr=3e-3, lr_end=3e-3, **settings)
    return sae_lens.SAETrainer(recipe, sae, batches(first))


def penalty_of(sae):
    """C²R over batches that no training here saw."""
    values = []
    with torch.no_grad():
        for step in range(1000, 1004):
            x = step_input(batch(step))
            values.append(sae.c2r(sae.encode(x.sae_in), x))
    return torch.stack(values).mean().item()


# -- the same penalty ---------------------------------------------------------------------------


class OurActivations(torch.nn.Module):
    """The activations that our trainer hands to a regulariser."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.training_losses(StepInput(x)).feature_acts


def our_term(kind, sae, x, step, regulariser, seed):
    """λ · every · C²R by our SAE of the same weights and our regulariser, and its gradients by name."""
    leaves = {name: p.detach().to(x.dtype).requires_grad_() for name, p in sae.named_parameters()}
    weights = dict(leaves)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # SAELens' meaning: rows of norm 1
        norms = leaves["W_dec"].norm(dim=-1)
        weights["W_dec"] = leaves["W_dec"] / norms.unsqueeze(-1)
        weights["W_enc"] = leaves["W_enc"] * norms
        weights["b_enc"] = leaves["b_enc"] * norms
    architecture, own = OURS[kind]
    ours = OurActivations(create_sae(architecture, d_in=D_IN, d_sae=D_SAE, **own))
    acts = functional_call(ours, {f"sae.{k}": tensor for k, tensor in weights.items()}, (x,))
    generator = Generator().manual_seed(mix_seeds(seed, step))
    value = regulariser(acts, weights["W_dec"], generator)
    term = regulariser.weight * regulariser.strength_at(step) * value
    grads = torch.autograd.grad(term, list(leaves.values()), allow_unused=True)
    return term.detach(), dict(zip(leaves, grads, strict=True))


@every_kind
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 3, "warmup": 20},
        {"alpha": 1.5, "chunk_size": 16},
        {"decoder_norm": False},
        {"rescale_acts_by_decoder_norm": False},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_loss_and_gradient_are_ours(kind, options):
    options = dict(options)
    by_norm = options.pop("rescale_acts_by_decoder_norm", None)
    theirs = {f"c2r_{name}": value for name, value in options.items()} | {"c2r_seed": 5}
    if by_norm is not None and kind != "JumpReLU":  # which has no such setting
        theirs["rescale_acts_by_decoder_norm"] = by_norm
    sae = new_sae(kind, dtype="float64", c2r_weight=0.7, **theirs)
    x, step = batch(3, torch.float64), 6
    given = step_input(x, step)
    feature_acts, hidden_pre = sae.encode_with_hidden_pre(x)
    losses = sae.calculate_aux_loss(given, feature_acts, hidden_pre, sae.decode(feature_acts))
    term, grads = our_term(kind, sae, x, step, C2R(0.7, **options), seed=5)
    assert term > 1e-3
    torch.testing.assert_close(losses["c2r_loss"].detach(), term)
    losses["c2r_loss"].backward()
    moved = {name for name, parameter in sae.named_parameters() if parameter.grad is not None}
    assert moved >= {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, parameter in sae.named_parameters():  # SAELens keeps thresholds in float32
        assert parameter.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, grads[name].to(parameter.dtype), msg=name)


@every_kind
def test_nothing_but_the_term_is_added(kind):
    plain_config = {"d_in": D_IN, "d_sae": D_SAE, **SETTINGS[kind]}
    plain = getattr(sae_lens, f"{kind}TrainingSAE")(
        getattr(sae_lens, f"{kind}TrainingSAEConfig")(**plain_config)
    )
    for weight, added in ((0.0, set()), (0.5, {"c2r_loss"})):
        sae = new_sae(kind, c2r_weight=weight)
        plain.load_state_dict(sae.state_dict())
        theirs = plain.training_forward_pass(step_input(batch(0)))
        ours = sae.training_forward_pass(step_input(batch(0)))
        assert set(ours.losses) - set(theirs.losses) == added
        assert ours.sae_out.equal(theirs.sae_out)
        term = ours.losses.get("c2r_loss", torch.tensor(0.0))
        torch.testing.assert_close(ours.loss, theirs.loss + term)


def test_sparse_and_low_precision_activations():
    dense, sparse = (
        new_sae(
            "TopK", c2r_weight=1.0, use_sparse_activations=use, rescale_acts_by_decoder_norm=False
        )
        for use in (False, True)
    )
    x = batch(0)
    wanted, found = (sae.training_forward_pass(step_input(x)) for sae in (dense, sparse))
    assert found.feature_acts.is_sparse
    torch.testing.assert_close(found.losses["c2r_loss"], wanted.losses["c2r_loss"])
    wanted.loss.backward()
    found.loss.backward()
    torch.testing.assert_close(sparse.W_enc.grad, dense.W_enc.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = dense.training_forward_pass(step_input(x)).losses["c2r_loss"]
    half = new_sae("TopK", c2r_weight=1.0, dtype="bfloat16", rescale_acts_by_decoder_norm=False)
    for term in (low, half.training_forward_pass(step_input(x)).losses["c2r_loss"]):
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, wanted.losses["c2r_loss"], rtol=0.03, atol=0)


# -- trained by SAELens ---------------------------------------------------------------------------


@every_kind
def test_saelens_trainer_lowers_the_penalty(kind):
    values = {}
    for weight in (0.0, 3.0):
        sae = new_sae(kind, c2r_weight=weight)
        values[weight] = penalty_of(trainer(sae, steps=60).fit())
    assert values[3.0] < 0.7 * values[0.0]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_log_has_the_term_and_the_bare_penalty(monkeypatch, every, weight):
    logged = []
    monkeypatch.setattr("sae_lens.training.sae_trainer.wandb.log", lambda d, step: logged.append(d))
    sae = new_sae("TopK", c2r_weight=weight, c2r_every=every)
    trainer(sae, steps=20, logger=LoggingConfig(wandb_log_frequency=10)).fit()
    assert len(logged) == 2
    for record in logged:  # steps 9 and 19, on which every=5 does not act
        assert record["metrics/c2r"] > 0
        assert ("losses/c2r_loss" in record) == (weight > 0 and every == 1)
        if weight and every == 1:
            term = weight * record["metrics/c2r"]
            assert record["losses/c2r_loss"] == pytest.approx(term, rel=1e-5)


@every_kind
def test_resumed_from_saelens_checkpoint_ends_with_the_same_weights(kind, tmp_path):
    schedule = {"c2r_every": 3, "c2r_start": 2, "c2r_warmup": 12, "c2r_chunk_size": 16}
    settings = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path)}
    whole = trainer(new_sae(kind, c2r_weight=1.0, **schedule), steps=20, **settings)
    whole.fit()
    (checkpoint,) = tmp_path.iterdir()
    samples = int(checkpoint.name)
    assert 0 < samples < 20 * BATCH
    saved = json.loads((checkpoint / "cfg.json").read_text(encoding="utf-8"))
    sae = sae_lens.TrainingSAE.from_dict(saved)
    resumed = trainer(sae, steps=20, first=samples // BATCH)
    resumed.load_trainer_state(checkpoint)  # these two as in SAELens' runner
    sae.load_weights_from_checkpoint(checkpoint)
    resumed.fit()
    wanted = whole.sae.state_dict()
    assert all(tensor.equal(wanted[name]) for name, tensor in sae.state_dict().items())
    without = trainer(new_sae(kind, c2r_weight=0.0), steps=20).fit()
    assert not without.W_dec.equal(wanted["W_dec"])


def test_steps_count_in_a_loop_without_saelens_schedulers():
    sae = new_sae("TopK", c2r_weight=1.0, c2r_every=3)
    for coefficients in ({}, {"c2r_step": sae.get_coefficients()["c2r_step"].value}):
        acts = [
            "c2r_loss"
            in sae.training_forward_pass(
                TrainStepInput(batch(0), coefficients, None, step, False)
            ).losses
            for step in range(6)
        ]
        assert acts == [True, False, False, True, False, False]


# -- configs and files ----------------------------------------------------------------------------


@every_kind
def test_config_round_trip(kind, tmp_path):
    made = config(kind, c2r_weight=0.25, c2r_every=5, c2r_chunk_size=32, c2r_decoder_norm=False)
    assert sae_lens.TrainingSAEConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    run = sae_lens.LanguageModelSAERunnerConfig(sae=made, verbose=False)
    again = sae_lens.LanguageModelSAERunnerConfig.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.sae == made and again.sae.c2r() == C2R(
        0.25, every=5, chunk_size=32, decoder_norm=False
    )
    sae = new_sae(kind, c2r_weight=0.25, c2r_every=5)
    sae.save_model(tmp_path)
    loaded = sae_lens.TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae) and loaded.cfg == sae.cfg
    assert all(p.equal(sae.state_dict()[name]) for name, p in loaded.state_dict().items())
    theirs = getattr(sae_lens, f"{kind}TrainingSAEConfig").architecture()
    assert sae.cfg.architecture() == f"c2r_{theirs}"
    assert open_sae(tmp_path).architecture == theirs, "a training checkpoint opens by SAELens' name"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"c2r_weight": -1.0}, r"c2r_weight is -1.0; expected a finite number >= 0. Take 0 "),
        ({"c2r_weight": math.nan}, r"c2r_weight is nan; expected .*weight_from_strength\("),
        ({"c2r_weight": math.inf}, "c2r_weight is inf; expected"),
        ({"c2r_weight": "0.3"}, "c2r_weight is '0.3'; expected"),
        ({"c2r_weight": None}, "c2r_weight is None; expected"),
        ({"c2r_weight": [0.1, 0.2]}, r"c2r_weight is \[0.1, 0.2\]; expected"),
        ({"c2r_weight": 1.0, "c2r_every": 0}, "c2r_every is 0; expected a number of steps >= 1"),
        ({"c2r_weight": 1.0, "c2r_alpha": 0}, "c2r_alpha is 0; expected a positive exponent"),
    ],
)
@every_kind
def test_a_bad_setting_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        config(kind, **settings)


def test_the_weight_has_to_be_said():
    with pytest.raises(TypeError, match="c2r_weight"):
        config("TopK")


@every_kind
@pytest.mark.parametrize("scale", ["none", "expected_average_only_in"])
def test_the_inference_sae_is_saelens_own_and_opens_here(kind, scale, tmp_path):
    sae = new_sae(kind, c2r_weight=0.5, normalize_activations=scale)
    sae = trainer(sae, steps=10, n_batches_for_norm_estimate=2).fit()
    sae.save_inference_model(tmp_path)
    saved = json.loads((tmp_path / "cfg.json").read_text(encoding="utf-8"))
    assert saved["architecture"] == SAVED_AS[kind] and "c2r_weight" not in saved
    details = saved["metadata"]["training_architecture_details"]
    assert details["c2r_weight"] == 0.5, "what it was trained with is kept"
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert (
        type(theirs) is {"topk": sae_lens.TopKSAE, "jumprelu": sae_lens.JumpReLUSAE}[SAVED_AS[kind]]
    )
    opened, x = open_sae(tmp_path), batch(50)
    assert opened.architecture == SAVED_AS[kind]
    with torch.no_grad():
        feature_acts = theirs.encode(x)
        assert (feature_acts > 0).any()
        torch.testing.assert_close(opened.sae.encode(x), feature_acts)
        torch.testing.assert_close(opened.sae.decode(feature_acts), theirs.decode(feature_acts))


# -- SAELens' runner, by the guide's lines --------------------------------------------------------

SMALLER = {
    "batch_size=4096": "batch_size=64",
    "tokens=4096": "tokens=64",
    "d_in=768": "d_in=64",
    "d_sae=8192": "d_sae=128",
    "k=32": "k=4",
    "mean_square_norm=768": "mean_square_norm=64",
    "**rest": "**(rest | more)",
}


@pytest.fixture
def run_guide(tmp_path, monkeypatch, random_model, few_documents):
    """Runs the guide's lines on a small random model; gives the steps on which C²R was asked for,
    each with W_dec before it."""
    guide = (PROJECT / "docs" / "guide.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    (example,) = [code for code in blocks if "SAETrainingRunner" in code]
    for large, small in SMALLER.items():
        assert large in example, large
        example = example.replace(large, small)
    texts = Dataset.from_dict(
        {"text": [document.text[:2000] for document in few_documents.documents]}
    )
    monkeypatch.setattr(
        "sae_lens.llm_sae_training_runner.load_model", lambda *args, **options: random_model
    )
    monkeypatch.setattr(
        "sae_lens.training.activations_store.load_dataset", lambda *args, **options: texts
    )
    seen, factor = [], plugin.AddsC2R._factor

    def spy(self, given):
        seen.append((plugin._step(given), self.W_dec.detach().clone()))
        return factor(self, given)

    monkeypatch.setattr(plugin.AddsC2R, "_factor", spy)
    smaller = {
        "hook_name": "blocks.0.hook_resid_post",
        "dataset_path": "texts",
        "is_dataset_tokenized": False,
        "streaming": False,
        "context_size": 16,
        "training_tokens": 640,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
        "n_batches_for_norm_estimate": 2,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_checkpoints": 1,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "verbose": False,
    }

    def run(**more):
        seen.clear()
        exec(example, {"more": smaller | more})
        return list(seen)

    return run


def test_saelens_runner_trains_saves_and_resumes(tmp_path, run_guide):
    steps = run_guide(output_path=str(tmp_path / "sae"))
    assert [step for step, _ in steps] == list(range(10))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    first = int(checkpoint.name) // 64
    opened = open_sae(tmp_path / "sae")
    assert (opened.architecture, opened.stated["data"]) == ("jumprelu", "texts")
    settings = json.loads((tmp_path / "sae" / "runner_cfg.json").read_text(encoding="utf-8"))["sae"]
    assert settings["architecture"] == "c2r_batchtopk" and settings["c2r_weight"] > 0
    resumed = run_guide(
        resume_from_checkpoint=str(checkpoint), output_path=str(tmp_path / "resumed")
    )
    assert [step for step, _ in resumed] == list(range(first, 10))
    saved = load_file(checkpoint / "sae_weights.safetensors")["W_dec"]
    assert resumed[0][1].equal(saved) and resumed[0][1].equal(steps[first][1])
    assert open_sae(tmp_path / "resumed").sae.W_dec.shape == opened.sae.W_dec.shape
