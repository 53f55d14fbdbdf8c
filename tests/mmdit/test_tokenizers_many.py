"""10,000 prompts of every kind of text, drawn from one seed: transformers' ids exactly, or SentencePiece's."""

import json
import re
import shutil
import sys
import unicodedata
from collections import Counter
from itertools import islice
from random import Random

import pytest
import torch
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_tokenizers import CAPTIONS, write_public_clip

import weights
from mmdit.tokenizers import END, START, ClipTokenizer, T5Tokenizer
from tiny.captions import describe
from tiny.world import forget, sample_scene

SHIPPED = weights.BUNDLED["tiny-sd3"]

RANGES = {  # code points, the last one included
    "latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFB00, 0xFB06), (0xFF21, 0xFF5A)],
    "alphabet": [(0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x586), (0x10A0, 0x10FF), (0x13A0, 0x13FF), (0x1F00, 0x1FFF)],
    "right to left": [(0x591, 0x5F4), (0x600, 0x6FF), (0x700, 0x74F), (0xFB1D, 0xFDFF), (0xFE70, 0xFEFC)],
    "brahmic": [(0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F), (0xF00, 0xFFF), (0x1780, 0x17FF)],
    "east asian": [(0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0x3200, 0x33FF), (0x20000, 0x2A6DF)],
    "in parts": [(0x1100, 0x11FF), (0xFF66, 0xFF9F), (0x1B00, 0x1B7F)],  # Jamo, half-width kana, Balinese
    "mark": [(0x300, 0x36F), (0x1AB0, 0x1ACE), (0x20D0, 0x20F0), (0x3099, 0x309A), (0xFE00, 0xFE0F)],
    "digit": [(0x30, 0x39), (0x660, 0x669), (0x966, 0x96F), (0xB2, 0xB9), (0xBC, 0xBE), (0x2150, 0x2189)],
    "punctuation": [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0x2010, 0x205E), (0x3001, 0x303F)],
    "symbol": [(0xA1, 0xBF), (0x20A0, 0x20C0), (0x2100, 0x214F), (0x2190, 0x24FF), (0x1D400, 0x1D7FF)],
    "emoji": [(0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF), (0x2600, 0x27BF)],
    "control": [(0x00, 0x1F), (0x7F, 0x9F), (0xFFF9, 0xFFFD)],
    "invisible": [(0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xAD, 0xAD)],
    "space": [(0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
              (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)],
    "private": [(0xE000, 0xF8FF), (0xF0000, 0xFFFFD)],
    "unassigned": [(0x378, 0x379), (0x530, 0x530), (0xFFFE, 0xFFFF), (0x3FFFE, 0x3FFFF), (0xE0080, 0xE00FF)],
    "any": [(0x00, 0xD7FF), (0xE000, sys.maxunicode)],
}  # fmt: skip
WHOLE = {
    "word": [*CAPTIONS[0].split(), "IT'S", "O'Brien", "rock'n'roll", "we've", "''s", "'LL", "x'd", "naïve", "E\u0301"],
    "special": [START, END, START.upper(), "<|EndOfText|>", "<|endoftext|", "</s>", "<pad>", "<unk>", "<s>", "</S>",
                "</w>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<Extra_ID_7>", "!", "!!", "▁", "▁▁a"],
    "joined emoji": ["👩\u200d👩\u200d👧\u200d👦", "👍🏽", "🏳\ufe0f\u200d🌈", "🧑🏿\u200d🚀", "🇩🇪🇫🇷", "🇩",
                     "3\ufe0f\u20e3", "❤\ufe0f\u200d🔥", "🏴\U000e0067\U000e0062\U000e007f"],
    "case": list("İıßẞŉΣςſKÅǅΐᾳﬁﬃ") + ["ΑΣ", "ΑΣ.", "İSTANBUL", "ﬀ\u0301"],
}  # fmt: skip


def draw(random: Random, kind: str) -> str:
    if kind in WHOLE:
        return random.choice(WHOLE[kind])
    return chr(random.randint(*random.choice(RANGES[kind])))


def generate(seed: int):
    """Prompts of one to eight parts, a part one to nine pieces of one kind; one in 200 is repeated up to 90 times."""
    random, kinds = Random(seed), [*RANGES, *WHOLE]
    yield from ("", " ", "\n", " \t\n ", "\u3000", "\x00", "\ufeff", "\u200b", "\u0301", "a" * 5000, "a " * 5000)
    while True:
        parts = []
        for _ in range(random.randint(1, 8)):
            kind = random.choice(kinds)
            between = random.choice(["", "", "", " ", draw(random, "space"), draw(random, "mark")])
            parts.append(between.join(draw(random, kind) for _ in range(random.randint(1, 9))))
        prompt = random.choice(["", " ", " ", "  ", "\n", draw(random, "invisible")]).join(parts)
        prompt = random.choice(["", "", "", " ", "\t"]) + prompt + random.choice(["", "", "", " ", "\n\n"])
        yield prompt * random.randint(10, 90) if random.random() < 1 / 200 else prompt


