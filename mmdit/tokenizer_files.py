"""Reading tokenizers' files: CLIP's vocabulary and merges, T5's pieces, and the settings for special tokens."""

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_ADVICE = "download vocab.json and merges.txt, or tokenizer.json, of the checkpoint's tokenizer folder"
T5_ADVICE = "download the tokenizer_2 folder of FLUX.1 or the tokenizer_3 folder of SD3"

CLIP_DESCRIPTION, T5_DESCRIPTION = "CLIP's tokenizer (byte-level BPE)", "T5's tokenizer (SentencePiece)"

Json = dict[str, Any]


class Settings:
    """The special tokens and the default length that the files set.

    `tokenizer_config.json` and `special_tokens_map.json` in `folder` come first, then `stated`, the contents of
    tokenizer.json. As in transformers: a config that lists the added tokens needs neither of the other two; the map
    goes before a config that does not.
    """

    def __init__(self, folder: Path, stated: Json):
        self.folder = folder
        config, names = (read_json(folder / name) if (folder / name).exists() else {}
                         for name in ("tokenizer_config.json", "special_tokens_map.json"))
        whole = "added_tokens_decoder" in config
        # Its "truncation" is ignored: it is the length of the last call before the file was written.
        self.values = {"pad_token": (stated.get("padding") or {}).get("pad_token")}
        self.values |= {k: value for k, value in (config if whole else config | names).items() if value is not None}
        listed = config["added_tokens_decoder"].values() if whole else stated.get("added_tokens", [])
        self.listed = [self._added(token) for token in listed]

    def number(self, key: str, fallback: int) -> int:
        """A number of the settings; the fallback where it is missing, or 1e30, which means "no limit"."""
        value = self.values.get(key)
        value = fallback if value is None else value
        if not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{self.folder}: {key} is {value!r}, expected a whole number: download the files again")
        return int(value) if value < 1e6 else fallback

    def name(self, role: str, fallback: str) -> str:
        """The token of a role, such as "pad"."""
        return self._added(self.values.get(f"{role}_token") or fallback).content

    def added_tokens(self, names: list[str]) -> list[AddedToken]:
        """The tokens that are recognized in a prompt's text: these, and those that the files list, with their flags."""
        more = self.values.get("extra_special_tokens") or self.values.get("additional_special_tokens") or []
        roles = [self.values.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")]
        found = [self._added(token) for token in [*more, *names, *filter(None, roles)]] + self.listed
        return list({token.content: token for token in found}.values())

    def _added(self, token: str | Json) -> AddedToken:
        try:
            if isinstance(token, str):
                return AddedToken(token, special=True)
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            return AddedToken(token["content"], special=True, **{flag: token[flag] for flag in flags if flag in token})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: {token!r} does not describe a token: download the files again") from error


def read_clip(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], Settings]:
    """CLIP's vocabulary (token to id), its merges, and the settings, from a folder or from a tokenizer.json."""
    files, whole = [path / "vocab.json", path / "merges.txt"], path / "tokenizer.json"
    if path.suffix == ".json" or whole.exists() and not all(file.exists() for file in files):
        file = path if path.suffix == ".json" else whole
        stated = _read_tokenizer_json(file, dict)
        pairs = stated["model"]["merges"]
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
        return stated["model"]["vocab"], merges, Settings(file.parent, stated)
    if path.suffix == ".model" or (path / "spiece.model").exists() and not files[0].exists():
        raise ValueError(f"{path} is {T5_DESCRIPTION}, where {CLIP_DESCRIPTION} belongs: {CLIP_ADVICE}")
    for file in files:
        require(file, CLIP_ADVICE)
    lines = files[1].read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    return read_json(files[0]), merges, Settings(path, read_json(whole) if whole.exists() else {})


def read_t5(path: Path) -> tuple[list[tuple[str, float]], bytes, Settings]:
    """T5's pieces with their log-probabilities, its normalization table, and the settings.

    From a folder, where spiece.model takes precedence over tokenizer.json, or from one of these files.
    """
    spiece, whole = path / "spiece.model", path / "tokenizer.json"
    if path.suffix == ".json" or whole.exists() and not spiece.exists():
        file = path if path.suffix == ".json" else whole
        stated = _read_tokenizer_json(file, list)
        normalizer = stated.get("normalizer") or {}
        tables = [part.get("precompiled_charsmap") for part in normalizer.get("normalizers", [normalizer])]
        table = base64.b64decode(next(filter(None, tables), ""))
        return [tuple(piece) for piece in stated["model"]["vocab"]], table, Settings(file.parent, stated)
    if (path / "vocab.json").exists() and not spiece.exists():
        raise ValueError(f"{path} is {CLIP_DESCRIPTION}, where {T5_DESCRIPTION} belongs: {T5_ADVICE}")
    file = path if path.suffix == ".model" else spiece
    require(file, T5_ADVICE)
    pieces, table = _read_spiece(file)
    settings = Settings(file.parent, {})
    # T5 has more ids than the model file: the sentinel tokens of its pre-training.
    extra = [f"<extra_id_{i}>" for i in reversed(range(settings.number("extra_ids", 100)))]
    settings.listed = [AddedToken(name, special=True) for name in extra] + settings.listed
    return pieces + [(name, 0.0) for name in extra], table, settings


def _read_tokenizer_json(file: Path, kind: type) -> Json:
    """A tokenizer.json's contents; its vocabulary is an object (CLIP) or a list (T5), as `kind` says."""
    require(file, "download tokenizer.json of the checkpoint's tokenizer folder")
    stated = read_json(file)
    try:
        Tokenizer.from_str(json.dumps(stated))
    except Exception as error:  # the only class that tokenizers raises
        raise ValueError(f"{file} does not describe a tokenizer ({error}): download it again") from error
    if not isinstance(stated["model"]["vocab"], kind):
        if kind is dict:
            raise ValueError(f"{file} is {T5_DESCRIPTION}, where {CLIP_DESCRIPTION} belongs: {CLIP_ADVICE}")
        raise ValueError(f"{file} is {CLIP_DESCRIPTION}, where {T5_DESCRIPTION} belongs: {T5_ADVICE}")
    if kind is dict and "merges" not in stated["model"]:
        raise ValueError(f"{file} has no merges, so it is not {CLIP_DESCRIPTION}: {CLIP_ADVICE}")
    return stated


def _read_spiece(file: Path) -> tuple[list[tuple[str, float]], bytes]:
    """A SentencePiece model's pieces with their log-probabilities, and its normalization table.

    Follows sentencepiece_model.proto: in the model, 1 is a piece and 3 the normalizer; in a piece, 1 is its text and 2
    its score; in the normalizer, 2 is the table.
    """
    pieces, normalizer = [], None
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            elif number == 3:
                normalizer = dict(_fields(value))
        return pieces, normalizer.get(2, b"")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file} is not a SentencePiece model: download it again") from error


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol-buffers message: field number, and an integer or the bytes of any other type."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        if at > len(message):
            raise IndexError
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer in groups of 7 bits, lowest first, and the position after it."""
    value = shift = 0
    while message[at] > 127:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1


def read_json(file: Path) -> Json:
    """The object in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__} where an object belongs: download it again")
    return content


def require(file: Path, advice: str) -> None:
    """Raise FileNotFoundError, with the advice, for a file that is not there."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {advice}")
