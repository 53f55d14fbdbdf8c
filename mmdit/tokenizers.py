"""Prompts to token ids: CLIP's byte-level BPE and T5's SentencePiece, from the files beside a checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"

# A word of CLIP: an English contraction's tail, a run of letters, one digit, or a run of anything else but space.
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """CLIP's tokenizer: lower-cased words, each a sequence of bytes merged pair by pair (BPE).

    `path` is a folder with `vocab.json` and `merges.txt`, or with `tokenizer.json` alone, or that last file itself.
    `tokenizer_config.json` and `special_tokens_map.json` beside them name the pad token (the end token if they do not;
    CLIP-G: "!") and the default length (77). As in transformers, whose ids these are, the start, end and pad tokens
    are recognized in a prompt's text too: to CLIP-G's tokenizer a "!" is padding.

    Raises FileNotFoundError for missing files, ValueError for unreadable ones.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        folder = path.parent if path.suffix == ".json" else path
        settings = _settings(folder)
        self.length = _default_length(settings, 77)
        self._tokenizer = _clip_from_json(path) if path.suffix == ".json" else _clip_from_folder(path)
        names = {"start": START, "end": END, "pad": _content(settings.get("pad_token", END))}
        self._ids = {role: self._tokenizer.token_to_id(name) for role, name in names.items()}
        for role, name in names.items():
            if self._ids[role] is None:
                raise ValueError(f"{folder}: the {role} token {name!r} is not in the vocabulary: download it again")
        self._tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names.values()])

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids (b, length), int64: start token, text, end token, padding; a longer text loses its tail.

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

    `path` is a folder with `spiece.model`, or that file. `tokenizer_config.json` beside it gives the default length
    (512 without it). A special token's name in a prompt, such as "</s>", is text like any other.

    Raises FileNotFoundError for a missing file, ValueError for an unreadable one.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        file = path if path.suffix == ".model" else path / "spiece.model"
        _require(file, "download the tokenizer_2 folder of FLUX.1 or the tokenizer_3 folder of SD3")
        self.length = _default_length(_settings(file.parent), 512)
        try:
            self._model = SentencePieceProcessor(model_proto=file.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{file} is not a SentencePiece model: download it again") from error
        if min(self.end_token, self.pad_token) < 0:
            raise ValueError(f"{file} has no end or no pad token, so it is not T5's: use T5's spiece.model")

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids (b, length), int64: text, end token, padding; a longer text loses its tail.

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
        return self._model.encode(_checked(prompt))

    @property
    def start_token(self) -> None:
        """None: T5's encoder has no start token."""
        return None

    @property
    def end_token(self) -> int:
        """The id that ends every prompt: 1."""
        return self._model.eos_id()

    @property
    def pad_token(self) -> int:
        """The id that fills the length: 0."""
        return self._model.pad_id()

    @property
    def vocab_size(self) -> int:
        """The number of ids a text can give: 32000 in the public vocabulary, fewer than the rows of T5's embedding."""
        return self._model.vocab_size()


def clip_model(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's pipeline around a vocabulary (token to id) and its merges, first one first.

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
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _clip_from_folder(folder: Path) -> Tokenizer:
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
        return _clip_from_json(folder / "tokenizer.json")
    advice = "download vocab.json and merges.txt of the checkpoint's tokenizer folder"
    for name in ("vocab.json", "merges.txt"):
        _require(folder / name, advice)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    try:
        return clip_model(_read_json(folder / "vocab.json"), merges)
    except Exception as error:  # the only class that tokenizers raises
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit together ({error}): {advice}") from error


def _clip_from_json(file: Path) -> Tokenizer:
    _require(file, "download tokenizer.json of the checkpoint's tokenizer folder")
    _read_json(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the only class that tokenizers raises
        raise ValueError(f"{file} does not describe a tokenizer ({error}): download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
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


def _settings(folder: Path) -> dict:
    """What the files beside the vocabulary say; `tokenizer_config.json` has the last word."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= _read_json(folder / name)
    return settings


def _default_length(settings: dict, fallback: int) -> int:
    length = settings.get("model_max_length", fallback)
    return length if length < 1e6 else fallback  # transformers writes 1e30 for "no limit"


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__} where an object belongs: download it again")
    return content


def _require(file: Path, advice: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {advice}")
