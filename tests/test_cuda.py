"""The same on a GPU as on the CPU, within rounding; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from architectures import every_architecture, new_sae
from c2r_core import C2R, BatchTopKSAE, TrainConfig, c2r_loss, load_sae, save_sae, train
from c2r_core.evaluate import Options, evaluate
from c2r_core.losses import nearest_neighbours, neighbours

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: what runs on a GPU is not tested here"
)

D_IN, D_SAE, BATCH = 64, 96, 128


def on_gpu(sae):
    return new_sae_like(sae).to("cuda")


def new_sae_like(sae):
    copy = type(sae)(**{key: value for key, value in sae.config.items() if key != "architecture"})
    copy.load_state_dict(sae.state_dict())
    return copy


def batches(device):
    """Batches of mean squared norm 1, the same on both devices."""

    def batch(step):
        x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(step))
        return (x / x.square().sum(-1).mean().sqrt()).to(device)

    return batch


def test_the_loss_and_its_gradients_are_the_cpu_s(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(BATCH, D_SAE, generator=generator)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    values = {}
    for device in ("cpu", "cuda"):
        inputs = [one.to(device).requires_grad_() for one in (acts, W_dec)]
        loss = c2r_loss(*inputs)
        values[device] = [
            loss.detach().cpu(),
            *(g.cpu() for g in torch.autograd.grad(loss, inputs)),
        ]
    for ours, plain in zip(values["cuda"], values["cpu"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)
    monkeypatch.setattr(neighbours, "_tile", lambda device: 40)  # so that there are several
    found = nearest_neighbours(W_dec.cuda())
    assert found.index.cpu().equal(nearest_neighbours(W_dec).index)


@every_architecture
def test_a_few_steps_train_as_on_the_cpu(architecture):
    plain = new_sae(architecture, D_IN, D_SAE)
    ours = on_gpu(plain)
    for sae, device in ((plain, "cpu"), (ours, "cuda")):
        train(sae, batches(device), TrainConfig(steps=5), [C2R(weight=0.3)], progress=False)
        assert sae.W_dec.device.type == device
    x = batches("cpu")(99)
    error = [float((sae(x.to(sae.W_dec)).cpu() - x).square().mean()) for sae in (plain, ours)]
    assert error[1] == pytest.approx(error[0], rel=0.02)


def test_a_penalised_step_of_a_stack_trains_on_the_gpu():
    sae = BatchTopKSAE(D_IN, D_SAE, k=4, seed=[0, 1]).to("cuda")

    def two(step):
        return torch.stack([batches("cuda")(step), batches("cuda")(step + 1000)])

    history = train(sae, two, TrainConfig(steps=3), [C2R(weight=0.3, every=1)], progress=False)
    assert all(torch.tensor(record["c2r"]).isfinite().all() for record in history.records)


def test_what_was_trained_on_a_gpu_is_saved_and_loaded_on_either(tmp_path):
    sae = BatchTopKSAE(D_IN, D_SAE, k=4).to("cuda")
    train(sae, batches("cuda"), TrainConfig(steps=3), progress=False)
    save_sae(sae, tmp_path / "sae")
    for device in ("cpu", "cuda"):
        again = load_sae(tmp_path / "sae", device)
        assert again.W_dec.device.type == device
        assert again.W_dec.cpu().equal(sae.W_dec.cpu())


def test_an_evaluation_on_the_gpu_is_the_cpu_s():
    sae = BatchTopKSAE(D_IN, D_SAE, k=4)
    train(sae, batches("cpu"), TrainConfig(steps=20), progress=False)
    values = {}
    for device in ("cpu", "cuda"):
        report = evaluate(
            new_sae_like(sae).to(device),
            model="random-2-layer",
            hook_name="blocks.1.hook_resid_post",
            metrics=["core"],
            options=Options(profile="smoke", device=device),
        )
        values[device] = {f"{row.metric}.{row.field}": row.value for row in report.headline()}
    assert values["cuda"] == pytest.approx(values["cpu"], rel=1e-3, abs=1e-4)
