"""Train small CLIP and T5 tokenizers on captions, in the public file formats; the same captions give the same files."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from mmdit.tokenizers import END, START, clip_tokenizer


def train_clip_tokenizer(
    captions: Iterable[str], folder: str | Path, vocab_size: int, length: int, pad_token: str = END
) -> None:
    """Write `vocab.json`, `merges.txt` and two settings files that `mmdit.ClipTokenizer` and transformers read.

    Ids in the order of CLIP's public vocabulary: 256 bytes, the same at a word's end, one token per merge, start, end.
    `length` is the default number of tokens, `pad_token` the end token (CLIP-L) or "!" (CLIP-G). Raises ValueError
    if the captions do not have enough pairs to merge.
    Follows R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
    """
    bytes_ = sorted(ByteLevel.alphabet())
    tokenizer = clip_tokenizer(BPE())
    tokenizer.train_from_iterator(captions, BpeTrainer(vocab_size=vocab_size, initial_alphabet=bytes_,
                                                       end_of_word_suffix="</w>", show_progress=False))
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [*dict.fromkeys([*bytes_, *(byte + "</w>" for byte in bytes_), *map("".join, learned)])][: vocab_size - 2]
    merges = [pair for pair in learned if {*pair, "".join(pair)} <= {*tokens}]
    if len(tokens) < vocab_size - 2:
        raise ValueError(f"The captions give {len(merges)} merges: ask for at most vocab_size={len(tokens) + 2}")
    vocabulary = {token: id for id, token in enumerate([*tokens, START, END])}
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **names}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write_text(folder / "merges.txt", "\n".join(["#version: 0.2"] + [" ".join(merge) for merge in merges]) + "\n")
    _write_text(folder / "special_tokens_map.json", json.dumps(names, indent=2))
    _write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def train_t5_tokenizer(captions: Iterable[str], folder: str | Path, vocab_size: int, length: int) -> None:
    """Write `spiece.model` and `tokenizer_config.json` that `mmdit.T5Tokenizer` and transformers read.

    As in T5's public vocabulary: pad 0, end 1, unknown 2, no start; a unigram model of NFKC text, here lower-cased too.
    `length` is the default number of tokens. Raises ValueError if the captions have too few pieces for the
    vocabulary, or too many characters.
    Follows T. Kudo, "Subword Regularization", 2018.
    """
    captions = list(captions)
    # Only pieces of at least two different words are considered, so each word is repeated with a comma.
    words = sorted({word.strip(",") for caption in captions for word in caption.split()})
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(captions + [word + "," for word in words]), model_writer=model,
            vocab_size=vocab_size, model_type="unigram", normalization_rule_name="nmt_nfkc_cf",
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"No vocabulary of {vocab_size} pieces can be made of these captions: {error}") from error
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": 0, **names}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    _write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
