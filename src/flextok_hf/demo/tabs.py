"""The tabs of the demo page, except the game."""

import html

import gradio as gr

from ..models.nested_dropout import token_ladder
from ..utils.sheets import token_count_title
from .actions import NUM_VARIATIONS, DemoActions
from .components import (
    answer,
    gallery_output,
    guidance_slider,
    image_output,
    note_list,
    number_input,
    on,
    pass_on,
    photo_examples,
    photo_input,
    progress_bar,
    seed_input,
    shape_input,
    token_slider,
)


def add_reconstruct(actions: DemoActions) -> None:
    """Tab: a photo, a slider over the number of tokens, original and reconstruction side by side."""
    with gr.Row():
        with gr.Column(min_width=280):
            photo = photo_input()
            count = token_slider(actions, "Tokens", actions.num_registers, "reconstruct-tokens")
            seed = seed_input()
            keeps_shape = shape_input(actions)
            button = gr.Button("Reconstruct", variant="primary")
            strip = gr.Button("From 1, 2, 4, ... tokens")
            examples = photo_examples(photo)
        with gr.Column(min_width=280, scale=2):
            with gr.Row():
                original = image_output(actions, "What the model sees")
                image = image_output(actions, "Reconstruction")
            facts = gr.Markdown(elem_id="reconstruct-facts")
            progress = gr.HTML(elem_id="reconstruct-progress")
            gallery = gallery_output(actions, "From few tokens to all")

    def run(path, num_tokens, seed, keeps):
        result = actions.reconstruct(path, num_tokens, seed, keeps)
        line = (
            f"**{token_count_title(result.num_tokens)}**, {result.bits:.0f} bits"
            f" ({result.bits / 8:.0f} bytes), PSNR {result.psnr_db:.1f} dB"
        )
        return result.original, result.image, line

    def run_all(path, seed, keeps):
        results = actions.reconstruct_all(path, seed, keeps)
        total = len(token_ladder(actions.num_registers))
        shown: list[tuple] = []
        yield progress_bar(0, total, "tokenizing the photo"), None, []
        for number, result in enumerate(results, start=1):
            title = token_count_title(result.num_tokens)
            shown.append((result.image, f"{title}, {result.psnr_db:.1f} dB"))
            yield progress_bar(number, total, title), result.original, list(shown)

    inputs, outputs = [photo, count, seed, keeps_shape], [original, image, facts]
    on(button.click, answer(run), inputs, outputs, api_name="reconstruct")
    on(photo.upload, answer(run), inputs, outputs)
    for event in examples:
        on(event.then, answer(run), inputs, outputs)
    on(strip.click, answer(run_all), [photo, seed, keeps_shape], [progress, original, gallery], show_progress="hidden")
    on(count.release, answer(run), inputs, outputs, trigger_mode="always_last")
    on(keeps_shape.input, answer(run), inputs, outputs)


def add_generate(actions: DemoActions) -> None:
    """Tab: a prompt; images appear as its tokens are generated, and can be gone through again afterwards."""
    frames = gr.State([])
    steps = len(token_ladder(actions.num_registers))
    with gr.Row():
        with gr.Column(min_width=280):
            prompt = gr.Textbox(label="Prompt", value="a cat", placeholder="a cat", max_lines=3)
            button = gr.Button("Generate", variant="primary")
            gr.Examples(["a cat", "a red apple", "a 3d rocket", "a castle"], prompt, label="Examples")
            count = token_slider(actions, "Maximum tokens", actions.num_registers, "generate-tokens")
            seed = seed_input()
            with gr.Accordion("Guidance", open=False):
                config, scales = actions.pipe.config, actions.pipe.decoder.config.guidance_range
                guidance = guidance_slider("Follow the tokens", config.default_guidance_scale, scales)
                prior_guidance = guidance_slider("Follow the prompt", config.default_prior_guidance_scale)
            if actions.names:
                with gr.Accordion(f"What this model knows: {len(actions.names):,} names", open=False):
                    gr.HTML(f'<div class="names" tabindex="0">{html.escape(", ".join(actions.names))}</div>')
        with gr.Column(min_width=280, scale=2):
            notes = gr.HTML(elem_id="generate-notes")
            progress = gr.HTML(elem_id="generate-progress")
            image = image_output(actions, "The image so far", height=320)
            scrub = pass_on(
                gr.Slider(1, steps, value=steps, step=1, label="Step: few tokens to many", elem_id="generate-scrub")
            )
            download = gr.DownloadButton("Download the animation", interactive=False)
            gallery = gallery_output(actions, "All steps")

    def run(text, max_tokens, seed, guidance_scale, prior_guidance_scale):
        images = actions.generate(text, max_tokens, seed, guidance_scale, prior_guidance_scale)
        total = len([step for step in token_ladder(actions.num_registers) if step < max_tokens]) + 1
        shown: list[tuple] = []
        yield progress_bar(0, total, "generating tokens"), None, [], note_list(actions.notes(text)), [], *waiting
        for number, num_tokens, image in images:
            title = token_count_title(num_tokens)
            shown.append((image, title))
            yield progress_bar(number, total, title), image, list(shown), gr.skip(), gr.skip(), *waiting
        path = actions.animation(shown, text)
        all_drawn = gr.update(maximum=max(total, 2), value=total), gr.update(value=path, interactive=True)
        yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), shown, *all_drawn

    waiting = gr.skip(), gr.update(interactive=False)

    def show_step(frames, step):
        if not frames:
            return gr.skip(), gr.skip()
        number = actions.check_step(step, len(frames))
        image, title = frames[number - 1]
        return image, progress_bar(number, len(frames), title)

    inputs = [prompt, count, seed, guidance, prior_guidance]
    outputs = [progress, image, gallery, notes, frames, scrub, download]
    on(button.click, answer(run), inputs, outputs, api_name="generate", show_progress="hidden")
    on(prompt.submit, answer(run), inputs, outputs, show_progress="hidden")
    hidden = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    scrub.input(answer(show_step), [frames, scrub], [image, progress], **hidden)


