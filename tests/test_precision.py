"""What precision `auto` means: asked of a GPU, timed once on a processor."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from c2r_core.data import precision as module
from c2r_core.data.precision import faster_on_processor, resolve_precision
from c2r_core.speed import bfloat16_speed_up, int8_product, int8_speed_up


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_CACHE", str(tmp_path))
    module._chosen.cache_clear()
    yield
    module._chosen.cache_clear()


def timer(speed_up: float, calls: list | None = None):
    """A processor that is so many times as fast in bfloat16."""

    def measure():
        if calls is not None:
            calls.append(speed_up)
        return speed_up

    return measure


def refuse():
    raise AssertionError("timed again")


def test_a_precision_that_is_named_is_taken():
    for name in ("float32", "bfloat16"):
        assert resolve_precision(name, "cpu") == resolve_precision(name, "cuda") == name
    with pytest.raises(ValueError, match="precision is 'half'"):
        resolve_precision("half", "cpu")


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_is_asked(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert resolve_precision("auto", "cuda:0") == expected
    assert resolve_precision("auto", "mps") == "float32"


@pytest.mark.parametrize(
    ("speed_up", "expected"), [(2.0, "bfloat16"), (1.1, "float32"), (0.1, "float32")]
)
def test_a_processor_must_gain_a_fifth(tmp_path, speed_up, expected):
    assert faster_on_processor(tmp_path / "here.json", timer(speed_up)) == expected


def test_it_is_timed_once_a_machine(tmp_path, monkeypatch):
    file, calls = tmp_path / "deep" / "here.json", []
    assert faster_on_processor(file, timer(2.0, calls)) == "bfloat16"
    assert calls == [2.0]
    assert faster_on_processor(file, refuse) == "bfloat16"
    monkeypatch.setattr(module, "_processor", lambda: "another")
    assert faster_on_processor(file, timer(0.5)) == "float32"
    known = json.loads(file.read_text())
    assert sorted(known.values()) == ["bfloat16", "float32"]
    assert f"another, torch {torch.__version__}" in known
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(known, "half"))):
        file.write_text(damaged)
        assert faster_on_processor(file, timer(2.0)) == "bfloat16"


def test_auto_times_the_processor_and_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(module, "bfloat16_speed_up", timer(2.0))
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert [resolve_precision("auto", "cpu") for _ in range(3)] == ["bfloat16"] * 3
    assert caplog.messages == ["precision auto is bfloat16 on cpu"]
    monkeypatch.setattr(module, "bfloat16_speed_up", refuse)
    module._chosen.cache_clear()  # as in another process
    assert resolve_precision("auto", "cpu") == "bfloat16"


def test_the_products_are_timed_and_no_random_number_is_drawn():
    before = torch.get_rng_state()
    for measure in (bfloat16_speed_up, int8_speed_up):
        measure.cache_clear()
        assert measure() > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert module._processor()


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"3", b'{"HERE": [1]}', b"{"])
def test_a_damaged_file_of_answers_is_made_anew(tmp_path, monkeypatch, content):
    kept = tmp_path / "here.json"
    faster_on_processor(kept, timer(2.0))
    (machine,) = json.loads(kept.read_text())
    kept.write_bytes(content.replace(b"HERE", machine.encode()))
    assert faster_on_processor(kept, timer(1.0)) == "float32"
    assert json.loads(kept.read_text()) == {machine: "float32"}


@pytest.mark.parametrize("n, m, d", [(1, 1, 16), (512, 1, 32), (1, 512, 576), (300, 17, 48)])
def test_the_product_in_int8_is_exact(n, m, d):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (rows, d), generator=generator) for rows in (n, m))
    a[0], b[0] = 127, -127
    assert int8_product(a.to(torch.int8), b.to(torch.int8)).equal((a @ b.mT).int())


@pytest.mark.parametrize("product", [None, lambda a, b: a.int() @ b.int() + 1])
def test_where_int8_has_no_product_or_a_wrong_one_it_is_not_used(product, monkeypatch):
    if product is None:
        monkeypatch.delattr(torch, "_int_mm")
    else:
        monkeypatch.setattr(torch, "_int_mm", product)
    int8_speed_up.cache_clear()
    assert int8_speed_up() == 0
    int8_speed_up.cache_clear()
