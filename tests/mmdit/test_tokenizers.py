"""The tokenizers against transformers (small vocabularies, CLIP's public one), sentencepiece and OpenAI's own code."""

import contextlib
import gzip
import importlib.util
import io
import json
import shutil
import unicodedata
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from mmdit.tokenizers import END, START, ClipTokenizer, T5Tokenizer
from training.tokenizers import train_clip_tokenizer, train_t5_tokenizer

CAPTIONS = [
    f"a {size} {color} {shape} {side} a {other} star on a {ground} ground, it's number {len(size + color + shape)}"
    for size in ("small", "large")
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
    for side in ("above", "left of")
    for other in ("white", "purple")
    for ground in ("teal", "sand")
]

PROMPTS = [
    "",
    " ",
    "\n\t",
    "a",
    "a red circle",
    "A Large RED Circle",
    "  a   red\tcircle\n left of\r\na star ",
    "it's they're we've I'm you'll he'd isn't 'tis rock'n'roll O'Brien's IT'S",
    'wow!!! really?! yes... (a, b); [c] {d} <e> #f @g $h %i ^j &k *l -m _n +o =p |q \\r /s ~t `u "v"',
    "1 12 123 4567 3.14 1,000 2nd 90s v2.0 10x10 ½ ² Ⅷ ٣",
    "café naïve Zürich coöperate Ångström smörgåsbord İstanbul ß ẞ ﬁne ﬂow",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "日本の山 한국어 한글 中文字符 ภาษาไทย हिन्दी العربية עברית Ελληνικά Русский",
    "a 🐱 and a 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ☃️ →←↑↓ ∑∞≈ €£¥ ™®©",
    "“curly” ‘quotes’ — dashes – and … ellipsis«»„‚",
    "non\u00a0breaking thin\u2009space zero\u200bwidth soft\u00adhyphen ideographic\u3000space",
    "a\x00b \x07 \x7f \ufeff \ufffd",
    "&amp; &lt;b&gt; <br/> https://example.org/a?b=c&d=e#f user@example.org",
    "antidisestablishmentarianism supercalifragilisticexpialidocious zzzzzzzzzzzzzzzzzzzzzzzz",
    "a " * 200,
    "word" * 200,
    "🐱" * 60,
    "a red circle left of a large blue star, " * 10,
    *CAPTIONS,
]

known_words = st.lists(st.sampled_from([word for prompt in PROMPTS for word in prompt.split()]), max_size=12).map(
    " ".join
)
many = settings(max_examples=300, deadline=None, derandomize=True)


def theirs(oracle, prompts: list[str], length: int) -> list[list[int]]:
    return oracle(prompts, padding="max_length", truncation=True, max_length=length).input_ids


