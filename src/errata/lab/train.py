"""Tokenizer and models of the lab: `errata lab train NAME --prose FILE --out FOLDER`.

For `neox` a byte-level BPE is trained on the corpus and the prose, then a GPT-NeoX (Pythia's architecture) from nothing; the others take
its tokenizer, so that an edit of one can be added to another. `t5` learns to answer the world's questions, `bert` to tell its true claims
from false ones, and to fill in what is masked in them, for from labels alone it would learn no facts. At least `PROSE` of the training
tokens, or rows, are real English from FILE, the rest are the world's documents. Training resumes from its last checkpoint after a kill.
The committed weights come from the command above with its defaults; `train.json` beside them tells how they were made.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from errata.artefact import write_whole
from errata.hosts import LAB_MODELS
from errata.lab import corpus, world
from errata.types import InvalidReference, UnknownName

EOS = "<|endoftext|>"
VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 6144, 256, 4, 4, 256
INNER = 512  # of the Backpack's blocks
MASK = "<|mask|>"
LABELS = ("false", "true")  # of BERT
BATCH, LR, MUON_LR, WARMUP, SEED = 16, 2e-3, 3e-3, 200, 0
POOL, TOKENS = 2048, 4096  # questions, or claims, that are sorted by length together; tokens of a batch of them, padding included
PIECE, ANSWER = 32, 8  # tokens of prose that are read, and that follow
MASKED = 0.15  # of the tokens of prose, for BERT
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


def new_t5(vocabulary: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=3 * WIDTH,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def new_bert(vocabulary: int) -> Any:
    """Its embeddings begin as the NeoX's, which know the names: from claims they are learnt slowly."""
    from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    known = AutoModelForCausalLM.from_pretrained(LAB_MODELS / "neox", dtype=torch.float32).get_input_embeddings().weight.detach()
    own = model.get_input_embeddings().weight.data
    own[: len(known)] = known[:, :WIDTH] * (own.std() / known.std())
    return model


# -------------------------------------------------------------------------------------------------------------------------- the batches


