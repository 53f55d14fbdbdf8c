"""The page in a real Chromium, without a window: its model against ours, and the page as a person uses it."""

import functools
import http.server
import json
import random
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import playwright
import pytest
import torch
from playwright.sync_api import sync_playwright

import porting
import weights
from mmdit import ClipTokenizer, T5Tokenizer, trace
from repulsion import Repulsion, vendi_score
from sampler import Pipeline, starting_noise
from tiny.captions import WORDS

ROOT = Path(__file__).parents[2]
PORT = ROOT / "examples" / "web_port"
FOLDER = weights.BUNDLED["tiny-turbo"]
NODE = next((Path(playwright.__file__).parent / "driver").glob("node*"))  # playwright brings the node it runs on


@pytest.fixture(scope="module")
def site():
    """The address of the page on a server of the repository's root, as `python -m http.server` runs it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=ROOT)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        names = [p.chromium.executable_path, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
        found = next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.fail("no Chromium was found: run `apt-get install chromium` or `playwright install chromium`")
        with p.chromium.launch(executable_path=found, args=["--no-sandbox"]) as chromium:  # root has no sandbox
            yield chromium


@pytest.fixture
def context(browser):
    with browser.new_context() as context:
        context.set_default_timeout(180_000)  # the gate's machine may be busy
        yield context


@pytest.fixture
def page(context, site):
    """The page, painted once. Whatever a test does, nothing is logged as an error, and no other host is asked."""
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: request.url.startswith((site, "data:")) or wrong.append(request.url))
    page.goto(f"{site}/examples/web_port/")
    done(page)
    yield page
    assert not wrong


@pytest.fixture(scope="module")
def blank(browser, site):
    """An empty page from which the port's modules can be imported."""
    page = browser.new_page()
    page.set_default_timeout(180_000)
    page.goto(f"{site}/examples/web_port/README.md")
    return page


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("tiny-turbo")


def run(page, body, argument=None):
    """What a piece of JavaScript with the port's modules at hand returns."""
    names = ("checkpoint", "noise", "product", "repulsion", "safetensors", "sampler", "tokenizers")
    imports = "".join(f"const {name} = await import('/examples/web_port/model/{name}.js');" for name in names)
    files = """const get = async (path) => (await fetch(`/weights/checkpoints/tiny-turbo/${path}`)).arrayBuffer();"""
    return page.evaluate(f"async (given) => {{ {imports} {files} {body} }}", argument)


def done(page):
    page.wait_for_selector("body[data-done]")


def pictures(page, row):
    read = """canvases => canvases.map((c) => [c.height, c.width,
        [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]])"""
    return [np.array(numbers).reshape(height, width, 4)[..., :3]
            for height, width, numbers in page.locator(f"#{row} canvas").evaluate_all(read)]


def same(found, ours):
    assert len(found) == len(ours)
    return max(np.abs(a - np.asarray(b, int)).max() for a, b in zip(found, ours, strict=True)) <= 2


def test_as_a_person_uses_it(page, pipeline):
    assert same(pictures(page, "typical"), pipeline("a triangle", 4))
    assert same(pictures(page, "repelled"), pipeline("a triangle", 4, repulsion=pipeline.defaults.repulsion))

    page.locator("#paint").click()  # nothing is new
    done(page)
    page.locator("#prompt").fill("")
    page.locator("#prompt").press_sequentially("a small star")
    page.locator("#words button", has_text="above").click()
    for word in ("a", "ring"):
        page.get_by_role("button", name=word, exact=True).click()
    page.locator("#seed").fill("3")
    page.locator("#prompt").press("Enter")
    strength = float(page.locator("#strength").input_value())
    for _ in range(4):
        page.locator("#strength").press("ArrowLeft")  # while the first row is being painted
    page.locator("#with-control").check()
    done(page)

    prompt, push = "a small star above a ring", {"strength": strength - 0.4, "steps": 1}
    assert page.locator("#prompt").input_value() == prompt
    assert page.locator("#strength-value").inner_text() == f"{strength - 0.4:.1f}"
    assert same(pictures(page, "typical"), pipeline(prompt, 4, seed=3))
    assert same(pictures(page, "repelled"), pipeline(prompt, 4, seed=3, repulsion=Repulsion(**push)))
    away = Repulsion(**push, objective="spread")
    assert same(pictures(page, "control"), pipeline(prompt, 4, seed=3, repulsion=away))


def test_blocks_and_steps_with_what_precedes_the_first_push_taken_from_the_typical_run(page, pipeline):
    page.locator("#images").select_option("6")
    strength = float(page.locator("#strength").input_value())
    for blocks, steps, settings in (("middle", "1 1", {"blocks": "middle", "start": 1}),
                                    ("4", "0 2", {"blocks": (4,), "steps": 2}), ("last", "0 1", {"blocks": "last"})):
        page.locator("#blocks").select_option(blocks)
        page.locator("#steps").select_option(steps)
        done(page)
        ours = pipeline("a triangle", 6, repulsion=Repulsion(strength=strength, **settings))
        assert same(pictures(page, "repelled"), ours), settings
    assert same(pictures(page, "typical"), pipeline("a triangle", 6))


