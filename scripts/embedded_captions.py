"""Captions of the embedded model's images: names with articles, styles, keywords, short sentences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


FORMS = ("count", "plural", "mass", "unique", "either")
# Exceptions: words whose initial vowel letter sounds like a consonant, and the reverse.
A_DESPITE_VOWEL = ("uni", "ufo", "eu", "one", "use", "uku")
AN_DESPITE_CONSONANT = ("hour", "honest", "heir", "x-ray")

PLAIN_WORDINGS = ("{noun}", "{bare}", "a picture of {noun}", "an emoji of {noun}", "{bare} emoji")
STYLED_WORDINGS = {
    "3d": ("{styled}", "{bare}, 3d emoji", "3d {bare}", "a 3d picture of {noun}", "{noun} in 3d"),
    "flat": ("{styled}", "{bare}, flat emoji", "flat {bare}", "a flat drawing of {noun}", "{noun} in flat style"),
    "gradient": ("{styled}", "{bare}, gradient emoji", "gradient {bare}", "{noun} with color gradients"),
    "noto": ("{styled}", "{bare}, noto emoji", "noto {bare}", "a noto emoji of {noun}", "{noun} in noto style"),
    "monochrome": (
        "{styled}",
        "{bare}, black and white emoji",
        "black and white {bare}",
        "a black and white drawing of {noun}",
        "{noun} in black and white",
    ),
    "twemoji": ("{styled}", "{bare}, twemoji emoji", "twemoji {bare}", "{noun} in twemoji style"),
    "clip art": ("clip art of {noun}", "{bare} clip art", "{bare}, clip art", "a clip art of {noun}"),
    "photo": ("a photo of {noun}", "a photograph of {noun}", "{bare}, photo", "photo of {noun}", "{bare} photo"),
    "plain": (),
}
STYLE_WORDS = {"monochrome": "black and white"}
# A user who asks an emoji model for "a cat" does not expect a black and white drawing or a photo.
STYLES_NAMED_ALWAYS = ("monochrome", "clip art", "photo")
SENTENCES = ("this is {phrase}", "here is {phrase}", "there is {phrase} in the picture", "the picture shows {phrase}")
KEYWORD_WORDINGS = ("{bare}, {keywords}", "{keywords}")
MAX_KEYWORDS = 3


@dataclass(frozen=True, kw_only=True)
class Noun:
    """A name to train on: the name in the source, the common name, and how it is inflected."""

    source_name: str
    name: str
    form: str = "count"
    synonyms: tuple[str, ...] = ()


def read_names(lines: Iterable[str]) -> list[Noun]:
    """Parse lines of `source name [= name] [; form] [; synonym, synonym]`, skipping empty lines and `#` comments.

    Raises:
        ValueError: if a form is unknown, or two nouns share a name or a synonym.
    """
    nouns = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split(";")] + ["", ""]
        source_name, _, name = (part.strip() for part in fields[0].partition("="))
        form = fields[1] or "count"
        if form not in FORMS or len(fields) > 5:
            raise ValueError(f"Cannot read the line {line.strip()!r}: the second field must be one of {FORMS}.")
        synonyms = tuple(synonym.strip() for synonym in fields[2].split(",") if synonym.strip())
        nouns.append(Noun(source_name=source_name, name=name or source_name.lower(), form=form, synonyms=synonyms))

    owner = {}
    for noun in nouns:
        for word in (noun.name, *noun.synonyms):
            if word in owner:
                raise ValueError(
                    f"{word!r} stands for both {owner[word]!r} and {noun.name!r}; assign it to one of them."
                )
            owner[word] = noun.name
    return nouns


def article_for(word: str) -> str:
    """Return `a` or `an`, by the sound of the first word as far as its spelling shows."""
    if word.startswith(AN_DESPITE_CONSONANT):
        return "an"
    is_vowel = word[0] in "aeiou" and not word.startswith(A_DESPITE_VOWEL)
    return "an" if is_vowel else "a"


def noun_phrases(word: str, form: str, style_word: str | None = None) -> list[str]:
    """Return the word with its articles, the best first: `a cat`, `a 3d cat`, `grapes`, `the sun`, `a sun`."""
    bare = word if style_word is None else f"{style_word} {word}"
    if form in ("plural", "mass"):
        return [bare]
    indefinite = f"{article_for(bare)} {bare}"
    if form == "either":  # unknown: train on both
        return [bare, indefinite]
    if form == "unique":
        # "the 3d sun" would sound odd: with a style it is one of several
        return [f"the {bare}", indefinite] if style_word is None else [indefinite]
    return [indefinite]


def make_captions(noun: Noun, style: str) -> list[str]:
    """Return distinct phrasings for one image, with and without its style, for its name and its synonyms."""
    plain = () if style in STYLES_NAMED_ALWAYS else PLAIN_WORDINGS
    captions = []
    for word in (noun.name, *noun.synonyms):
        styled = noun_phrases(word, noun.form, STYLE_WORDS.get(style, style))[0]
        for phrase in noun_phrases(word, noun.form):
            for wording in (*plain, *STYLED_WORDINGS[style]):
                captions.append(wording.format(noun=phrase, bare=word, styled=styled))
    return list(dict.fromkeys(captions))


def make_more_captions(noun: Noun, style: str, keywords: Sequence[str]) -> list[str]:
    """Return short sentences about the name, and the name with its first keywords; the style is named as above."""
    bare, phrase = noun.name, noun_phrases(noun.name, noun.form)[0]
    phrases = [] if style in STYLES_NAMED_ALWAYS else [phrase]
    for wording in STYLED_WORDINGS[style][:1]:
        phrases.append(wording.format(noun=phrase, bare=bare, styled=styled_phrase(noun, style)))
    captions = [sentence.format(phrase=phrase) for phrase in phrases for sentence in SENTENCES]
    listed = ", ".join([keyword.lower() for keyword in keywords if keyword.lower() != bare][:MAX_KEYWORDS])
    if listed:
        ending = f", {STYLE_WORDS.get(style, style)}" if style in STYLES_NAMED_ALWAYS else ""
        captions += [wording.format(bare=bare, keywords=listed) + ending for wording in KEYWORD_WORDINGS]
    return captions


def styled_phrase(noun: Noun, style: str) -> str:
    """Return the name with its style: `a 3d cat`, `3d grapes`."""
    return noun_phrases(noun.name, noun.form, STYLE_WORDS.get(style, style))[0]
