"""A small CLIP tokenizer for a small world, in files that transformers 4 and 5 both read.

transformers 5 builds its CLIPTokenizer from ``tokenizer.json``, transformers 4 its own from ``vocab.json`` and ``merges.txt``.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files.text import read_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# openai/CLIP, simple_tokenizer.py: contractions, words, single digits, runs of other signs
WORDS = rf"{BEGIN}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+".replace(
    "<|", r"<\|"
).replace("|>", r"\|>")


def train_tokenizer(captions: Iterable[str], vocab_size: int, length: int, folder: Path) -> Any:
    """Learn byte pairs from captions as CLIP's were, write the tokenizer into ``folder`` and return it as CLIPTokenizer.

    ``length`` is its ``model_max_length``; padding is the end token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import CLIPTokenizer

    suffix = "</w>"
    tokenizer = Tokenizer(models.BPE(unk_token=END, continuing_subword_prefix="", end_of_word_suffix=suffix))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], end_of_word_suffix=suffix, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.RobertaProcessing((END, 1), (BEGIN, 0), False, False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END, "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _write_vocabulary(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _write_vocabulary(folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` beside a ``tokenizer.json``, with the same contents."""
    model = read_json(folder / "tokenizer.json")["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
