"""The words that a model was trained on: collected from its captions, and compared with a prompt."""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence


MAX_WORDS, MAX_NAMES = 10_000, 2_000  # kept of a data set, the most frequent ones
MAX_CAPTION_ROWS = 200_000  # read to collect them: a minute or so, for a data set of any size
MAX_CHARACTERS = 64  # of a word or name
MAX_NAME_WORDS = 3
MAX_SHOWN = 5  # unknown words in one message
ARTICLES = ("a", "an", "the")
NUM_NEAREST, MIN_SIMILARITY = 2, 0.65  # as `difflib` measures it: "skate" is just similar to "skateboard"


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case; an emoji or other symbol is a word of its own."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    spaced = "".join(_spaced(character) for character in text)
    return [word for word in (piece.strip("'-") for piece in spaced.split()) if word]


def _spaced(character: str) -> str:
    kind = unicodedata.category(character)
    is_selector = "\ufe00" <= character <= "\ufe0f"  # chooses between two forms of the symbol before it
    if kind[0] in "LN" or (kind in ("Mn", "Mc") and not is_selector) or character in "'-":
        return character
    return f" {character} " if kind == "So" else " "


def collect_words(rows: Iterable[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Collect what a data set is about.

    Args:
        rows: the captions of each image.

    Returns:
        Names, sorted: the shortest caption of each image without its article, if it has at most three words. Words of
        all captions, the most frequent first.
    """
    names: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for captions in rows:
        split = [split_words(caption) for caption in captions]
        for caption in split:
            words.update(caption)
        name = min(filter(None, split), key=lambda caption: (len(caption), len(" ".join(caption))), default=[])
        if len(name) > 1 and name[0] in ARTICLES:
            name = name[1:]
        if 0 < len(name) <= MAX_NAME_WORDS:
            names[" ".join(name)] += 1
    return sorted(_most_common(names, MAX_NAMES)), _most_common(words, MAX_WORDS)


def _most_common(counts: Counter[str], most: int) -> list[str]:
    order = sorted(counts, key=lambda text: (-counts[text], text))  # equal counts: always the same ones
    return [text for text in order if is_word(text)][:most]


def is_word(text: str) -> bool:
    """Whether a text can be shown as a word or name: without control characters, and not too long."""
    return 0 < len(text) <= MAX_CHARACTERS and text.isprintable()


def unknown_words(text: str, known: Collection[str]) -> list[str]:
    """Return the words of a text that are not in `known`, without repetitions; of a compound, each part may be."""
    words = dict.fromkeys(split_words(text))
    return [word for word in words if word not in known and not all(part in known for part in word.split("-"))]


def nearest(word: str, known: Sequence[str]) -> list[str]:
    """Return known words that are spelled like a word, or that name a symbol."""
    if len(word) == 1 and not word.isalnum():
        return [part for part in split_words(unicodedata.name(word, "")) if part in known][:NUM_NEAREST]
    if not 3 <= len(word) <= MAX_CHARACTERS:  # of shorter words, almost any is similar
        return []
    similar = difflib.get_close_matches(word, known, NUM_NEAREST, MIN_SIMILARITY)
    return [other for other in similar if other[0] == word[0]]  # misspellings seldom begin with another letter


def describe_unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """Say in one sentence that a model was not trained on some words, and which known ones are nearest."""
    parts = []
    for word in words[:MAX_SHOWN]:
        similar = ", ".join(repr(other) for other in nearest(word, known))
        parts.append(f"{word[:MAX_CHARACTERS]!r}" + (f" (nearest: {similar})" if similar else ""))
    more = f" and {len(words) - MAX_SHOWN} more words" if len(words) > MAX_SHOWN else ""
    return (
        f"The model knows no {', '.join(parts)}{more}: not in the captions it was trained on, so it may draw"
        " something else. `flextok info --names` lists what it knows."
    )
