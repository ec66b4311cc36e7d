"""Small tokenizers of the two families, built on the spot."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from llmc.runtime.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "naïve café"]


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE as GPT-2's: `<s>` and `</s>` are special, `<tool>` is added text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("  ")])
    return Tokenizer(tokenizer)


def sentencepiece_tokenizer() -> Tokenizer:
    """BPE with byte fallback as Llama 2's, `▁` for a space and one put before every text."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz,", "▁h", "el", "lo", "▁hel", "▁hello", "▁w", "or"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁h", "el"), ("▁hel", "lo"), ("▁", "w")]
    merges.append(("o", "r"))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(tokenizer)


def word_piece_tokenizer() -> Tokenizer:
    """WordPiece as BERT's: its tokens have no bytes of their own."""
    tokens = ["[UNK]", "[SEP]", "hello", "wor", "##ld", "##s", ",", "the"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(vocab={t: i for i, t in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[SEP]"])
    return Tokenizer(tokenizer)