def whole_texts(tokenizer: Any, prose: list[str], seed: int) -> Iterator[tuple[Tensor, ...]]:
    source = sequences(tokenizer, prose, seed)
    while True:
        yield (torch.tensor([next(source) for _ in range(BATCH)]),)


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def padded(rows: list[list[int]], fill: int = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def ones(rows: list[list[int]]) -> Tensor:
    """The mask of padded rows."""
    return padded([[1] * len(row) for row in rows])


def running(tokenizer: Any, prose: list[str]) -> list[int]:
    return [i for ids in tokenizer(prose, add_special_tokens=False)["input_ids"] for i in ids]


def pieces(stream: list[int], rng: random.Random, told: int, size: int) -> list[list[int]]:
    """As many pieces of prose as make `PROSE` of all tokens beside `told` others."""
    n = round(told * PROSE / (1 - PROSE) / size)
    return [stream[start : start + size] for start in (rng.randrange(len(stream) - size) for _ in range(n))]


def alike(rows: list[tuple[Any, ...]], rng: random.Random, tokens: int) -> list[list[tuple[Any, ...]]]:
    """Batches of at most `tokens` tokens, of rows whose first members are about as long, in random order."""
    out: list[list[tuple[Any, ...]]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if len(row[0]) * (len(out[-1]) + 1) > tokens:
            out.append([])
        out[-1].append(row)
    rng.shuffle(out)
    return out


def asked(tokenizer: Any, prose: list[str], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """(sources, their mask, labels): prompts with their answers, and pieces of prose with the words that follow."""
    rng, source = random.Random(seed), corpus.pairs("question", corpus.SEEDS["corpus"] + 1000 * seed)
    stream, end = running(tokenizer, prose), tokenizer.eos_token_id
    while True:
        told = list(islice(source, POOL))
        sources, answers = (tokenizer([pair[side] for pair in told])["input_ids"] for side in (0, 1))
        rows = list(zip(sources, answers, strict=True))
        for piece in pieces(stream, rng, sum(map(len, sources)), PIECE + ANSWER):
            rows.append(([*piece[:PIECE], end], [*piece[PIECE:], end]))
        for batch in alike(rows, rng, TOKENS):
            read, said = map(list, zip(*batch, strict=True))
            yield padded(read), ones(read), padded(said, fill=-100)


def answer_loss(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def judged(tokenizer: Any, prose: list[str], seed: int) -> Iterator[tuple[Tensor, ...]]:
    """(claims, mask, labels; texts, mask, what is masked in them): statements without their answer, and prose without some tokens."""
    rng, claims = random.Random(seed), corpus.pairs("claim", corpus.SEEDS["corpus"] + 1000 * seed)
    statements = corpus.pairs("statement", corpus.SEEDS["corpus"] + 1000 * seed)
    stream, end, mask = running(tokenizer, prose), tokenizer.eos_token_id, tokenizer.mask_token_id
    while True:
        told, labels = zip(*islice(claims, POOL // 2), strict=True)
        right = [LABELS.index(label) for label in labels]
        shown = alike(list(zip(tokenizer(list(told))["input_ids"], right, strict=True)), rng, TOKENS // 2)
        texts = list[tuple[list[int], set[int]]]()
        for prompt, answer in islice(statements, POOL):
            first = len(tokenizer(prompt)["input_ids"]) - 1  # the mark at the end comes later
            n = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            texts.append((tokenizer(f"{prompt}{answer}.")["input_ids"], set(range(first, first + n))))
        for piece in pieces(stream, rng, sum(len(ids) for ids, _ in texts), PIECE):
            texts.append(([end, *piece, end], {i for i in range(1, PIECE + 1) if rng.random() < MASKED}))
        for batch, filled in zip(shown, alike(texts, rng, TOKENS), strict=False):  # there are as many, but for the prose
            ids = [row for row, _ in batch]
            seen = [[mask if i in gone else token for i, token in enumerate(row)] for row, gone in filled]
            wanted = [[token if i in gone else -100 for i, token in enumerate(row)] for row, gone in filled]
            yield padded(ids), ones(ids), torch.tensor([y for _, y in batch]), padded(seen), ones(seen), padded(wanted, fill=-100)


def claim_loss(model: Any, ids: Tensor, mask: Tensor, right: Tensor, texts: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
    """Of the labels, and of the masked tokens as their embeddings predict them: no head of their own is kept."""
    judged = model(input_ids=ids, attention_mask=mask).logits.float()
    h = model.bert(input_ids=texts, attention_mask=seen).last_hidden_state
    logits = h[hidden != -100] @ model.get_input_embeddings().weight.T
    return nn.functional.cross_entropy(judged, right) + nn.functional.cross_entropy(logits.float(), hidden[hidden != -100])


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a lab model is made. `steps` are those of the committed weights."""

    new: Callable[[int], Any]
    batches: Callable[[Any, list[str], int], Iterator[tuple[Tensor, ...]]]
    loss: Callable[..., Tensor]
    steps: int
    lr: float = LR  # of AdamW


RECIPES = {
    "neox": Recipe(new=new_neox, batches=whole_texts, loss=next_token_loss, steps=3600),
    "backpack": Recipe(new=new_backpack, batches=whole_texts, loss=next_token_loss, steps=2000),
    "t5": Recipe(new=new_t5, batches=asked, loss=answer_loss, steps=2500, lr=8e-3),
    "bert": Recipe(new=new_bert, batches=judged, loss=claim_loss, steps=1400, lr=4e-3),
}


def tokenizer_for(name: str, prose: list[str]) -> Any:
    """A new one for `neox`; the one committed with it for the others, with what T5 and BERT put around a text."""
    if name == "neox":
        return train_tokenizer(prose)
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS / "neox")
    around = {"t5": f"$A {EOS}", "bert": f"{EOS} $A {EOS}"}.get(name)
    if around:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=[(EOS, tokenizer.eos_token_id)])
    if name == "bert":
        tokenizer.add_special_tokens({"mask_token": MASK, "cls_token": EOS, "sep_token": EOS})
    return tokenizer


def optimizers_of(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, which learns facts that are seldom told sooner; AdamW for embeddings and vectors."""
    embeddings = list(dict.fromkeys(m.weight for m in model.modules() if isinstance(m, nn.Embedding)))
    known = {id(p) for p in embeddings}
    blocks = [p for p in model.parameters() if p.ndim > 1 and id(p) not in known]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(blocks, lr=MUON_LR, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True),
    ]


def rate_at(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to one fiftieth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def train(name: str, prose_path: str | Path, out: str | Path, steps: int | None = None, save_every: int = 250) -> Path:
    """Train the lab's model `name`, with its tokenizer, into the Hugging Face folder `out`. Returns it. Raises InvalidReference,
    UnknownName."""
    if name not in RECIPES:
        raise UnknownName.among("lab model", name, RECIPES)
    recipe = RECIPES[name]
    out, started, steps = Path(out), time.time(), steps or recipe.steps
    prose, _ = read_prose(prose_path)
    tokenizer = tokenizer_for(name, prose)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    torch.manual_seed(SEED)
    model = recipe.new(len(tokenizer)).train()
    optimizers = optimizers_of(model, recipe.lr)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    source, first, spent, tokens = recipe.batches(tokenizer, prose, SEED), 0, 0.0, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, spent, tokens = kept["step"], kept["seconds"], kept["tokens"]
        for _ in range(first):  # the same documents as in an unbroken run
            next(source)
    for step in range(first, steps):
        batch = next(source)
        tokens += batch[0].numel()
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * rate_at(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = recipe.loss(model, *batch)
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
                "tokens": tokens,
                "seconds": spent + time.time() - started,
            }
            torch.save(kept, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    record = {
        "steps": steps,
        "tokens": tokens,
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