PROMPTS = list(islice(generate(2024), 10_000))
LENGTH = 96  # more than most of them have
SPECIAL = re.compile(r"</?s>|<pad>|<unk>|<extra_id_\d+>", re.IGNORECASE)



def assert_same_ids(ours, oracle, prompts=PROMPTS):
    rows = oracle(prompts, padding="max_length", truncation=True, max_length=LENGTH).input_ids
    found, expected = ours(prompts, length=LENGTH), torch.tensor(rows)
    wrong = (found != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, (len(wrong), prompts[wrong[0]], found[wrong[0]], expected[wrong[0]])


def belongs_to_the_one_before(character: str) -> bool:
    """Whether it is an accent, a joiner, the colour of a skin or a tag."""
    joins = "\u200c\u200d\uff9e\uff9f" + "".join(map(chr, [*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)]))
    return unicodedata.category(character)[0] == "M" or character in joins


def token_entry(content: str, normalized: bool = False, strip: bool = False) -> dict:
    return dict(content=content, normalized=normalized, lstrip=strip, rstrip=strip, single_word=False, special=True)


def test_the_prompts_are_of_every_kind():
    text = "".join(PROMPTS)
    assert len(set(PROMPTS)) > 9_900
    for kind, ranges in RANGES.items():
        assert all(any(low <= ord(c) <= high for c in text) for low, high in ranges), kind
    assert all(piece in text for pieces in WHOLE.values() for piece in pieces)


@pytest.mark.parametrize(("name", "half"), [("tokenizer", 0), ("tokenizer_2", 1)])
def test_clip_shipped(name, half):
    oracle = transformers.CLIPTokenizer.from_pretrained(SHIPPED / name)
    assert_same_ids(ClipTokenizer(SHIPPED / name), oracle, PROMPTS[half::2])


@pytest.mark.parametrize("pad_token", [END, "!"], ids=["CLIP-L", "CLIP-G"])
def test_clip_public(tmp_path, pad_token):
    """With what the hub's folders say of their tokens: the start token, unlike the others, is found in any case."""
    folder = write_public_clip(tmp_path / "clip", pad_token)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {0: pad_token, 49406: START, 49407: END} if pad_token == "!" else {49406: START, 49407: END}
    config["added_tokens_decoder"] = {id: token_entry(token, normalized=token == START) for id, token in tokens.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = ClipTokenizer(folder)
    assert_same_ids(ours, transformers.CLIPTokenizer.from_pretrained(folder), PROMPTS[pad_token == "!" :: 2])
    assert ours([START.upper()], length=3).tolist() == [[49406, 49406, 49407]]


def test_clip_json_as_published(tmp_path):
    """It lacks the special tokens' names among the words, which transformers 5 adds in CLIPTokenizer alone."""
    oracle = transformers.CLIPTokenizer.from_pretrained(write_public_clip(tmp_path / "clip", END))
    oracle.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = ClipTokenizer(tmp_path)
    assert_same_ids(ours, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), PROMPTS[::2])
    assert_same_ids(ours, oracle, [prompt for prompt in PROMPTS[1::4] if "<|" not in prompt])


@pytest.fixture(scope="module")
def t5_public_like(tmp_path_factory):
    """T5's public settings and normalization around 2,000 pieces of many scripts, learned from half of the prompts.

    Of the characters, those are learned that occur often enough; the others stay unknown.
    """
    folder = tmp_path_factory.mktemp("t5")
    prompts = [prompt[:500] for prompt in PROMPTS[::2]]
    often = {character for character, count in Counter("".join(prompts)).items() if count >= 10}
    lines = [" ".join("".join(c if c in often else " " for c in prompt).split()) for prompt in prompts]
    with (folder / "spiece.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(line.replace("\x00", "") for line in lines), model_writer=file,
            vocab_size=2000, model_type="unigram", normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2,
            bos_id=-1, character_coverage=1.0, num_threads=1, minloglevel=2,
        )  # fmt: skip
    tokens = {0: token_entry("<pad>"), 1: token_entry("</s>"), 2: token_entry("<unk>")}
    tokens |= {2000 + i: token_entry(f"<extra_id_{99 - i}>", strip=True) for i in range(100)}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100, "eos_token": "</s>",
              "unk_token": "<unk>", "pad_token": "<pad>", "added_tokens_decoder": tokens,
              "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["shipped", "public-like"])
def t5_folder(request):
    return SHIPPED / "tokenizer_3" if request.param == "shipped" else request.getfixturevalue("t5_public_like")