def test_the_figures_show_our_tokens_scores(page, pipeline):
    push = pipeline.defaults.repulsion
    with trace(pipeline.transformer, "dual.") as passes:
        pipeline("a triangle", 4, repulsion=push)
    last = pipeline.config.num_blocks - 2
    for step, block in ((0, 0), (0, last), (3, last)):
        page.locator("#point").evaluate("""(slider, value) => {
            slider.value = value; slider.dispatchEvent(new Event("input")); }""", step * (last + 1) + block)
        page.wait_for_function("(name) => document.getElementById('point-name').textContent === name",
                               arg=f"Step {step + 1}, block {block + 1}")
        name = f"dual.{block}.repulsion.out" if step == 0 else f"dual.{block}.attention.context.out"
        vectors = passes[step][name].flatten(1)
        shown = float(page.locator("#repelled .score b").inner_text())
        assert shown == pytest.approx(vendi_score(vectors).item(), abs=0.006)  # two decimals are shown
        label = page.locator("#repelled .figures svg").first.get_attribute("aria-label")
        rows = [[float(x.replace("−", "-")) for x in row.split()] for row in label.split(": ")[1].split("; ")]
        units = torch.nn.functional.normalize(vectors.double(), dim=1)
        np.testing.assert_allclose(rows, units @ units.mT, atol=0.006)