def add_vary(actions: DemoActions) -> None:
    """Tab: a photo, the number of tokens to keep, and images that share them."""
    with gr.Row():
        with gr.Column(min_width=280):
            photo = photo_input()
            keep = token_slider(actions, "Tokens to keep", min(4, actions.num_registers), "vary-tokens")
            prompt = gr.Textbox(label="Prompt (optional)", max_lines=3)
            seed = seed_input()
            keeps_shape = shape_input(actions)
            button = gr.Button("Vary", variant="primary")
            photo_examples(photo)
        with gr.Column(min_width=280, scale=2):
            notes = gr.HTML(elem_id="vary-notes")
            progress = gr.HTML(elem_id="vary-progress")
            gallery = gallery_output(actions, "The kept tokens, and four variations")

    def run(path, keep_tokens, text, seed, keeps):
        images = actions.vary(path, keep_tokens, text, seed, keeps)
        total = 1 + NUM_VARIATIONS
        shown: list[tuple] = []
        yield progress_bar(0, total, "tokenizing the photo"), [], note_list(actions.notes(text))
        for number, (title, image) in enumerate(images, start=1):
            shown.append((image, title))
            yield progress_bar(number, total, title), list(shown), gr.skip()

    inputs, outputs = [photo, keep, prompt, seed, keeps_shape], [progress, gallery, notes]
    on(button.click, answer(run), inputs, outputs, api_name="vary", show_progress="hidden")


def add_tokens(actions: DemoActions) -> None:
    """Tab: the token ids of an image with their digits; replace one and see where the image changes."""
    token_ids, size = gr.State([]), gr.State((None, None))
    levels = " x ".join(map(str, actions.pipe.encoder.quantizer.levels))
    gr.Markdown(f"Each token is one of {actions.pipe.codebook_size:,} codes: {levels} levels, shown as digits.")
    with gr.Row():
        with gr.Column(min_width=280):
            photo = photo_input()
            keeps_shape = shape_input(actions)
            read = gr.Button("Tokenize the photo")
            examples = photo_examples(photo)
            if actions.reads_prompts:
                prompt = gr.Textbox(label="Or a prompt", value="a cat", max_lines=3)
                write = gr.Button("Generate tokens for the prompt")
            seed = seed_input()
        with gr.Column(min_width=280):
            table = gr.Dataframe(
                headers=["token", "id", "digits"],
                datatype=["number", "number", "str"],
                type="array",
                interactive=False,
                max_height=360,
                label="Tokens (click one to replace it)",
                elem_id="token-table",
            )
            number = number_input(1, "Token to replace", 1, actions.num_registers)
            new_id = number_input(0, "New id", 0, actions.pipe.codebook_size - 1)
            replace = gr.Button("Replace", variant="primary")
        with gr.Column(min_width=280):
            before = image_output(actions, "Before")
            after = image_output(actions, "After")
            change = image_output(actions, "Difference: white where it is largest")
            change_facts = gr.Markdown(elem_id="tokens-facts")

    def show(ids, size, seed):
        return ids, size, actions.token_rows(ids), None, actions.decode(ids, seed, size), None, ""

    def run_read(path, seed, keeps):
        return show(*actions.tokens_of_photo(path, keeps), seed)

    def run_write(text, seed):
        return show(actions.tokens_of_prompt(text, seed), (None, None), seed)

    def run_replace(ids, size, place, token_id, seed):
        changed, old, new = actions.replace_token(ids, place, token_id, seed, size)
        gray, share = actions.difference(old, new)
        line = f"Token {int(place)} of {len(ids)} changed {share:.1%} of the brightness, on average over the image."
        return changed, size, actions.token_rows(changed), new, old, gray, line

    def choose(ids, event: gr.SelectData):
        place = event.index[0]
        return place + 1, ids[place] if place < len(ids) else 0

    outputs = [token_ids, size, table, after, before, change, change_facts]
    on(read.click, answer(run_read), [photo, seed, keeps_shape], outputs)
    on(photo.upload, answer(run_read), [photo, seed, keeps_shape], outputs)
    for event in examples:
        on(event.then, answer(run_read), [photo, seed, keeps_shape], outputs)
    if actions.reads_prompts:
        on(write.click, answer(run_write), [prompt, seed], outputs)
    on(replace.click, answer(run_replace), [token_ids, size, number, new_id, seed], outputs)
    table.select(choose, [token_ids], [number, new_id], queue=False, api_visibility="private")
