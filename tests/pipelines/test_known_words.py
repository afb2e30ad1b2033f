"""Words that a model was trained on: collected, saved with it, listed, and warned about in prompts."""

import json
import logging

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_models import make_class_pipeline, make_prior, make_text_pipeline

from flextok_hf import FlexTokPipeline, FlexTokPriorConfig, cli, embedded_model
from flextok_hf.pipelines.known_words import known_names
from flextok_hf.utils.words import MAX_WORDS, collect_words, nearest, split_words, unknown_words


ROWS = [["a red circle", "red circle on white"], ["a dog"], ["a cat face", "cat face emoji"], [], [""]]
NAMES, WORDS = collect_words(ROWS)


@pytest.fixture
def pipe() -> FlexTokPipeline:
    pipe = make_text_pipeline()
    pipe.prior.config.known_names, pipe.prior.config.known_words = NAMES, WORDS
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def embedded() -> FlexTokPipeline:
    pipe = FlexTokPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def warnings_of(caplog, pipe: FlexTokPipeline, prompt, **options) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flextok_hf"):
        pipe.generate_tokens(prompt, max_tokens=1, **options)
    return [record.getMessage() for record in caplog.records]


def test_names_are_the_shortest_captions_without_their_article():
    assert NAMES == ["cat face", "dog", "red circle"]


def test_words_come_by_frequency_and_equal_ones_in_their_order():
    assert WORDS == ["a", "cat", "circle", "face", "red", "dog", "emoji", "on", "white"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Cat, a T-Shirt!", ["a", "cat", "a", "t-shirt"]),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t - 'stop'", ["don't", "stop"]),
        ("Stra\N{LATIN SMALL LETTER SHARP S}e", ["strasse"]),
        ("\N{CAT FACE}\N{BLACK SUN WITH RAYS}\N{VARIATION SELECTOR-16}", ["\N{CAT FACE}", "\N{BLACK SUN WITH RAYS}"]),
        ("", []),
    ],
)
def test_texts_are_split_into_words(text, words):
    assert split_words(text) == words


def test_a_compound_is_known_by_its_parts():
    assert unknown_words("red-white cat-house", {"red", "white", "cat"}) == ["cat-house"]


def test_a_symbol_is_near_the_words_of_its_name():
    assert nearest("\N{CAT FACE}", WORDS) == ["cat", "face"]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a dog on a skateboard", ["'skateboard' (nearest: 'skate')"]),
        ("ein Hund", ["'ein'", "'hund'"]),
        ("a \N{CAT FACE}", ["(nearest: 'cat', 'face')"]),
        (" ".join(["a cat that sits"] * 50), ["only the first 48 are used", "'sits'"]),
    ],
)
def test_the_embedded_model_warns_of_what_it_does_not_know(caplog, embedded, prompt, parts):
    messages = " ".join(warnings_of(caplog, embedded, prompt))
    assert all(part in messages for part in parts)


def test_the_embedded_model_does_not_warn_of_prompts_of_its_own(caplog, embedded):
    prompts = [f"a {name}" for name in embedded.prior.config.known_names] + ["a photo of a leopard", "A 3D cat"]
    assert [embedded.prompt_notes(prompt) for prompt in prompts] == [[]] * len(prompts)


def test_the_embedded_model_lists_the_names_of_its_recipe(embedded):
    assert {"cat", "statue of liberty", "leopard photo"} <= set(embedded.prior.config.known_names)


def test_a_word_is_warned_about_once(caplog, pipe):
    counts = [len(warnings_of(caplog, pipe, prompt)) for prompt in ("a bird", "a bird", "a bird and a fish")]
    assert counts == [1, 0, 1]


def test_negative_prompts_are_warned_about_too(caplog, pipe):
    assert "'blur'" in warnings_of(caplog, pipe, "a dog", negative_prompt="blur")[0]


def test_notes_can_be_asked_for_again(pipe):
    assert pipe.prompt_notes("a bird") == pipe.prompt_notes(["a bird"]) != []


def test_a_model_without_words_never_warns(caplog):
    assert warnings_of(caplog, make_text_pipeline(), "ein Hund \N{CAT FACE}") == []


def test_words_survive_saving(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    config = FlexTokPipeline.from_pretrained(tmp_path).prior.config
    assert (config.known_names, config.known_words) == (NAMES, WORDS)


@pytest.mark.parametrize("words", [["a\x1b[2J"], [""], ["x" * 65], ["a"] * (MAX_WORDS + 1), [3], "cat", {"a": 1}])
@pytest.mark.parametrize("name", ["known_names", "known_words"])
def test_words_of_strangers_are_checked(name, words):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=name):
        FlexTokPriorConfig(**{name: words})


def test_class_names_are_listed():
    assert known_names(make_class_pipeline().prior)["classes"] == [str(number) for number in range(3)]


def test_class_names_that_could_take_over_a_terminal_are_shown_escaped():
    prior = make_prior(num_classes=2, text_hidden_size=None)
    prior.config.id2label = {0: "cat", 1: "\x1b[2J"}
    assert known_names(prior)["classes"] == ["cat", r"'\x1b[2J'"]


def test_the_command_line_lists_what_a_model_knows(tmp_path, capsys, pipe):
    pipe.save_pretrained(tmp_path)
    assert cli.main(["info", "--names", "--json", "--model", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"names": NAMES, "other_words": ["a", "emoji", "on", "white"]}


def test_the_command_line_says_that_a_model_does_not_tell(tmp_path, capsys):
    make_text_pipeline().save_pretrained(tmp_path)
    assert cli.main(["info", "--names", "--model", str(tmp_path)]) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