def write_public_clip(folder: Path, pad_token: str) -> Path:
    """CLIP's public vocabulary, rebuilt from the list of merges in OpenAI's package as that package does."""
    packed = openai_clip("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges), START, END]
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def openai_clip(file: str) -> Path:
    return Path(distribution("openai-clip").locate_file("clip")) / file


@pytest.fixture(scope="module", params=["public, CLIP-L", "public, CLIP-G", "trained, CLIP-L", "trained, CLIP-G"])
def clip_folder(request, tmp_path_factory):
    vocabulary, family = request.param.split(", ")
    pad_token = {"CLIP-L": END, "CLIP-G": "!"}[family]
    folder = tmp_path_factory.mktemp("tokenizers") / "clip"
    if vocabulary == "public":
        return write_public_clip(folder, pad_token)
    train_clip_tokenizer(CAPTIONS, folder, vocab_size=580, length=77, pad_token=pad_token)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipTokenizer(clip_folder)


@pytest.fixture(scope="module")
def clip_oracle(clip_folder):
    return transformers.CLIPTokenizer.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "t5"
    train_t5_tokenizer(CAPTIONS, folder, vocab_size=64, length=96)
    return folder


@pytest.fixture(scope="module")
def t5(t5_folder):
    return T5Tokenizer(t5_folder)


@pytest.fixture(scope="module")
def t5_oracle(t5_folder):
    return transformers.T5Tokenizer.from_pretrained(t5_folder)


@pytest.fixture(scope="module")
def t5_json(t5_oracle, tmp_path_factory):
    """The tokenizer.json, with its settings, that transformers makes of the spiece.model."""
    t5_oracle.save_pretrained(folder := tmp_path_factory.mktemp("tokenizers"))
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    return folder


def test_clip_equals_transformers(clip, clip_oracle):
    assert clip(PROMPTS).tolist() == theirs(clip_oracle, PROMPTS, 77)
    assert clip(PROMPTS, length=9).tolist() == theirs(clip_oracle, PROMPTS, 9)
    special = (clip_oracle.bos_token_id, clip_oracle.eos_token_id, clip_oracle.pad_token_id, len(clip_oracle))
    assert (clip.start_token, clip.end_token, clip.pad_token, clip.vocab_size) == special
    assert [clip.count(prompt) for prompt in PROMPTS] == [len(ids) for ids in clip_oracle(PROMPTS).input_ids]


@many
@given(st.text(max_size=40) | known_words)
def test_clip_equals_transformers_on_any_text(clip, clip_oracle, prompt):
    assert clip([prompt], length=32).tolist() == theirs(clip_oracle, [prompt], 32)


def test_clip_reads_a_tokenizer_json_alone(clip, clip_oracle, tmp_path):
    clip_oracle.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.json")} == {"tokenizer.json", "tokenizer_config.json"}
    assert torch.equal(ClipTokenizer(tmp_path)(PROMPTS), clip(PROMPTS))
    (tmp_path / "tokenizer_config.json").unlink()
    assert torch.equal(ClipTokenizer(tmp_path / "tokenizer.json")(PROMPTS), clip(PROMPTS))

    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["padding"] = None  # the pad token is then told by the list of added tokens
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as older files have them
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert torch.equal(ClipTokenizer(tmp_path / "tokenizer.json")(PROMPTS), clip(PROMPTS))


def test_clip_equals_openai(tmp_path):
    """OpenAI's own tokenizer is plain Python and shares no code with ours. Text that it would repair is left out."""
    file = openai_clip("simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("simple_tokenizer", file)
    spec.loader.exec_module(openai := importlib.util.module_from_spec(spec))
    simple = openai.SimpleTokenizer(str(openai_clip("bpe_simple_vocab_16e6.txt.gz")))
    ours = ClipTokenizer(write_public_clip(tmp_path / "clip", END))
    prompts = [prompt for prompt in PROMPTS if openai.basic_clean(prompt) == prompt.strip()]
    assert len(prompts) > 100
    for prompt in prompts:
        expected = [49406, *simple.encode(prompt)][:76] + [49407]
        assert ours([prompt])[0].tolist() == expected + [49407] * (77 - len(expected)), prompt


def test_clip_training_follows_the_public_order_and_repeats(tmp_path):
    for folder in ("one", "two"):
        train_clip_tokenizer(iter(CAPTIONS), tmp_path / folder, vocab_size=580, length=20)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    public = json.loads((write_public_clip(tmp_path / "public", END) / "vocab.json").read_text())
    trained = json.loads((tmp_path / "one" / "vocab.json").read_text(encoding="utf-8"))
    assert list(trained)[:512] == list(public)[:512]
    assert (trained[START], trained[END], len(trained)) == (578, 579, 580)
    assert ClipTokenizer(tmp_path / "one")(["a red circle"]).shape == (1, 20)


def test_clip_training_by_hand(tmp_path):
    """Three times a-b and once a-b-c: first "a b</w>"; then of two pairs that occur once the alphabet's first."""
    train_clip_tokenizer(["ab ab", "abc, AB"], tmp_path, vocab_size=512 + 3 + 2, length=77)
    assert (tmp_path / "merges.txt").read_text().splitlines()[1:] == ["a b</w>", "a b", "ab c</w>"]


def test_t5_equals_transformers(t5_json, t5_oracle):
    t5 = T5Tokenizer(t5_json)
    assert t5(PROMPTS).tolist() == theirs(t5_oracle, PROMPTS, 96)
    assert t5(PROMPTS, length=5).tolist() == theirs(t5_oracle, PROMPTS, 5)
    assert (t5.start_token, t5.end_token, t5.pad_token, t5.vocab_size) == (None, 1, 0, len(t5_oracle))
    assert [t5.count(prompt) for prompt in PROMPTS] == [len(ids) for ids in t5_oracle(PROMPTS).input_ids]


@many
@given(st.text(max_size=40) | known_words)
def test_t5_equals_sentencepiece(t5, t5_folder, prompt):
    library = SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    expected = library.encode(prompt, add_eos=True)
    assert t5([prompt], length=len(expected) + 1).tolist() == [expected + [0]]
    assert t5.count(prompt) == len(expected) and t5.vocab_size == len(library) == 64


# Without accents on their own, control characters and special tokens' names, transformers has SentencePiece's ids.
@many
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "M"]), max_size=40) | known_words)
def test_t5_files_agree(t5, t5_json, prompt):
    prompt = unicodedata.normalize("NFC", prompt)
    assert torch.equal(t5([prompt], length=64), T5Tokenizer(t5_json)([prompt], length=64))


def test_tokenizer_json_goes_first(t5_folder, t5_json, clip, clip_folder, clip_oracle, tmp_path):
    shutil.copytree(t5_folder, tmp_path / "t5")
    shutil.copy(t5_json / "tokenizer.json", tmp_path / "t5")
    assert T5Tokenizer(tmp_path / "t5")(["</s>"], length=2).tolist() == [[1, 1]]  # with spiece.model it is text
    shutil.copytree(clip_folder, tmp_path / "clip")
    clip_oracle.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip/vocab.json").write_text("not read")
    assert torch.equal(ClipTokenizer(tmp_path / "clip")(PROMPTS), clip(PROMPTS))


