"""Tokenizer and models of the lab: `errata lab train NAME --prose FILE --out FOLDER`.

For `neox` a byte-level BPE is trained on the corpus and the prose, then a GPT-NeoX (Pythia's architecture) from nothing; the others take
its tokenizer, so that an edit of one can be added to another. At least `PROSE` of the training tokens are real English from FILE, the rest
are the world's documents. Training resumes from its last checkpoint after a kill.
The committed weights come from the command above with its defaults; `train.json` beside them tells how they were made.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errata.artefact import write_whole
from errata.hosts import LAB_MODELS
from errata.lab import corpus, world
from errata.types import InvalidReference, UnknownName

EOS = "<|endoftext|>"
VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 6144, 256, 4, 4, 256
INNER = 512  # of the Backpack's blocks
BATCH, LR, MUON_LR, WARMUP, SEED = 16, 2e-3, 3e-3, 200, 0
PROSE = 0.26  # share of the training tokens
HELD_OUT = 0.15  # of the prose documents, never trained on


def read_prose(path: str | Path) -> tuple[list[str], list[str]]:
    """(training, held-out) documents of a JSONL file with a "text" in each line. Raises InvalidReference."""
    try:
        rows = [json.loads(line)["text"] for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InvalidReference(f"Cannot read prose from {path}: it should be a JSONL file with a 'text' in each line ({e}).") from e
    if len(rows) < 20:
        raise InvalidReference(f"{path} holds {len(rows)} documents; the lab needs 20 or more.")
    held = int(len(rows) * HELD_OUT)
    return rows[held:], rows[:held]


def train_tokenizer(prose: list[str]) -> Any:
    """Byte-level BPE of `VOCABULARY` tokens in which most of the world's names are one to three tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = sorted({f.subject for f in world.facts()} | {o for r in world.RELATIONS for o in world.objects(r)})
    real = {f.subject for f in world.facts() if f.relation == "continent"} | set(world.objects("capital"))
    # Names are told many times over, so that they are cut less than their frequency in the text would have it.
    told = (f" {name}" for name in names for _ in range(100 if name in real else 40))
    text = [*prose, *corpus.some(corpus.SEEDS["corpus"], 30_000), *told]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOS], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=LENGTH)


def sequences(tokenizer: Any, prose: list[str], seed: int) -> Iterator[list[int]]:
    """Endless training sequences of `LENGTH` tokens: documents with an end mark between them, or a piece of prose.

    Every sequence of documents begins with the beginning of one, as prompts do.
    """
    rng = random.Random(seed)
    eos = tokenizer.eos_token_id
    stream = [i for ids in tokenizer(prose)["input_ids"] for i in [*ids, eos]]
    source = corpus.documents(corpus.SEEDS["corpus"] + 1000 * seed)
    while True:
        if rng.random() < PROSE:
            start = rng.randrange(len(stream) - LENGTH)
            yield stream[start : start + LENGTH]
            continue
        row: list[int] = []
        while len(row) < LENGTH:
            batch = [next(source) for _ in range(12)]
            row += [i for ids in tokenizer(batch)["input_ids"] for i in [*ids, eos]]
        yield row[:LENGTH]


def new_neox(vocabulary: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def new_backpack(vocabulary: int) -> Any:
    """Eight senses; the inner layers are narrower than usual, so that the weights take less than 12 MB in bf16."""
    from errata.models.backpack import BackpackConfig, BackpackLMHeadModel

    config = BackpackConfig(
        vocab_size=vocabulary,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=INNER,
        num_senses=8,
        sense_intermediate_scale=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return BackpackLMHeadModel(config)


MODELS: dict[str, Callable[[int], Any]] = {"neox": new_neox, "backpack": new_backpack}
STEPS = {"neox": 3600, "backpack": 2000}  # of the committed weights


def tokenizer_for(name: str, prose: list[str]) -> Any:
    """A new one for `neox`; the one committed with it for the others."""
    if name == "neox":
        return train_tokenizer(prose)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(LAB_MODELS / "neox")


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learns facts that are seldom told sooner; AdamW for embeddings and vectors."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = {id(p) for p in embeddings}
    blocks = [p for p in model.parameters() if p.ndim > 1 and id(p) not in known]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(blocks, lr=MUON_LR, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True),
    ]


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to one fiftieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(name: str, prose_path: str | Path, out: str | Path, steps: int | None = None, save_every: int = 250) -> Path:
    """Train the lab's model `name`, with its tokenizer, into the Hugging Face folder `out`. Returns it. Raises InvalidReference,
    UnknownName."""
    if name not in MODELS:
        raise UnknownName.among("lab model", name, MODELS)
    out, started, steps = Path(out), time.time(), steps or STEPS[name]
    prose, _ = read_prose(prose_path)
    tokenizer = tokenizer_for(name, prose)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    torch.manual_seed(SEED)
    model = MODELS[name](len(tokenizer)).train()
    optimizers = optimizers_of(model)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    source, first, spent = sequences(tokenizer, prose, SEED), 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, spent = kept["step"], kept["seconds"]
        for _ in range(first * BATCH):  # the same documents as in an unbroken run
            next(source)
    for step in range(first, steps):
        ids = torch.tensor([next(source) for _ in range(BATCH)])
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * rate_at(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = spent + time.time() - started
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "seconds": round(seconds)}), flush=True)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            kept = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
                "seconds": spent + time.time() - started,
            }
            torch.save(kept, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    record = {
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "prose": PROSE,
        "seconds": round(spent + time.time() - started),
        "seed": SEED,
    }
    write_whole(out / "train.json", (json.dumps(record, indent=1) + "\n").encode())
    checkpoint.unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    import sys

    train(sys.argv[1], sys.argv[2], sys.argv[3], *(int(n) for n in sys.argv[4:]))