def test_t5_json(t5_folder, tmp_path):
    """The tokenizer.json that transformers makes of spiece.model, in its folder and alone."""
    oracle = transformers.T5Tokenizer.from_pretrained(t5_folder)
    oracle.save_pretrained(tmp_path)
    ours = T5Tokenizer(tmp_path)
    assert_same_ids(ours, oracle)
    assert ours.vocab_size == len(oracle)
    shutil.copy(tmp_path / "tokenizer.json", alone := tmp_path / "alone.json")
    (tmp_path / "tokenizer_config.json").unlink()
    assert torch.equal(T5Tokenizer(alone)(PROMPTS[:2000], length=LENGTH), ours(PROMPTS[:2000], length=LENGTH))


@pytest.mark.parametrize("prepend", ["first", "always"])
def test_t5_json_as_published(t5_public_like, tmp_path, prepend):
    """With the normalizer and the pre-tokenizer of the hub's files, which transformers 5 replaces in T5Tokenizer alone.

    The settings beside it change the flags of its added tokens: space around a sentinel belongs to it.
    """
    oracle = transformers.T5Tokenizer.from_pretrained(t5_public_like)
    oracle.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [
        content["normalizer"], {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]}  # fmt: skip
    split = prepend == "always"
    content["pre_tokenizer"] = dict(type="Metaspace", replacement="▁", prepend_scheme=prepend, split=split)
    for token in content["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    content["truncation"] = dict(direction="Right", max_length=7, strategy="LongestFirst", stride=0)
    content["padding"] = dict(strategy={"Fixed": 20}, direction="Right", pad_to_multiple_of=None, pad_id=0,
                              pad_type_id=0, pad_token="<pad>")  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(t5_public_like / "tokenizer_config.json", tmp_path)
    ours = T5Tokenizer(tmp_path)
    assert_same_ids(ours, transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path))
    text = [prompt for prompt in PROMPTS[:5000] if not SPECIAL.search(prompt) and "\x85" not in prompt]
    assert len(text) > 3000
    assert_same_ids(ours, oracle, text)


def test_t5_spiece_model(t5_folder):
    """SentencePiece's own ids; transformers has others only for the three reasons in T5Tokenizer's docstring."""
    ours, library = T5Tokenizer(t5_folder), SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    expected = [ids + [1] for ids in library.encode(PROMPTS)]
    rows = [ids[:-1][: LENGTH - 1] + [1] + [0] * (LENGTH - len(ids)) for ids in expected]
    assert ours(PROMPTS, length=LENGTH).tolist() == rows
    theirs = transformers.T5Tokenizer.from_pretrained(t5_folder)(PROMPTS).input_ids
    for prompt, ids, others in zip(PROMPTS, expected, theirs, strict=True):
        explained = SPECIAL.search(prompt) or "\x85" in prompt or any(map(belongs_to_the_one_before, prompt))
        assert ids == others or explained, prompt


def test_t5_captions():
    """On what the bundled checkpoints were trained with, both libraries agree."""
    random, folder = Random(0), SHIPPED / "tokenizer_3"
    captions = [describe(forget(sample_scene(random), random), random) for _ in range(5000)]
    assert_same_ids(T5Tokenizer(folder), transformers.T5Tokenizer.from_pretrained(folder), captions)


@pytest.mark.parametrize(
    ("prompt", "sentencepiece", "tokenizers"),
    [
        ("a </s> star", "▁a ▁ </ s > ▁star", "▁a </s> ▁star"),
        ("a\x85star", "▁a \x85 s t a r", "▁a ▁star"),
        ("a ½\u0301 star", "▁a ▁ 1⁄2\u0301 ▁star", "▁a ▁ 1⁄2 ▁star"),
        ("a e\u0301 star", "▁a ▁ é ▁star", "▁a ▁ é ▁star"),  # the table replaces both at once: no difference
    ],
)
def test_where_the_ids_of_t5_differ(tmp_path, prompt, sentencepiece, tokenizers):
    folder = SHIPPED / "tokenizer_3"
    transformers.T5Tokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    library = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert library.encode(prompt, out_type=str) == sentencepiece.split(" ")
    assert T5Tokenizer(folder)([prompt], length=10).tolist() == [[*library.encode(prompt), 1, *[0] * 10][:10]]
    oracle = transformers.T5Tokenizer.from_pretrained(tmp_path)
    assert oracle.tokenize(prompt) == tokenizers.split(" ")
    assert T5Tokenizer(tmp_path)([prompt], length=10).tolist() == [[*oracle(prompt).input_ids, *[0] * 10][:10]]


def test_each_family_refuses_the_others_files(tmp_path):
    clip, t5 = SHIPPED / "tokenizer", SHIPPED / "tokenizer_3"
    transformers.T5Tokenizer.from_pretrained(t5).save_pretrained(tmp_path)
    for path in (t5, t5 / "spiece.model", tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=r"not CLIP's tokenizer \(.* is .*, expected BPE\): download"):
            ClipTokenizer(path)
    transformers.CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    for path in (clip, tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=r"not T5's tokenizer \(its model is BPE, expected Unigram\): download"):
            T5Tokenizer(path)
