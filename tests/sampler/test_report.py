"""Numbers about batches whose contents are known, because the world's own renderer drew them."""

import pytest
import torch
from PIL import Image

from sampler.output import fit, grid
from sampler.pipeline import to_picture
from sampler.report import describe_batch, table, to_pixels
from tiny.world import Scene, Thing, count_attributes, render

RED = Scene((Thing("circle", "red", "medium"),), "center", "navy", "plain")
BLUE = Scene((Thing("square", "blue", "large"),), "left", "pink", "striped")


def pictures(*scenes):
    return [to_picture(picture) for picture in render(scenes, seed=1)]


def test_pixels_survive_the_way_through_a_picture():
    original = render([RED, BLUE])
    assert (to_pixels([to_picture(p) for p in original]) - original).abs().max() <= 1 / 255 + 1e-6


def test_one_picture_four_times_scores_one_and_two_kinds_nearly_two():
    alike = describe_batch(pictures(RED, RED, RED, RED), "a red circle", "tiny")
    assert alike["vendi"] == pytest.approx(1, abs=1e-4) and alike["adherence"] == 1 and alike["well_drawn"] == 4
    mixed = describe_batch(pictures(RED, BLUE, RED, BLUE), "a red circle", "tiny")
    # they share the number of things, 1 of 7 attributes: eigenvalues (1 ± 1/7) / 2
    weights = torch.tensor([4 / 7, 3 / 7], dtype=torch.float64)
    assert mixed["vendi"] == pytest.approx(torch.special.entr(weights).sum().exp().item(), abs=1e-4)
    assert mixed["adherence"] == pytest.approx((1 + 1 / 3) / 2, abs=1e-4)  # a blue square: only "one thing" holds
    assert mixed["attributes"]["color"] == {"red": 2, "blue": 2}


def test_a_picture_that_lacks_a_part_of_its_thing_is_not_well_drawn():
    torn = render([RED, RED])
    torn[0, :, 64:, 64:] = torn[0, :, :1, :1]  # a quarter of the circle is ground
    assert describe_batch([to_picture(picture) for picture in torn], "a red circle", "tiny")["well_drawn"] == 1


def test_prompts_outside_the_world_have_no_adherence_and_other_models_no_attributes():
    assert describe_batch(pictures(RED, RED), "a cat", "tiny")["adherence"] is None
    other = describe_batch(pictures(RED, RED), "a cat", None)
    assert other["vendi_of"] == "pixels" and "adherence" not in other and 1 <= other["vendi"] < 1.2


def test_equal_pictures_score_one_and_pictures_of_one_color_are_alike():
    flat = [Image.new("RGB", (8, 8), color) for color in ("red", "navy", (17, 17, 17))]
    (scene,) = pictures(RED)
    for batch, score in ((flat[:1] * 4, 1), (flat, 1), ([scene] * 5, 1), ([flat[0].resize(scene.size), scene], 2),
                         ([flat[0].resize(scene.size), scene, flat[1].resize(scene.size)], 3 / 2 ** (2 / 3))):
        # one kind, or of three pictures two of a kind: eigenvalues 2/3 and 1/3
        assert describe_batch(batch, "a cat", None)["vendi"] == pytest.approx(score, abs=1e-4)
    for batch in (flat[:1] * 4, [scene] * 5):
        assert describe_batch([picture.resize((64, 64)) for picture in batch], "a star", "tiny")["vendi"] == 1


def test_counts_are_of_what_could_be_read():
    found = count_attributes([RED, BLUE, Scene((Thing(None, "red", None),), None, "navy", None)])
    assert found["color"] == {"red": 2, "blue": 1} and found["shape"] == {"circle": 1, "square": 1}


def test_the_table_lines_up():
    columns = [{"vendi": 1.0, "adherence": 1.0, "attributes": {"color": {"red": 8}}, "well_drawn": 8, "seconds": 1.5},
               {"vendi": 3.25, "adherence": 0.5, "attributes": {"color": {"red": 4, "blue": 4}}, "well_drawn": 7,
                "seconds": 1.6}]
    lines = table(dict(zip(("typical", "repelled"), columns, strict=True)), images=8).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["", "Vendi score (1 to 8)", "adherence", "well drawn", "color",
                                                       "seconds"]
    at = lines[0].index("repelled")
    assert [line[at:] for line in lines] == ["repelled", "3.25", "50 %", "7 of 8", "4 red, 4 blue", "1.60"]


def test_long_titles_are_cut_to_fit():
    from PIL import ImageFont

    font = ImageFont.load_default(20)
    assert fit("a circle", font, 500) == "a circle"
    short = fit("a circle " * 50, font, 500)
    assert short.endswith("…") and 440 < font.getlength(short) <= 500


def test_a_grid_of_one_and_of_nine():
    one, nine = grid(pictures(RED)), grid(pictures(*[RED] * 9))
    assert one.size == (128 + 16, 128 + 16)
    assert nine.size == (4 * 136 + 8, 3 * 136 + 8)
    assert nine.getpixel((nine.width - 20, nine.height - 20)) == (255, 255, 255)
