"""What runs of a tiny model are made of: a random checkpoint, a character tokenizer, additions."""

from __future__ import annotations

import json
from pathlib import Path

CHARACTERS = list("0123456789+-*/= ?.,abcdefghijklmnopqrstuvwxyz")


def write_tiny_model(folder: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """A randomly initialised Qwen2 with a tokenizer of one token a character."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    vocab_size = write_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of one token a character, with <pad> 0, <eos> 1, <bos> 2; returns its size."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(vocab)


def write_additions(path: Path) -> Path:
    """One-digit additions as JSON lines."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
