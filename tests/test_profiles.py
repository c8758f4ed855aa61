from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from c2r_core.artefacts.profiles import PROFILES_FILE, load_profile, profile_names

PROFILES = yaml.safe_load(PROFILES_FILE.read_text(encoding="utf-8"))


@pytest.fixture
def changed(tmp_path: Path):
    """Writes profiles.yml with one line of the real file replaced."""

    def write(old: str, new: str) -> Path:
        text = PROFILES_FILE.read_text(encoding="utf-8")
        assert old in text
        path = tmp_path / "profiles.yml"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return path

    return write


def test_the_four_sizes_load():
    assert profile_names() == ["default", "smoke", "full", "paper"]
    for name in profile_names():
        assert load_profile(name).name == name


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "default"])
def test_a_profile_lists_only_what_differs(name):
    own = dict(PROFILES[name])
    base = load_profile(own.pop("based_on", "default"))
    for section, changes in own.items():
        for key, value in changes.items():
            assert getattr(getattr(base, section), key) != value, f"{name}.{section}.{key}"


def test_what_is_not_listed_comes_from_default():
    smoke, default = load_profile("smoke"), load_profile("default")
    assert smoke.toy.steps < default.toy.steps
    assert smoke.toy.d_in == default.toy.d_in


def test_for_a_toy_paper_means_full():
    assert load_profile("paper").toy == load_profile("full").toy


def test_unknown_profile_suggests_the_nearest():
    with pytest.raises(ValueError, match="'defualt'; did you mean 'default'.* smoke, full, paper"):
        load_profile("defualt")


def test_unknown_key_is_named(changed):
    file = changed("magnitude_sd: 0.1", "magnitude_sd: 0.1\n    stepz: 3")
    with pytest.raises(ValueError, match="'toy.stepz'; did you mean 'toy.steps'"):
        load_profile("smoke", file)


def test_unknown_section_is_named(changed):
    with pytest.raises(ValueError, match="'toyy'; did you mean 'toy'"):
        load_profile("smoke", changed("smoke:\n  toy:", "smoke:\n  toyy:"))


def test_missing_value_is_named(changed):
    with pytest.raises(ValueError, match=r"toy\.magnitude_sd is missing"):
        load_profile("default", changed("    magnitude_sd: 0.1\n", ""))


@pytest.mark.parametrize("value", ["many", "2e-3", "'64'", "0", "1.5", "true"])
def test_wrong_type_or_range_is_named(changed, value):
    with pytest.raises(ValueError, match=r"toy\.d_in is "):
        load_profile("default", changed("d_in: 64", f"d_in: {value}"))


def test_a_profile_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_profile("smoke").toy.steps = 5


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_a_corpus_folder_is_found_from_wherever_a_process_runs(folder, monkeypatch):
    project = PROFILES_FILE.resolve().parents[2]
    monkeypatch.chdir(project / folder)
    corpus = Path(load_profile("paper").language_model.corpus)
    assert not corpus.is_absolute()
    assert corpus.resolve() == project / "data" / "openwebtext"
    assert load_profile("default").language_model.corpus == "sotu"
