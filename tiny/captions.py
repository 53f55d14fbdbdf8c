"""Captions of the tiny world: from a scene to a caption, and from a prompt to a (partial) scene."""

import random
import re

from .world import ARRANGEMENTS, COLORS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene, Thing

POSITION_WORDS = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
                  "center": "in the center"}  # fmt: skip
REVERSED = {"left of": "right of", "above": "below"}
ALIKE = {"the": "a", "an": "a", "at": "on", "in": "on"}
SYNONYMS = {"grey": "gray", "background": "ground", "middle": "center", "violet": "purple", "big": "large",
            "centre": "center", "under": "below"}  # word: that of WORDS which means the same
INTERCHANGEABLE = {"a": ("the",), "an": ("the",)} | {  # word: its synonyms, one for one in any caption
    word: tuple(other for other, meant in SYNONYMS.items() if meant == word) for word in set(SYNONYMS.values())
}
WORDS = (  # with SYNONYMS every word of the captions that the checkpoints were trained on, the comma included
    *SHAPES, *COLORS, *SIZES, *GROUNDS, *TEXTURES, *ARRANGEMENTS[1], "above", "below", "of", "row", "column",
    "a", "an", "the", "on", "at", "in", "and", ",", "shape", "ground",
)  # fmt: skip


def describe(scene: Scene, rng: random.Random | None = None) -> str:
    """A caption with every specified attribute of a (partial) scene: lower case, at most 22 words of WORDS.

    A scene without things, on which no checkpoint was trained, is "nothing".
    With `rng`, half of the pairs are described in the reverse order ("right of", "below"), with the same meaning.
    """
    names = [article(" ".join(filter(None, (t.size, t.color, t.shape or "shape")))) for t in scene.things]
    if not names:
        text = "nothing"
    elif len(names) == 1:
        text = " ".join(filter(None, (names[0], POSITION_WORDS.get(scene.arrangement))))
    elif len(names) == 2 and scene.arrangement:
        first, relation, second = names[0], scene.arrangement, names[1]
        if rng is not None and rng.random() < 0.5:
            first, relation, second = second, REVERSED[relation], first
        text = f"{first} {relation} {second}"
    else:
        text = ", ".join(names[:-1]) + " and " + names[-1]
        text += f" in a {scene.arrangement}" if scene.arrangement else ""
    if scene.texture or scene.ground:
        text += " on " + article(" ".join(filter(None, (scene.texture, scene.ground, "ground"))))
    return text


def reword(caption: str, rng: random.Random) -> str:
    """A caption of `describe` in other words of the same meaning, at most as many: half of them stay as they are.

    Of the others, some say "red circle on navy", without articles and "ground"; each word may become a synonym.
    """
    if rng.random() < 0.5:
        return caption
    caption = caption.replace(",", " ,")
    if rng.random() < 0.3:
        caption = " ".join(word for word in caption.split() if word not in ("a", "an", "the"))
        caption = re.sub(rf"({'|'.join(GROUNDS)}) ground$", r"\1", caption)
    words = [rng.choice((word, *INTERCHANGEABLE.get(word, ()))) for word in caption.split()]
    return " ".join(words).replace(" ,", ",")


def article(noun: str) -> str:
    """The noun phrase with "a" or "an" before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def parse(prompt: str) -> Scene:
    """The partial scene that a prompt describes: the inverse of `describe` and `reword`, lenient in case and articles.

    Raises ValueError naming the first word that no checkpoint was trained on, or the phrase that cannot be parsed.
    """
    words = [SYNONYMS.get(word, word) for word in re.findall(r"\w+|[^\w\s]", prompt.lower().strip().rstrip("."))]
    if unknown := [word for word in words if word not in WORDS]:
        raise ValueError(f"unknown word {unknown[0]!r} in {prompt!r}; known words: {' '.join(WORDS)}")
    words = [ALIKE.get(word, word) for word in words]
    text = " ".join(word for word in words if word != "a")  # no article is left, and "at" and "in" became "on"

    texture, ground = None, None
    if found := re.search(rf" on(?: ({'|'.join(TEXTURES)}))?(?: ({'|'.join(GROUNDS)}))?(?: ground)?(?<! on)$", text):
        (texture, ground), text = found.groups(), text[: found.start()]
    arrangement = None
    if found := re.search(r" on (left|right|top|bottom|center|row|column|triangle)$", text):
        arrangement, text = found[1], text[: found.start()]
    elif found := re.search(r" (?:on )?(left of|above|right of|below) ", text):
        arrangement, first, second = found[1], text[: found.start()], text[found.end() :]
        if arrangement in REVERSED.values():
            arrangement, first, second = {v: k for k, v in REVERSED.items()}[arrangement], second, first
        text = f"{first} and {second}"
    things = tuple(parse_thing(phrase, prompt) for phrase in re.split(r" ?, and | ?, | and ", text))
    if len(things) > 3:
        raise ValueError(f"{len(things)} things in {prompt!r}; a picture holds at most 3")
    if arrangement not in (None, *ARRANGEMENTS.get(len(things), ())):
        raise ValueError(f"{arrangement!r} does not fit {len(things)} thing(s) in {prompt!r}")
    return Scene(things, arrangement, ground, texture)


def parse_thing(phrase: str, prompt: str) -> Thing:
    """The thing that "small red circle" names; ValueError if the phrase is anything else."""
    pattern = rf"(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)}|shape)"
    if not (found := re.fullmatch(pattern, phrase.strip())):
        raise ValueError(f"cannot read {phrase!r} in {prompt!r}; write a thing as '[size] [color] shape'")
    size, color, shape = found.groups()
    return Thing(None if shape == "shape" else shape, color, size)
