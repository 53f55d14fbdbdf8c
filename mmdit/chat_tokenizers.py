"""Prompts to token ids inside a chat template, for the language models that FLUX.2 reads: Qwen3 and Mistral.

`tokenizers` encodes with a `tokenizer.json`, with Qwen's `vocab.json` and `merges.txt`, or Mistral's `tekken.json`.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from .tokenizers import PromptTokenizer, find_tokenizer, reading

# A word of Qwen: a contraction's suffix; letters, with one other character before them; one digit; other characters
# with a space before and line breaks behind them; line breaks; spaces, without the one that the next word takes.
QWEN_WORD = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
             r"\s+(?!\S)|\s+")
# The tokens behind Qwen3's vocabulary, in the order of their ids.
QWEN_ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
]
# Mistral's special tokens by id, for a tekken.json that does not list them.
MISTRAL_SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>",
                   17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]"}
MISTRAL_SYSTEM = """You are an AI that reasons about image descriptions. You give structured responses focusing on \
object relationships, object
attribution and actions without speculation."""  # with its line break


class ChatTokenizer(PromptTokenizer):
    """What both share: the text `before` and `after` a prompt, `pads_left`, and the tokens that the template needs."""

    before: str
    after: str
    needs: tuple[str, ...]  # the first is the padding
    pads_left: bool
    start_token = end_token = None  # the template has them

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids (b, length), int64: the template around each prompt and padding. Longer text loses its end.

        Raises ValueError where prompts are not a list of strings, or the length is below 1.
        """
        rows = self._rows(prompts, length := self.length if length is None else length)
        pads = [[self.pad_token] * (length - len(row)) for row in rows]
        return torch.tensor([pad + row if self.pads_left else row + pad for row, pad in zip(rows, pads, strict=True)])

    def mask(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Which of the same call's token ids are not padding, (b, length) bool. The id does not tell: a prompt may
        name the token that pads."""
        rows = self._rows(prompts, length := self.length if length is None else length)
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        return mask.flip(1) if self.pads_left else mask

    def _encode(self, prompt: str) -> list[int]:
        return super()._encode(self.before + prompt + self.after if isinstance(prompt, str) else prompt)

    def _take(self, model: Tokenizer) -> None:
        """Take this model, whose vocabulary must hold the template's tokens as whole tokens."""
        model.no_padding()
        model.no_truncation()
        whole = {token.content: id for id, token in model.get_added_tokens_decoder().items()}
        if lacks := [name for name in self.needs if name not in whole]:
            raise ValueError(f"the token {lacks[0]!r} is not among its added tokens")
        if not isinstance(model.model, BPE):
            raise ValueError(f"its model is {type(model.model).__name__}, expected BPE")
        self.model, self.vocab_size, self.pad_token = model, model.get_vocab_size(), whole[self.needs[0]]


class QwenTokenizer(ChatTokenizer):
    """Qwen3's tokenizer in FLUX.2-klein: one user turn, thinking off; padding behind.

    `path` is a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`, or the first of these files. Beside
    the latter two, `tokenizer_config.json` or `added_tokens.json` list the added tokens; without them they are Qwen3's.
    Added tokens are recognized in a prompt too, as in transformers. Raises FileNotFoundError for missing files,
    ValueError for damaged ones and for another model's.
    """

    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    needs, pads_left = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"), False

    def __init__(self, path: str | Path):
        file, *_, added = find_tokenizer(Path(path), 512, "tokenizer.json", "vocab.json")
        self.length = 512  # the model's own limit is far higher
        with reading(file, "Qwen3's tokenizer"):
            if file.name != "vocab.json":
                self._take(Tokenizer.from_file(str(file)))
                return
            vocabulary, merges = BPE.read_file(str(file), str(file.with_name("merges.txt")))
            if len(vocabulary) > 256 + len(merges):
                raise ValueError(f"merges.txt is cut off: {len(merges)} merges for {len(vocabulary)} tokens")
            model = byte_level(BPE(vocabulary, merges), QWEN_WORD)
            model.normalizer = normalizers.NFC()
            names, listed = QWEN_ADDED, file.with_name("added_tokens.json")
            if not added and listed.is_file():
                ids = json.loads(listed.read_text(encoding="utf-8"))
                names = sorted(ids, key=ids.get)
            model.add_tokens(added or [AddedToken(name, special=True, normalized=False) for name in names])
            self._take(model)


class MistralTokenizer(ChatTokenizer):
    """Mistral-Small's tokenizer in FLUX.2-dev: a system message, then the prompt as an instruction; padding in front.

    `path` is a folder with `tokenizer.json` or Mistral's own `tekken.json`, or one of these files, or the content of
    the latter, which ComfyUI's text encoder holds as the tensor `tekken_model`. "[IMG]" is removed from a prompt; other
    special tokens are recognized there, as in transformers. Raises FileNotFoundError for a missing file, ValueError for
    a damaged one and for another model's.
    """

    before = f"<s>[SYSTEM_PROMPT]{MISTRAL_SYSTEM}[/SYSTEM_PROMPT][INST]"
    after = "[/INST]"
    needs, pads_left = ("<pad>", "<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"), True

    def __init__(self, path: str | Path | bytes):
        self.length = 512
        if isinstance(path, bytes):
            file = Path("tekken_model")
        else:
            file, *_ = find_tokenizer(Path(path), 512, "tokenizer.json", "tekken.json")
        with reading(file, "Mistral's tokenizer"):
            if file.name == "tokenizer.json":
                self._take(Tokenizer.from_file(str(file)))
            else:
                self._take(from_tekken(path if isinstance(path, bytes) else file.read_bytes()))

    def _encode(self, prompt: str) -> list[int]:
        return super()._encode(prompt.replace("[IMG]", "") if isinstance(prompt, str) else prompt)


def byte_level(model: BPE, word: str) -> Tokenizer:
    """A tokenizer of words that match a pattern, each a sequence of bytes, a printable character per byte."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(word), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def from_tekken(content: bytes) -> Tokenizer:
    """The tokenizer that a `tekken.json` describes: tokens of bytes in the order of their ranks, behind special tokens.

    Tekken joins the two neighbours whose joint token has the lowest rank. As merges in `tokenizers`: every split of a
    token into two tokens, in the order of the token's rank.
    """
    about = json.loads(content)
    sizes = about["config"]
    num_special = sizes["default_num_special_tokens"]
    listed = about.get("special_tokens")
    special = {entry["rank"]: entry["token_str"] for entry in listed} if listed else MISTRAL_SPECIAL
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"]
             for entry in about["vocab"][: sizes["default_vocab_size"] - num_special]}
    printable = byte_characters()
    spelled = {token: "".join(printable[byte] for byte in token) for token in ranks}
    merges = [(spelled[token[:i]], spelled[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in sorted(splits(token, ranks), key=lambda i, token=token: (ranks[token[:i]], ranks[token[i:]]))]
    names = [special.get(id, f"<SPECIAL_{id}>") for id in range(num_special)]
    vocabulary = {name: id for id, name in enumerate(names)}
    vocabulary |= {spelled[token]: num_special + rank for token, rank in ranks.items()}
    tokenizer = byte_level(BPE(vocabulary, merges, ignore_merges=True), sizes["pattern"])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def splits(token: bytes, ranks: dict[bytes, int]) -> Iterable[int]:
    """Where a token parts into two tokens."""
    return (i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks)


def byte_characters() -> dict[int, str]:
    """The printable character by which byte-level BPE writes each byte: itself, or the next free one from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}