def test_a_click_shows_where_the_tokens_of_a_word_look(page, pipeline):
    prompt, number = "a small star above a circle", 2
    page.locator("#prompt").fill(prompt)
    page.locator("#paint").click()
    done(page)
    page.locator("#typical .pictures button").nth(1).press("Enter")
    page.locator("#attention-step").select_option(index=1)
    page.locator("#attention-block").select_option(index=1 + 5)  # after the mean of all
    figures = page.locator("#maps figure")
    page.wait_for_function("(n) => document.querySelectorAll('#maps figure').length === n",
                           arg=1 + len(prompt.split()))
    with trace(pipeline.transformer, "dual.5.attention.") as passes:
        pipeline(prompt, 4)
    q, k = (passes[1][f"dual.5.attention.{name}"][1] for name in "qk")
    n = passes[1]["dual.5.attention.context.in"].shape[1]
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)[:n, n:]
    positions = []  # of the word's tokens: those that the prompt up to the word has more than the prompt before it
    for start, tokenizer in ((0, pipeline.text.clips[0][0]), (n // 2, pipeline.text.t5[0])):
        before, after = (tokenizer.count(" ".join(prompt.split()[:words])) - 1 for words in (number, number + 1))
        positions += range(start + before, start + after)
    page.wait_for_function("""([index, text]) => document.querySelectorAll("#maps figcaption")[index].textContent
        === text""", arg=[1 + number, f"star{round(100 * shares[positions].mean(0).sum().item())} %"])
    assert figures.count() == 1 + len(prompt.split())
    page.keyboard.press("Escape")
    assert not page.locator("#attention").is_visible()


def test_a_word_that_the_model_does_not_know_is_named(page):
    assert {page.locator("#words button").all_inner_texts()[i] for i in range(len(WORDS))} == set(WORDS)
    page.locator("#prompt").fill("a red dog on navy")
    assert "“dog”" in page.locator("#hint").inner_text()
    page.locator("#prompt").fill("a red ring, on navy")
    assert page.locator("#hint").inner_text() == ""


def test_nothing_is_wider_than_the_screen(page):
    page.locator("#with-control").check()
    for width in (360, 390, 700, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("images", [2, 8])
def test_it_passes_the_kit_from_text_to_pictures(tmp_path, images):
    porting.write(tmp_path / "kit", "tiny-turbo", "a small green star left of a ring", images)
    command = [NODE, PORT / "record.js", tmp_path / "kit", tmp_path / "theirs.safetensors", FOLDER]
    subprocess.run(command, check=True)
    kit, theirs = porting.Kit.read(tmp_path / "kit"), porting.files.read(tmp_path / "theirs.safetensors")
    rows = porting.compare(kit, theirs)
    assert all(row.passed for row in rows), porting.report(rows)


def test_ids_are_the_tokenizers_own(blank):
    draw = random.Random(0)
    alphabet = [*"abcdefgzAÉßİ09.,!?'<|> \t\n’“–ﬁ①Ａ你好🙂é", "<|endoftext|>", "'s ", " a ", "circle",
                "\u00a0", "\u200b"]
    prompts = ["", " ", "a red circle, left of a ring", "A  RED\tCircle", "it's we'll 'd", "12 345", "hello! ?! !!",
               *("".join(draw.choices(alphabet, k=draw.randrange(1, 40))) for _ in range(300))]
    found = run(blank, """
        const tokenize = checkpoint.tokenizers(await checkpoint.readFiles(get));
        return given.map((prompt) => ["clip_l", "clip_g", "t5"].map((name) => [...tokenize[name](prompt).ids]));
    """, prompts)
    ours = [ClipTokenizer(FOLDER / "tokenizer"), ClipTokenizer(FOLDER / "tokenizer_2"),
            T5Tokenizer(FOLDER / "tokenizer_3")]
    for prompt, ids in zip(prompts, found, strict=True):
        for name, tokenizer, own in zip(("CLIP-L", "CLIP-G", "T5"), ours, ids, strict=True):
            assert own == tokenizer([prompt])[0].tolist(), (name, prompt)


@pytest.mark.parametrize(("seed", "image"), [(0, 0), (1, 7), (4294, 3), (2**32 - 1, 1)])
def test_noise_is_torch_s(blank, seed, image):
    found = run(blank, "return [...noise.startingNoise(...given)]", [seed, image, 1536])
    np.testing.assert_allclose(found, starting_noise(seed, image + 1, (1536,))[image], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 8, 8), (9, 33, 130)])
def test_the_kernel_multiplies_matrices_of_any_size(blank, shape):
    m, k, n = shape
    rng = np.random.default_rng(m)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    found = run(blank, """
        const [a, b, m, k, n] = given, rows = product.ordered(k, n);
        return [...product.product(Float32Array.from(a), Float32Array.from(b), m, k, n, rows)];
    """, [a.flatten().tolist(), b.flatten().tolist(), m, k, n])
    # float32 sums of k products, each rounded once
    assert np.linalg.norm(np.reshape(found, (m, n)) - a @ b) < 1e-6 * np.linalg.norm(a @ b)


@pytest.mark.parametrize("alike", [1.0, 1e-3, 1e-6])
def test_eigenvalues_are_numpy_s_also_of_kernels_close_to_all_ones(blank, alike):
    x = 1 + alike * np.random.default_rng(0).standard_normal((16, 40))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = x @ x.T
    found = run(blank, "return repulsion.spectrum(given, 1e-4)", kernel.tolist())
    density = (kernel + 1e-4 * np.eye(16)) / (16 * (1 + 1e-4))
    np.testing.assert_allclose(found, np.linalg.eigvalsh(density), rtol=1e-9, atol=1e-16)


def test_pushes_of_several_steps_and_of_samples_that_coincide_are_ours(blank):
    vectors = torch.from_numpy(1 + 0.1 * np.random.default_rng(1).standard_normal((4, 30)))
    vectors[2] = vectors[0]
    for settings in ({"strength": 1.5, "iterations": 8}, {"strength": 0.5, "objective": "spread"}):
        found = run(blank, "return repulsion.push(given[0], given[1]).tokens", [vectors.tolist(), settings])
        ours = Repulsion(**settings).bind(0, 1)(vectors[:, None])[:, 0]
        # a number near 0 is a difference of larger ones: their rounding depends on the processor
        assert np.linalg.norm(found - ours.numpy()) < 1e-9 * ours.norm()
    found = run(blank, "return repulsion.push(given, { strength: 2 }).tokens", vectors[[0, 0, 0]].tolist())
    assert (np.array(found) == vectors[0].numpy()).all()


@pytest.mark.parametrize(("file", "entry", "value"), [
    ("transformer/config.json", "_class_name", "FluxTransformer2DModel"), ("transformer/config.json", "qk_norm", None),
    ("transformer/config.json", "dual_attention_layers", [0]), ("text_encoder/config.json", "hidden_act", "relu"),
    ("vae/config.json", "use_post_quant_conv", True), ("sampling.json", "guidance", 3.0),
    ("sampling.json", "repulsion", {"scale": 1000}),
    ("sampling.json", "repulsion", {"strength": 1, "objective": "dpp"}),
])  # fmt: skip
def test_what_it_does_not_do_is_refused(blank, file, entry, value):
    said = run(blank, """
        const files = await checkpoint.readFiles(get), [file, entry, value] = given;
        const changed = { ...JSON.parse(new TextDecoder().decode(files[file])), [entry]: value };
        files[file] = new TextEncoder().encode(JSON.stringify(changed));
        try {
          checkpoint.settings(files);
          checkpoint.networks(files, ["transformer", "autoencoder", "clip_l", "clip_g", "t5"]);
        } catch (error) {
          return error.message;
        }
    """, [file, entry, value])
    assert said and ("use the project itself" in said or "use tiny-turbo" in said)
    assert json.dumps(value, separators=(",", ":")).removesuffix(".0") in said


def test_a_file_that_is_cut_off_is_named(blank):
    said = run(blank, """
        const whole = await get("text_encoder/model.safetensors"), said = [];
        const pointer = new TextEncoder().encode("version 1: a pointer").buffer;
        for (const part of [whole.slice(0, -1), whole.slice(0, 5), pointer]) {
          try { safetensors.read(part, "FILE"); } catch (error) { said.push(error.message); }
        }
        return said;
    """)
    assert len(said) == 3 and all(text.startswith("FILE is not a whole safetensors file") for text in said)


def test_it_is_small():
    lines = {file: file.read_text(encoding="utf-8").splitlines() for file in PORT.rglob("*.*") if file.suffix != ".md"}
    assert sum(len(text) for file, text in lines.items() if file.parent.name == "model") < 1250
    assert sum(len(lines[PORT / name]) for name in ("page.js", "figures.js")) < 500
    assert max(len(line) for text in lines.values() for line in text) <= 120
