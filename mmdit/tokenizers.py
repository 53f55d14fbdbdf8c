"""Prompts to token ids: `tokenizers` encodes with a `tokenizer.json`, which goes first in a folder, or with CLIP's
`vocab.json` and `merges.txt`; `sentencepiece` with T5's `spiece.model`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
ADVICE = "download the checkpoint's tokenizer folders (T5's: tokenizer_2 of FLUX.1, tokenizer_3 of SD3)"

# A word of CLIP: a special token's name, a contraction's suffix, letters, one digit, or other characters but space.
CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class PromptTokenizer:
    """What the tokenizers share: the ids `start_token`, `end_token` (None where there is none) and `pad_token`, the
    number of ids `vocab_size`, the default number of tokens `length`, and the encoding of prompts."""

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids (b, length), int64: start token, text, end token, padding; longer text is truncated.

        Raises ValueError where prompts are not a list of strings, or the length leaves no room for start and end.
        """
        rows = self._rows(prompts, length := self.length if length is None else length)
        return torch.tensor([row + [self.pad_token] * (length - len(row)) for row in rows])

    def count(self, prompt: str) -> int:
        """How many tokens the prompt has before truncation, those at its start and end among them."""
        return len(self._encode(prompt)) + (self.end_token is not None)

    def _rows(self, prompts: list[str], length: int) -> list[list[int]]:
        end = [] if self.end_token is None else [self.end_token]
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"A tokenizer expects a list of at least one prompt, not {prompts!r}")
        if length < (least := 1 if self.start_token is None else 2):
            why = ", for the tokens at start and end" * len(end)
            raise ValueError(f"length must be at least {least}{why}, not {length}")
        return [self._encode(prompt)[: length - len(end)] + end for prompt in prompts]

    def _encode(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str) or any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"A prompt must be a string, without half of a surrogate pair, not {prompt!r}")
        if isinstance(self.model, SentencePieceProcessor):
            return self.model.encode(prompt)
        ids = self.model.encode(prompt, add_special_tokens=False).ids
        return ids if self.start_token is None else [self.start_token, *ids]


class ClipTokenizer(PromptTokenizer):
    """CLIP's tokenizer: lower-cased words, each a sequence of bytes merged pair by pair (BPE).

    `path` is a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`, or the first of these files. The
    files beside it name the pad token (CLIP-L: the end token, also the default; CLIP-G: "!") and the default length
    (77). A tokenizer.json without them that lists "!" as an added token is CLIP-G's.
    The ids are those of transformers, which recognizes special tokens in a prompt's text too: "<|endoftext|>" ends
    what CLIP pools, and to CLIP-G's tokenizer a "!" is padding.
    Raises FileNotFoundError for missing files, ValueError for damaged ones and for T5's.
    """

    def __init__(self, path: str | Path):
        file, self.length, pad, added = find_tokenizer(Path(path), 77, "tokenizer.json", "vocab.json", "spiece.model")
        with reading(file, "CLIP's tokenizer"):
            self.model, ids = _read(file, BPE, added, [START, END, pad])
        self.start_token, self.end_token, self.pad_token = ids
        self.vocab_size = self.model.get_vocab_size()


class T5Tokenizer(PromptTokenizer):
    """T5's tokenizer: SentencePiece's most likely split of the text into pieces (unigram model).

    `path` is a folder with `tokenizer.json` or `spiece.model`, or one of these files. The files beside it give the
    default length (512 without them). The ids are transformers' from a tokenizer.json, SentencePiece's from a
    spiece.model; docs/checkpoints.md says where they differ.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one and for CLIP's.
    """

    def __init__(self, path: str | Path):
        file, self.length, _, added = find_tokenizer(Path(path), 512, "tokenizer.json", "spiece.model", "vocab.json")
        with reading(file, "T5's tokenizer"):
            if file.suffix == ".json":
                self.model, ids = _read(file, Unigram, added, ["</s>", "<pad>"])
                self.vocab_size = self.model.get_vocab_size()
            else:
                self.model = SentencePieceProcessor()
                self.model.LoadFromSerializedProto(file.read_bytes())
                ids, self.vocab_size = [self.model.eos_id(), self.model.pad_id()], self.model.get_piece_size()
                # Cut off between two pieces, a file loads, without the table of characters, which comes after them.
                if min(ids) < 0 or "A" not in self.model.normalize("Ａ").upper():
                    raise ValueError("it has no end token, no pad token or no table of characters")
        self.start_token, self.end_token, self.pad_token = None, *ids


def clip_tokenizer(model: BPE) -> Tokenizer:
    """CLIP's steps before BPE: normal form (NFC), single spaces, lower case; words; a printable character per byte."""
    tokenizer, space = Tokenizer(model), normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def find_tokenizer(path: Path, length: int, *names: str) -> tuple[Path, int, str | None, list[AddedToken]]:
    """The first of these files, and what those beside it set: default length, pad token, added tokens."""
    if path.suffix not in (".json", ".model"):
        path = next((path / name for name in names if (path / name).is_file()), path / names[1])
    for file in [path, path.with_name("merges.txt")] if path.name == "vocab.json" else [path]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {ADVICE}")
    found, pad, added = {}, None, []  # as in transformers, a config that lists the added tokens needs no map
    for file in (path.with_name("tokenizer_config.json"), path.with_name("special_tokens_map.json")):
        if file.is_file() and "added_tokens_decoder" not in found:
            with reading(file, "a tokenizer's settings"):
                found |= {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if v is not None}
                added = [AddedToken(**token) for token in found.get("added_tokens_decoder", {}).values()]
                pad, limit = found.get("pad_token"), int(found.get("model_max_length", length))
                pad = pad["content"] if isinstance(pad, dict) else pad
                length = limit if limit < 1e6 else length  # 1e30 means that there is no limit
    return path, length, pad, added


@contextmanager
def reading(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # `tokenizers` raises Exception itself, and a class that is none
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{file} is damaged or not {what} ({error}): {ADVICE}") from error


def _read(file: Path, kind: type, added: list[AddedToken], names: list[str | None]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer and the ids of its special tokens `names`; None is the pad token, where no file names it."""
    if file.name == "vocab.json":
        vocabulary, merges = BPE.read_file(str(file), str(file.with_name("merges.txt")))
        if len(vocabulary) > 2 * 256 + len(merges) + 2:  # bytes, the same at a word's end; start and end token
            raise ValueError(f"merges.txt is cut off: {len(merges)} merges for {len(vocabulary)} tokens")
        tokenizer = clip_tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    elif file.suffix == ".model":
        raise ValueError(f"it is a model of SentencePiece, expected {kind.__name__}")
    else:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    if not isinstance(tokenizer.model, kind):
        raise ValueError(f"its model is {type(tokenizer.model).__name__}, expected {kind.__name__}")
    tokenizer.add_tokens(added)
    listed = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    names = [name or ("!" if "!" in listed else END) for name in names]
    ids = [tokenizer.token_to_id(name) for name in names]
    if None in ids:
        raise ValueError(f"the token {names[ids.index(None)]!r} is not in its vocabulary")
    tokenizer.add_special_tokens([name for name in names if name not in listed])
    return tokenizer, ids
