"""A tab with a game: guess what an image shows from as few of its tokens as possible."""

import random
from dataclasses import dataclass, field

import gradio as gr

from ..utils.sheets import token_count_title
from .actions import DemoActions
from .components import answer, image_output, on, pass_on


MIN_NAMES = NUM_CHOICES = 4
RULES = "What is it? The fewer tokens you need, the better. `More tokens` doubles them."


@dataclass
class Riddle:
    """What one visitor is guessing, and how often they were right.

    Attributes:
        answer: the name that the image was generated from; empty before the first one.
        choices: this name and others.
        token_ids: all tokens of the image.
        count: how many of them are shown.
        is_open: whether there is no guess yet.
        right, asked: guesses so far.
        used: numbers of tokens that right guesses needed.
    """

    answer: str = ""
    choices: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    count: int = 1
    is_open: bool = False
    right: int = 0
    asked: int = 0
    used: list[int] = field(default_factory=list)

    def guess(self, choice: object) -> str:
        """Take a guess, and return what to say about it.

        Raises:
            ValueError: if there is nothing to guess, or nothing was chosen.
        """
        if not self.is_open:
            raise ValueError("Ask for a new image first.")
        if choice not in self.choices:
            raise ValueError("Choose one of the names first.")
        self.is_open, self.asked = False, self.asked + 1
        if choice == self.answer:
            self.right += 1
            self.used.append(self.count)
            verdict = f"**Right**, from {token_count_title(self.count)}."
        else:
            verdict = f"**No**, it is: {self.answer}."
        mean = f", {sum(self.used) / len(self.used):.1f} tokens on average" if self.used else ""
        return f"{verdict} {self.right} of {self.asked} right{mean}."


def new_riddle(actions: DemoActions, old: Riddle, source: random.Random) -> Riddle:
    """Return a riddle about a random name that the model knows; the score goes on."""
    choices = source.sample(actions.names, NUM_CHOICES)
    name = source.choice(choices)
    token_ids = actions.tokens_of_prompt(name, source.randrange(2**32))
    return Riddle(name, choices, token_ids, 1, True, old.right, old.asked, list(old.used))


def add_guess(actions: DemoActions) -> None:
    """Tab: an image from one token, buttons for more tokens, and names to choose from."""
    riddle = gr.State(Riddle())
    with gr.Row():
        with gr.Column(min_width=280):
            new = gr.Button("New image", variant="primary")
            more = gr.Button("More tokens")
            choice = pass_on(gr.Radio([], label="What is it?", elem_id="guess-choices"))
            check = gr.Button("Guess")
        with gr.Column(min_width=280, scale=2):
            facts = gr.Markdown(RULES, elem_id="guess-facts")
            image = image_output(actions, "From its first tokens", height=320)

    def show(state: Riddle):
        return state, actions.decode(state.token_ids[: state.count]), f"{token_count_title(state.count)}. {RULES}"

    def run_new(state):
        state = new_riddle(actions, state, random.Random())
        return *show(state), gr.update(choices=state.choices, value=None)

    def run_more(state):
        if not state.is_open:
            raise ValueError("Ask for a new image first.")
        state.count = min(2 * state.count, len(state.token_ids))
        return show(state)

    def run_guess(state, name):
        verdict = state.guess(name)
        return state, actions.decode(state.token_ids), verdict

    on(new.click, answer(run_new), [riddle], [riddle, image, facts, choice])
    on(more.click, answer(run_more), [riddle], [riddle, image, facts])
    on(check.click, answer(run_guess), [riddle, choice], [riddle, image, facts])
