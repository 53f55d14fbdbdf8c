"""Prompts to token ids: CLIP's byte-level BPE and T5's SentencePiece, from the files beside a checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from torch import Tensor

from .tokenizer_files import CLIP_ADVICE, END, START, T5_ADVICE, read_clip, read_t5

# A word of CLIP: the suffix of an English contraction, a run of letters, one digit, or a run of other characters but
# space. A special token's name in capitals, which lower-casing turns into the name, is one word, encoded like text.
CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """CLIP's tokenizer: lower-cased words, each a sequence of bytes merged pair by pair (BPE).

    `path` is a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json` alone, or that last file itself.
    The files beside it name the pad token (CLIP-L: the end token, also the default; CLIP-G: "!") and the default length
    (77). A tokenizer.json without them that lists "!" as an added token is CLIP-G's.

    The ids are those of transformers, which recognizes special tokens in a prompt's text too: "<|endoftext|>" ends
    what CLIP pools, and to CLIP-G's tokenizer a "!" is padding.

    Raises FileNotFoundError for missing files, ValueError for unreadable ones and for T5's.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        vocabulary, merges, settings = read_clip(path)
        self.length = settings.number("model_max_length", 77)
        pad = "!" if any(token.content == "!" for token in settings.listed) else END
        names = {"start": START, "end": END, "pad": settings.name("pad", pad)}
        missing = [role for role, name in names.items() if name not in vocabulary]
        try:
            self._tokenizer = clip_model(vocabulary, merges)
        except Exception as error:  # the only class that tokenizers raises
            raise ValueError(f"{path}: vocabulary and merges do not fit together ({error}): {CLIP_ADVICE}") from error
        if missing:
            raise ValueError(f"{path}: the {missing[0]} token {names[missing[0]]!r} is not in the vocabulary: "
                             f"{CLIP_ADVICE}")
        self._tokenizer.add_tokens(settings.added_tokens([*names.values()]))
        self._ids = {role: vocabulary[name] for role, name in names.items()}

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids (b, length), int64: start token, text, end token, padding; longer text is truncated.

        Raises ValueError where prompts are not a list of strings, or the length leaves no room for start and end.
        """
        length = self.length if length is None else length
        if length < 2:
            raise ValueError(f"CLIP's length must be at least 2, for the start and the end token, not {length}")
        return _batch(prompts, self._encode, self.end_token, self.pad_token, length)

    def count(self, prompt: str) -> int:
        """How many tokens the prompt has before truncation, the start and the end token among them."""
        return len(self._encode(prompt)) + 1

    def _encode(self, prompt: str) -> list[int]:
        return [self.start_token, *self._tokenizer.encode(_checked(prompt), add_special_tokens=False).ids]

    @property
    def start_token(self) -> int:
        """The id that starts every prompt: 49406 in the public vocabulary."""
        return self._ids["start"]

    @property
    def end_token(self) -> int:
        """The id that ends every prompt, where CLIP pools: 49407 in the public vocabulary."""
        return self._ids["end"]

    @property
    def pad_token(self) -> int:
        """The id that fills the length: 49407 for CLIP-L, 0 for CLIP-G."""
        return self._ids["pad"]

    @property
    def vocab_size(self) -> int:
        """The number of ids: 49408 in the public vocabulary."""
        return self._tokenizer.get_vocab_size()


class T5Tokenizer:
    """T5's tokenizer: SentencePiece's most likely split of the text into pieces (unigram model).

    `path` is a folder with `spiece.model`, or with `tokenizer.json` alone, or one of these files. The files beside it
    give the default length (512 without them).

    The ids are those of transformers, which differ from SentencePiece's: special tokens are recognized in a prompt's
    text ("</s>"; "<extra_id_0>" to "<extra_id_99>"), all Unicode white space separates words, and a combining accent is
    dropped after a letter that the model's normalization table replaces.

    Raises FileNotFoundError for a missing file, ValueError for an unreadable one and for CLIP's.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        pieces, table, settings = read_t5(path)
        self.length = settings.number("model_max_length", 512)
        names = {"end": settings.name("eos", "</s>"), "pad": settings.name("pad", "<pad>")}
        try:
            self._tokenizer = t5_model(pieces, table)
        except Exception as error:  # the only class that tokenizers raises
            raise ValueError(f"{path} does not hold T5's vocabulary ({error}): {T5_ADVICE}") from error
        self._ids = {role: self._tokenizer.token_to_id(name) for role, name in names.items()}
        if None in self._ids.values():
            raise ValueError(f"{path} has no end or no pad token, so it is not T5's: {T5_ADVICE}")
        self._tokenizer.add_tokens(settings.added_tokens([*names.values(), "<unk>"]))

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids (b, length), int64: text, end token, padding; longer text is truncated.

        Raises ValueError where prompts are not a list of strings, or the length leaves no room for the end token.
        """
        length = self.length if length is None else length
        if length < 1:
            raise ValueError(f"T5's length must be at least 1, for the end token, not {length}")
        return _batch(prompts, self._encode, self.end_token, self.pad_token, length)

    def count(self, prompt: str) -> int:
        """How many tokens the prompt has before truncation, the end token among them."""
        return len(self._encode(prompt)) + 1

    def _encode(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(_checked(prompt), add_special_tokens=False).ids

    @property
    def start_token(self) -> None:
        """None: T5's encoder has no start token."""
        return None

    @property
    def end_token(self) -> int:
        """The id that ends every prompt: 1."""
        return self._ids["end"]

    @property
    def pad_token(self) -> int:
        """The id that fills the length: 0."""
        return self._ids["pad"]

    @property
    def vocab_size(self) -> int:
        """The number of ids: 32100 in the public vocabulary, fewer than the rows of T5's embedding."""
        return self._tokenizer.get_vocab_size()


def clip_model(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's tokenizer model from a vocabulary (token to id) and its merges, in order.

    Normalized Unicode (NFC), single spaces, lower case; split into words; each byte a printable character, the last of
    a word marked `</w>`; then the merges.
    """
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def t5_model(pieces: list[tuple[str, float]], table: bytes) -> Tokenizer:
    """T5's tokenizer model from its pieces, with their log-probabilities, and SentencePiece's normalization table.

    Characters replaced by the table (compatibility forms and composed letters: NFKC); split at white space, which
    becomes "▁" before each word; then the most likely pieces. Piece 2 is the unknown token.
    """
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    if table:
        tokenizer.normalizer = normalizers.Precompiled(table)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    return tokenizer


def _batch(prompts: list[str], encode: Callable[[str], list[int]], end: int, pad: int, length: int) -> Tensor:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"A tokenizer expects a list of at least one prompt, not {prompts!r}")
    rows = [encode(prompt)[: length - 1] + [end] for prompt in prompts]
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def _checked(prompt: str) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"A prompt must be a string, not {type(prompt).__name__}: {prompt!r}")
    if re.search("[\ud800-\udfff]", prompt):
        raise ValueError(f"The prompt {prompt!r} is not valid Unicode: it holds half of a surrogate pair")
    return prompt