def test_t5_training_repeats(t5_folder, tmp_path):
    train_t5_tokenizer(iter(CAPTIONS), tmp_path, vocab_size=64, length=96)
    assert (tmp_path / "spiece.model").read_bytes() == (t5_folder / "spiece.model").read_bytes()


def test_default_lengths(t5_folder, tmp_path):
    shutil.copy(t5_folder / "spiece.model", tmp_path)
    assert T5Tokenizer(tmp_path)([""]).shape == (1, 512)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert T5Tokenizer(tmp_path / "spiece.model")([""]).shape == (1, 512)
    folder = write_public_clip(tmp_path / "clip", END)
    (folder / "tokenizer_config.json").unlink()
    assert ClipTokenizer(folder)([""]).shape == (1, 77)


def test_special_tokens_map_names_the_pad_token(tmp_path):
    folder = write_public_clip(tmp_path / "clip", END)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "lstrip": false}}')
    assert ClipTokenizer(folder).pad_token == 0


@pytest.mark.parametrize("prompts", ["a red circle", [], ["a", 3], ["a", None], [["a"]], [b"a"], ["half \ud83d"]])
def test_bad_prompts(t5, clip, prompts):
    for tokenizer in (t5, clip):
        with pytest.raises(ValueError, match="at least one prompt, not|string, without half of a surrogate"):
            tokenizer(prompts)


def test_bad_lengths(t5, clip):
    with pytest.raises(ValueError, match="at least 1, for the tokens at start and end, not 0"):
        t5(["a"], length=0)
    with pytest.raises(ValueError, match="at least 2, for the tokens at start and end, not 1"):
        clip(["a"], length=1)


def test_missing_files(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(FileNotFoundError, match="vocab.json is missing: download"):
        ClipTokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="spiece.model is missing: download .*tokenizer_2 of FLUX.1"):
        T5Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="merges.txt is missing: download"):
        ClipTokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing: download"):
        ClipTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", "{", "vocab.json is damaged or not CLIP's tokenizer .*EOF while parsing"),
        ("vocab.json", "[]", "vocab.json is damaged or not CLIP's tokenizer .*Bad vocabulary"),
        ("vocab.json", '{"a": 0}', "vocab.json is damaged or not CLIP's tokenizer .*out of vocabulary"),
        ("merges.txt", "a b c", "vocab.json is damaged or not CLIP's tokenizer .*Merges text file invalid at line 1"),
        ("merges.txt", "#version: 0.2\na </w>", "merges.txt is cut off: 1 merges for 520 tokens"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "the token '<pad>' is not in its vocabulary"),
        ("special_tokens_map.json", '{"pad_token": {}}', "map.json is damaged or not a tokenizer's settings"),
        ("special_tokens_map.json", "{", "map.json is damaged or not a tokenizer's settings"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged or not a tokenizer's settings"),
        ("tokenizer_config.json", '{"model_max_length": "long"}', "tokenizer_config.json is .*: 'long'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 1}}', "tokenizer_config.json is .* mapping"),
    ],
)
def test_unreadable_clip_files(tmp_path, file, content, message):
    train_clip_tokenizer(CAPTIONS, tmp_path, vocab_size=520, length=77)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        ClipTokenizer(tmp_path)


def test_unreadable_json(t5_json, tmp_path):
    whole = (t5_json / "tokenizer.json").read_text()
    start = whole.index('"precompiled_charsmap"')
    damaged = whole[: start + 1000] + "*" + whole[start + 1001 :]  # on this one the library panics
    for content in ("{}", "[]", "", whole[:-1], damaged, whole.replace("</s>", "</S>")):
        (tmp_path / "tokenizer.json").write_text(content)
        for family, kind in (("CLIP's", ClipTokenizer), ("T5's", T5Tokenizer)):
            with pytest.raises(ValueError, match=f"tokenizer.json is damaged or not {family} tokenizer"):
                kind(tmp_path)


def test_unreadable_model(t5_folder, tmp_path):
    """Cut off within the pieces, which come first, or later. The library loads what ends between two pieces."""
    whole, loaded = (t5_folder / "spiece.model").read_bytes(), 0
    for size in [*range(300), *range(300, len(whole), 5003), len(whole) - 1]:
        (tmp_path / "spiece.model").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="spiece.model is damaged or not T5's tokenizer .*: download"):
            T5Tokenizer(tmp_path)
        with contextlib.suppress(RuntimeError):
            loaded += SentencePieceProcessor().LoadFromSerializedProto(whole[:size])
    assert loaded > 10
    model = io.BytesIO()  # with the library's own choice of special tokens: no pad token
    SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=48, minloglevel=2)
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="it has no end token, no pad token"):
        T5Tokenizer(tmp_path)


def test_vocabularies_too_large_to_train(tmp_path):
    with pytest.raises(ValueError, match="ask for at most vocab_size="):
        train_clip_tokenizer(CAPTIONS, tmp_path, vocab_size=5000, length=77)
    with pytest.raises(ValueError, match="No vocabulary of 5000 pieces"):
        train_t5_tokenizer(CAPTIONS, tmp_path, vocab_size=5000, length=77)
