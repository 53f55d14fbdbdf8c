"""The chat tokenizers against recorded ids, transformers' tokenizers and its reading of tekken.json."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmdit.chat_tokenizers import QWEN_ADDED, MistralTokenizer, QwenTokenizer, byte_characters
from tests.mmdit.small_tekken import TEMPLATES, bytes_to_unicode, converted, tekken_file

DATA = Path(__file__).parents[1] / "data" / "flux2-tokenizer"
RECORDED = json.loads((DATA / "cases.json").read_text())
PROMPTS = [
    "", " ", "a photo of a cat", "Two foxes run through deep SNOW, 35mm film, f/1.8!", "x" * 90,
    "it's  a   house\n\nby the lake ", "Öl auf Leinwand: cafe\u0301 naïve 🦊", "一只猫坐在椅子上",
    "price 12345 <|im_end|> <think> </think> </s>[INST]", "<|endoftext|>" * 40, "a\tb\r\nc \r\n  d", "a [IMG] b",
]
texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
many = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def qwen():
    return QwenTokenizer(DATA)


@pytest.fixture(scope="module")
def qwen_oracle():
    return transformers.Qwen2Tokenizer.from_pretrained(DATA)


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory):
    """The hub's form, a tokenizer.json, as transformers makes it of a tekken.json."""
    folder = tmp_path_factory.mktemp("mistral")
    converted(tekken_file(folder)).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def mistral(mistral_folder):
    return MistralTokenizer(mistral_folder)


@pytest.fixture(scope="module")
def mistral_oracle(mistral_folder):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(mistral_folder / "tokenizer.json"),
                                                pad_token="<pad>", padding_side="left")


def check(tokenizer, oracle, prompt, length, text):
    theirs = oracle([text], padding="max_length", truncation=True, max_length=length, add_special_tokens=False)
    assert tokenizer([prompt], length).tolist() == theirs.input_ids
    assert tokenizer.mask([prompt], length).int().tolist() == theirs.attention_mask
    assert tokenizer.count(prompt) == len(oracle(text, add_special_tokens=False).input_ids)


def klein_text(prompt):
    return TEMPLATES["klein"]["template"].format(prompt=prompt)


def dev_text(prompt):
    return TEMPLATES["dev"]["template"].format(system=TEMPLATES["dev"]["system"], prompt=prompt.replace("[IMG]", ""))


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_recorded_ids(tmp_path, files):
    """From each form in which the tokenizer is published."""
    folder = DATA
    if files != "tokenizer.json":
        folder = tmp_path
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(DATA / name, folder)
        ids = sorted(RECORDED["special"].items(), key=lambda item: -item[1])
        if files == "added_tokens.json":
            (folder / files).write_text(json.dumps(dict(ids)))
        else:
            added = {str(id): {"content": name, "normalized": False, "special": "|" in name}
                     for name, id in reversed(ids)}
            (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = QwenTokenizer(folder)
    prompts, length = [case["prompt"] for case in RECORDED["cases"]], RECORDED["max_length"]
    assert tokenizer(prompts, length).tolist() == [case["ids"] for case in RECORDED["cases"]]
    assert tokenizer.mask(prompts, length).int().tolist() == [case["mask"] for case in RECORDED["cases"]]
    assert tokenizer.vocab_size == 383 and tokenizer([""]).shape == (1, 512)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_qwen_equals_transformers(qwen, qwen_oracle, prompt):
    message = [{"role": "user", "content": prompt}]
    text = qwen_oracle.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text == klein_text(prompt)
    check(qwen, qwen_oracle, prompt, 64, text)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_mistral_equals_transformers(mistral, mistral_oracle, prompt):
    for length in (64, 512):
        check(mistral, mistral_oracle, prompt, length, dev_text(prompt))


@many
@given(texts)
def test_any_text(qwen, qwen_oracle, mistral, mistral_oracle, prompt):
    check(qwen, qwen_oracle, prompt, 48, klein_text(prompt))
    check(mistral, mistral_oracle, prompt, 512, dev_text(prompt))


@pytest.mark.parametrize("special", [True, False], ids=["listed", "known"])
@pytest.mark.parametrize("form", ["folder", "bytes"])
def test_tekken_gives_the_ids_of_its_tokenizer_json(tmp_path, mistral, special, form):
    file = tekken_file(tmp_path, special)
    tokenizer = MistralTokenizer(file.read_bytes() if form == "bytes" else tmp_path)
    prompts = [prompt for prompt in PROMPTS if "</s>" not in prompt]
    assert torch.equal(tokenizer(prompts), mistral(prompts)) and tokenizer.vocab_size == mistral.vocab_size
    assert tokenizer.pad_token == TEMPLATES["dev"]["pad_id"]
    assert "padded" not in tokenizer.model.get_vocab()  # beyond the stated size


def test_the_template_in_ids(mistral):
    """The special tokens stand where the published ids have them."""
    row = mistral(["a cat"])[0]
    text = row[~(row == 11)].tolist()
    assert row[0] == 11 and text[:2] == [1, 17] and text[-1] == 4 and {18, 3} < {*text}
    assert text.index(3) == text.index(18) + 1


def test_qwen3_s_own_added_tokens_have_the_published_ids():
    published = TEMPLATES["klein"]["special"]
    assert {name: 151643 + QWEN_ADDED.index(name) for name in published} == published


def test_without_a_list_the_added_tokens_are_qwen3_s(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DATA / name, tmp_path)
    ids = QwenTokenizer(tmp_path)([""], 30)[0].tolist()
    assert ids[0] == 376 + 1 and ids[-1] == 376 and 376 + QWEN_ADDED.index("</think>") in ids


def test_printable_bytes():
    assert byte_characters() == bytes_to_unicode()


@pytest.mark.parametrize("prompts", ["a cat", [], ["a", 3], ["a", None], ["half \ud83d"]])
def test_bad_prompts(qwen, mistral, prompts):
    for tokenizer in (qwen, mistral):
        for call in (tokenizer, tokenizer.mask):
            with pytest.raises(ValueError, match="at least one prompt, not|string, without half of a surrogate"):
                call(prompts)


def test_bad_length(qwen):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        qwen(["a"], length=0)


def test_other_and_damaged_files(tmp_path, mistral_folder):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json is missing: download"):
        QwenTokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tekken\.json is missing: download"):
        MistralTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"damaged or not Mistral's tokenizer \(the token '<pad>' is not among"):
        MistralTokenizer(DATA)
    with pytest.raises(ValueError, match=r"not Qwen3's tokenizer \(the token '<\|endoftext\|>' is not among"):
        QwenTokenizer(mistral_folder / "tokenizer.json")
    for content in (b"", b"{}", b"[]", (mistral_folder / "tekken.json").read_bytes()[:999]):
        with pytest.raises(ValueError, match="tekken_model is damaged or not Mistral's tokenizer"):
            MistralTokenizer(content)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DATA / name, tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\n")
    with pytest.raises(ValueError, match=r"merges\.txt is cut off: 1 merges for 376 tokens"):
        QwenTokenizer(tmp_path)


def test_padding_set_in_the_file_does_not_count(tmp_path, qwen):
    model = Tokenizer.from_file(str(DATA / "tokenizer.json"))
    model.enable_padding(length=600)
    model.enable_truncation(5)
    model.save(str(tmp_path / "tokenizer.json"))
    assert torch.equal(QwenTokenizer(tmp_path)(PROMPTS), qwen(PROMPTS))
