"""A small tekken.json, Mistral's form of a tokenizer, and what transformers makes of it."""

import base64
import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral import tokenizer as tekken

DATA = Path(__file__).parents[1] / "data" / "flux2-tokenizer"
TEMPLATES = json.loads((DATA / "templates.json").read_text())
# Tekken's split pattern treats upper and lower case apart, and takes digits one by one, as Mistral's.
PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"


def tekken_file(folder: Path, special: bool = True) -> Path:
    """A small tekken.json: bytes, then the tokens that training found for Qwen's recorded vocabulary; and padding."""
    characters = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = sorted(json.loads((DATA / "vocab.json").read_text()).items(), key=lambda item: item[1])
    spelled = [bytes(characters[character] for character in token) for token, _ in tokens]
    order = [*(bytes([byte]) for byte in range(256)), *(token for token in spelled if len(token) > 1)]
    sizes = {"default_vocab_size": 20 + len(order), "default_num_special_tokens": 20}
    order += [b"padded", b"not"]
    about = {"config": {"pattern": PATTERN, **sizes},
             "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
                       for rank, token in enumerate(order)]}
    if special:
        names = {id: name for name, id in TEMPLATES["dev"]["special"].items()}
        about["special_tokens"] = [{"rank": id, "token_str": names.get(id, f"<S{id}>"), "is_control": True}
                                   for id in range(19)]
    (folder / "tekken.json").write_text(json.dumps(about))
    return folder / "tekken.json"


def converted(file: Path) -> Tokenizer:
    """The hub's form of a tekken.json, by transformers."""
    converter = next(cls for cls in vars(tekken).values() if hasattr(cls, "_extract_merges"))
    return converter(str(file)).converted()
