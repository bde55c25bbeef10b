"""The page of `vqrae demo`: four tabs, wired to the functions next to it.

    serve(build_page(open_models(["runs/quickstart"])))

A handler is a generator of what its outputs show; a ValueError becomes the message of its tab.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from vqrae.data.scenes.dataset import SceneDataset
from vqrae.demo import codes as coding
from vqrae.demo import figures, talk
from vqrae.demo.models import Models
from vqrae.demo.visitors import MAX_IMAGES, public, read_text, read_uploads
from vqrae.generation.generator import Generator
from vqrae.tokenizer.modeling import VQRAEModel
from vqrae.understanding.chat import Chat, Session

TABS = {
    "Reconstruct": "tokenizer",
    "Understand": "chat",
    "Generate": "generator",
    "Edit codes": "tokenizer",
}
"""Titles, and the role of the model that each needs."""
ANSWER_SECONDS = 120.0
GENERATE_SECONDS = 300.0
IDLE_SECONDS = 3600  # after which what a visitor had is forgotten

Handler = Callable[..., Iterator[tuple]]


def build_page(models: Models) -> gr.Blocks:
    """The page; a tab whose model is missing cannot be opened, and a line says how to make it."""
    builders: dict[str, Callable] = {
        "Reconstruct": reconstruct_tab,
        "Understand": understand_tab,
        "Generate": generate_tab,
        "Edit codes": edit_tab,
    }
    missing = {title: models.missing(role) for title, role in TABS.items()}
    open_tabs = [title for title in TABS if not missing[title]]
    with gr.Blocks(title="vqrae demo", analytics_enabled=False) as page:
        gr.HTML(
            '<div class="head"><h1>One tokenizer, three jobs</h1><p>Continuous features for '
            "understanding, discrete codes for generation and reconstruction.</p></div>"
        )
        for title, why in missing.items():
            if why:
                gr.HTML(figures.remark(f"{title}: {why}"))
        with gr.Tabs(selected=open_tabs[0] if open_tabs else None):
            for title, build in builders.items():
                with gr.Tab(title, id=title, interactive=not missing[title]):
                    if not missing[title]:
                        build(page, getattr(models, TABS[title]))
    return page


def listen(
    event: Callable,
    handler: Handler,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    note: gr.HTML,
) -> Any:
    """Let a handler answer an event; what it refuses is told in `note`, and outputs stay."""

    @functools.wraps(handler)
    def told(*values: Any) -> Iterator[tuple]:
        try:
            for shown in handler(*values):
                yield *shown, ""
        except (ValueError, OSError, MemoryError) as error:
            yield *[gr.skip()] * len(outputs), figures.message(public(error))

    options: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
    options |= {"show_progress": "hidden", "api_visibility": "private"}
    return event(told, list(inputs), [*outputs, note], **options)


def clickable(value: str = "") -> gr.HTML:
    """HTML that sends `upload` with files, and `select` with patches."""
    script = (resources.files("vqrae.demo") / "page.js").read_text(encoding="utf-8")
    return gr.HTML(value, js_on_load=script)


def state(value: Any = None) -> gr.State:
    """What is remembered for one visitor."""
    return gr.State(value, time_to_live=IDLE_SECONDS)


@functools.cache
def scenes(size: int) -> SceneDataset:
    return SceneDataset("validation", image_size=size)


def scene(index: int, size: int) -> Image.Image:
    """A validation scene of the embedded data."""
    return Image.fromarray(scenes(size).pixels(index))


def reconstruct_tab(page: gr.Blocks, model: VQRAEModel) -> None:
    """Original, reconstruction, difference; a click on a patch shows its codes."""
    config = model.config

    def read(image: Image.Image) -> tuple:
        found = coding.read_image(model, image)
        hint = figures.remark(
            "Click a patch of the original to see its code and the nearest ones in the codebook."
        )
        return found, figures.reading(found), hint

    def show_scene(index: int) -> Iterator[tuple]:
        yield index + 1, *read(scene(index, config.image_size))

    def show_upload(event: gr.EventData) -> Iterator[tuple]:
        for image in read_uploads(event.files)[:1]:
            yield read(image)

    def show_patch(found: coding.Reading, event: gr.EventData) -> Iterator[tuple]:
        patch = event.patches[-1]
        near = coding.neighbors(model, found.codes, patch)
        text = figures.neighborhood(near, patch, config.grid_size)
        yield figures.reading(found, patch), text

    with gr.Row(equal_height=True):
        upload = clickable(figures.uploader("Choose an image, or drop one here"))
        another = gr.Button("Another scene")
    note = gr.HTML()
    view = clickable()
    near_view = gr.HTML()
    found, index = state(), state(0)
    shown = [found, view, near_view]
    listen(page.load, show_scene, [index], [index, *shown], note)
    listen(another.click, show_scene, [index], [index, *shown], note)
    listen(upload.upload, show_upload, [], shown, note)
    listen(view.select, show_patch, [found], [view, near_view], note)


def understand_tab(page: gr.Blocks, chat: Chat) -> None:
    """A conversation about images, answered word by word."""

    def add_scene(index: int, images: list[Image.Image]) -> Iterator[tuple]:
        yield index + 1, *add([*images, scene(index, 64)])

    def add_upload(images: list[Image.Image], event: gr.EventData) -> Iterator[tuple]:
        yield add([*images, *read_uploads(event.files)])

    def add(images: list[Image.Image]) -> tuple:
        if len(images) > MAX_IMAGES:
            raise ValueError(
                f"got {len(images)} images, expected at most {MAX_IMAGES}: ask about these first"
            )
        return images, figures.gallery(images)

    def ask(
        question: str, images: list[Image.Image], session: Session | None, turns: list
    ) -> Iterator[tuple]:
        question = read_text(question, "question")
        session = session or chat.session()
        asked = figures.gallery(images) + figures.safe(question)
        for text in talk.answer(session, question, images, seconds=ANSWER_SECONDS):
            now = [*turns, (asked, text)]
            yield question, images, "", session, turns, figures.talk(now)
        yield "", [], "", session, now, figures.talk(now) + figures.unknown(chat, question)

    def forget() -> Iterator[tuple]:
        yield "", [], "", None, [], ""

    note, view = gr.HTML(), gr.HTML(autoscroll=True, max_height=460)
    gallery = gr.HTML()
    with gr.Row(equal_height=True):
        upload = clickable(figures.uploader("Choose images, or drop some here", several=True))
        another = gr.Button("Add a scene")
    with gr.Row(equal_height=True):
        example = "how many things are there ?"
        question = gr.Textbox(placeholder=example, label="Question", scale=4)
        send = gr.Button("Ask", variant="primary", scale=1)
        clear = gr.Button("New conversation", scale=1)
    index, images = state(0), state([])
    session, turns = state(), state([])
    shown = [question, images, gallery, session, turns, view]
    listen(another.click, add_scene, [index, images], [index, images, gallery], note)
    listen(upload.upload, add_upload, [images], [images, gallery], note)
    for event in (send.click, question.submit):
        listen(event, ask, [question, images, session, turns], shown, note)
    listen(clear.click, forget, [], shown, note)


def generate_tab(page: gr.Blocks, generator: Generator) -> None:
    """Images of a prompt that appear code by code."""
    advised = generator.sampling

    def generate(
        prompt: str, seed: int | None, count: int, guidance: float, temperature: float
    ) -> Iterator[tuple]:
        prompt = read_text(prompt, "prompt")
        if seed is None:
            raise ValueError("got no seed: write a whole number")
        seeds = range(seed, seed + int(count))
        remarks = "".join(map(figures.remark, generator.encode_prompt.losses(prompt)))
        sampling = replace(advised, guidance_scale=guidance, temperature=temperature)
        frames = coding.generate(
            generator, prompt, seeds=seeds, sampling=sampling, seconds=GENERATE_SECONDS
        )
        for each in frames:
            yield (remarks + figures.frame(each, seeds),)

    with gr.Row(equal_height=True):
        example = "a photo of a red circle left of a blue star"
        prompt = gr.Textbox(label="Prompt", placeholder=example, scale=4)
        start = gr.Button("Generate", variant="primary", scale=1)
        stop = gr.Button("Stop", scale=1)
    with gr.Row():
        seed = gr.Number(0, label="First seed", precision=0)
        count = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images")
        highest = max(10.0, advised.guidance_scale)
        guidance = gr.Slider(
            1, highest, value=advised.guidance_scale, step=0.1, label="Guidance scale"
        )
        temperature = gr.Slider(0, 2, value=advised.temperature, step=0.05, label="Temperature")
    note, view = gr.HTML(), gr.HTML()
    given = [prompt, seed, count, guidance, temperature]
    running = [
        listen(event, generate, given, [view], note) for event in (start.click, prompt.submit)
    ]
    stop.click(None, cancels=running, api_visibility="private")


def edit_tab(page: gr.Blocks, model: VQRAEModel) -> None:
    """Codes that are picked up, painted and exchanged; each change is decoded at once."""

    def show(start: coding.Reading, codes: Tensor, held: int | None = None) -> tuple:
        changed = int((codes != start.codes).view(len(codes), -1).any(-1).sum())
        image = coding.decode(model, codes)
        view = figures.edited(start.reconstruction, image, codes, changed, held)
        return codes, held, view

    def begin(image: Image.Image) -> tuple:
        start = coding.read_image(model, image)
        brush = " ".join(map(str, coding.codes_at(start.codes, 0)))
        return start, *show(start, start.codes), brush

    def show_scene(index: int) -> Iterator[tuple]:
        yield index + 1, *begin(scene(index, model.config.image_size))

    def show_upload(event: gr.EventData) -> Iterator[tuple]:
        for image in read_uploads(event.files)[:1]:
            yield begin(image)

    def undo(start: coding.Reading) -> Iterator[tuple]:
        yield show(start, start.codes)

    def edit(
        tool: str,
        brush: str,
        start: coding.Reading,
        codes: Tensor,
        held: int | None,
        event: gr.EventData,
    ) -> Iterator[tuple]:
        patches = event.patches
        if tool == "Paint":
            codes = coding.paint(codes, patches, coding.read_brush(brush, model))
        elif tool == "Pick up":
            brush = " ".join(map(str, coding.codes_at(codes, patches[-1])))
        elif held is None and len(patches) == 1:
            coding.check_patches(codes, patches)
            yield *show(start, codes, patches[0]), brush
            return
        else:
            codes = coding.swap(codes, patches[0] if held is None else held, patches[-1])
        yield *show(start, codes), brush

    with gr.Row(equal_height=True):
        upload = clickable(figures.uploader("Choose an image, or drop one here"))
        another = gr.Button("Another scene")
        reset = gr.Button("Undo all")
    with gr.Row(equal_height=True):
        tool = gr.Radio(["Pick up", "Paint", "Swap"], value="Pick up", label="Click or drag to")
        number = model.config.num_codebooks
        label = "Code to paint with" if number == 1 else f"{number} codes to paint with"
        brush = gr.Textbox(label=label)
    note, view = gr.HTML(), clickable()
    index, start = state(1), state()
    codes, held = state(), state()
    shown = [codes, held, view]
    listen(page.load, show_scene, [index], [index, start, *shown, brush], note)
    listen(another.click, show_scene, [index], [index, start, *shown, brush], note)
    listen(upload.upload, show_upload, [], [start, *shown, brush], note)
    listen(reset.click, undo, [start], shown, note)
    listen(view.select, edit, [tool, brush, start, codes, held], [*shown, brush], note)
