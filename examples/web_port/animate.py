"""The animation of the README's first screen, the strength moved from 0 and back: python -m examples.web_port.animate

Needs playwright, of the extra `test`, and a Chromium, Debian's package or playwright's own.
"""

import argparse
import functools
import http.server
import io
import shutil
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


parser = argparse.ArgumentParser(prog="python -m examples.web_port.animate", description=__doc__)
parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page.webp")
parser.add_argument("--prompt", default="a triangle")
parser.add_argument("--seed", type=int, default=3)
parser.add_argument("--most", type=float, default=1.0, help="the largest strength (default: %(default)s)")
args = parser.parse_args()

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=ROOT))
threading.Thread(target=server.serve_forever, daemon=True).start()
strengths = [0.1 * i for i in range(round(args.most / 0.1) + 1)]
with sync_playwright() as p:
    found = next(filter(None, map(shutil.which, (p.chromium.executable_path, "chromium"))), None)
    browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1000, "height": 1200}, color_scheme="light")
    page.set_default_timeout(300_000)
    page.goto(f"http://127.0.0.1:{server.server_port}/examples/web_port/")
    page.wait_for_selector("body[data-done]")
    page.locator("#prompt").fill(args.prompt)
    page.locator("#seed").fill(str(args.seed))
    page.locator("#paint").click()
    page.add_style_tag(content="aside { display: none !important } #strength { outline: none !important }")
    frames = []
    for strength in strengths:
        page.locator("#strength").fill(f"{strength:.1f}")
        page.wait_for_selector("body[data-done]")
        page.wait_for_timeout(100)  # the figures follow in the next frame
        if not frames:
            top, bottom = (page.locator(f"#{row} .body").bounding_box() for row in ("typical", "repelled"))
            clip = {"x": top["x"] - 12, "y": top["y"] - 12, "width": top["width"] + 24,
                    "height": bottom["y"] + bottom["height"] - top["y"] + 24}
        frames.append(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))
    browser.close()
server.shutdown()

order = [*range(len(frames)), *reversed(range(1, len(frames) - 1))]
pause = {0: 900, len(frames) - 1: 1600}
frames[0].save(args.out, save_all=True, append_images=[frames[i] for i in order[1:]], loop=0, method=6, quality=80,
               duration=[pause.get(i, 260) for i in order])
print(f"{args.out}: {len(order)} frames, {args.out.stat().st_size / 1e6:.2f} MB")
