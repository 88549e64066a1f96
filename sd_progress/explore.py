"""Owns the explorer's page: what can be seen and turned, and what is then computed elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, cast

try:
    import gradio as gr
except ModuleNotFoundError as missing:
    expected = "gradio must be installed to explore, got none"
    advice = 'pip install "sd-progress[app]"'
    raise ModuleNotFoundError(f"{expected}; {advice}", name=missing.name) from missing

from PIL import Image

from ._explorer_words import (
    CHOICES,
    WORDS,
    Language,
    complaint,
    language_of,
    normalisation_choices,
    numbers,
    verdict,
)
from .exploration import (
    DEMO,
    MAX_SIDE_PX,
    Encoded,
    Knobs,
    Model,
    Models,
    Normalisation,
    UnusableError,
    View,
    encoded,
    open_picture,
    sample,
    viewed,
)

__all__ = ["CSS", "build"]

CSS: Final = """
.sd-alert { color: #a82b2b; background: #fdecea; border-radius: 8px; padding: .7rem .9rem; }
.sd-wait { padding: .7rem .9rem; opacity: .75; }
.sd-picture img {
  width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated;
  padding-top: 2rem; box-sizing: border-box; /* below the label and the buttons */
}
.sd-numbers table { font-size: .85rem; }
.sd-numbers th, .sd-numbers td { padding: .2rem .5rem !important; word-break: normal; }
"""
_KEPT_S: Final = 3600  # what a tab has, after it is closed
_Component = TypeVar("_Component")


@dataclass(frozen=True, eq=False)
class _Tab:
    """What one visitor has before them.

    Attributes:
        model: the name of the model that is loaded.
        image: the picture; None before there is one.
        seen: what the model made of it.
        view: with the knobs as they are.
        error: why the last thing that was given will not do.
    """

    model: str
    image: Image.Image | None = None
    seen: Encoded | None = None
    view: View | None = None
    error: UnusableError | None = None


def build(
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    tiny: str | None = None,
    max_side_px: int = MAX_SIDE_PX,
) -> gr.Blocks:
    """The page, to be launched with `css=CSS`.

    Args:
        model: a Hub id or a folder, of a pipeline or a VAE; None is the demo model. Visitors may
            load others, of the Hub and of this machine.
        device: `"auto"`, or what `torch.device` takes.
        dtype: `"auto"`, `"fp32"`, `"fp16"` or `"bf16"`.
        tiny: the Hub id or the folder of a distilled decoder, shown for the VAEs that it fits.
        max_side_px: larger pictures are reduced.

    Raises:
        UsageError: there is no such distilled decoder.
        UnusableError: there is no such model.
    """
    models = Models(device, dtype, tiny=tiny)
    page = _Page(models, models.load(model or DEMO), max_side_px)
    return page.blocks


class _Page:
    """The components, and what happens when they are used, one at a time."""

    def __init__(self, models: Models, first: Model, max_side_px: int) -> None:
        self._models, self._max_side_px = models, max_side_px
        self._labelled: dict[str, gr.components.Component] = {}
        kept = (_KEPT_S, _KEPT_S)
        with gr.Blocks(title="sd-progress", analytics_enabled=False, delete_cache=kept) as blocks:
            self._tab = gr.State(_Tab(first.name), time_to_live=_KEPT_S)
            with gr.Row():
                self._put("title", gr.Markdown(WORDS["en"]["title"]))
                self._language = gr.Radio(
                    CHOICES, value="en", show_label=False, container=False, scale=0, min_width=200
                )
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    self._lay_out_inputs(first)
                with gr.Column(scale=2, min_width=500):
                    self._lay_out_views(has_tiny=first.tiny is not None)
            self._connect(blocks)
        self.blocks = blocks

    def _put(self, name: str, component: _Component) -> _Component:
        """It is labelled with the words of that name."""
        self._labelled[name] = component
        return component

    def _lay_out_inputs(self, first: Model) -> None:
        words = WORDS["en"]
        self._file = self._put("file", gr.File(label=words["file"], height=150))
        self._sample = self._put("sample", gr.Button(words["sample"], variant="primary"))
        with gr.Row():
            self._model = self._put("model", gr.Textbox(first.name, label=words["model"], scale=4))
            self._load = self._put("load", gr.Button(words["load"], scale=1, min_width=80))
        self._put("knobs", gr.Markdown(words["knobs"]))
        factor = self._put("factor", gr.Slider(0, 4, 1, step=0.05, label=words["factor"]))
        shift = self._put("shift", gr.Slider(-3, 3, 0, step=0.1, label=words["shift"]))
        normalisation = self._put(
            "normalisation",
            gr.Radio(normalisation_choices("en"), value="right", label=words["normalisation"]),
        )
        self._channels = self._put("channels", gr.CheckboxGroup(label=words["channels"]))
        gain = self._put("gain", gr.Slider(-1, 4, 0, step=0.1, label=words["gain"]))
        self._knobs = [factor, shift, normalisation, self._channels, gain]
        self._reset = self._put("reset", gr.Button(words["reset"]))

    def _lay_out_views(self, *, has_tiny: bool) -> None:
        self._told = gr.HTML(_told(_Tab(""), "en"))
        with gr.Row():
            self._views = [self._shown("picture"), self._shown("preview")]
            self._views.append(self._shown("tiny", visible=has_tiny))
        with gr.Row():
            self._views += [self._shown("decoded"), self._shown("difference")]
        with gr.Row():
            self._views.append(self._shown("sheet"))
            self._numbers = gr.Markdown(elem_classes="sd-numbers")

    def _shown(self, name: str, *, visible: bool = True) -> gr.Image:
        label = WORDS["en"][name]
        image = gr.Image(
            label=label,
            interactive=False,
            format="png",
            height=490 if name == "sheet" else 320,
            visible=visible,
            min_width=200,
            elem_id=f"sd-{name}",
            elem_classes="sd-picture",
            buttons=["download", "fullscreen"],
        )
        return self._put(name, image)

    def _connect(self, blocks: gr.Blocks) -> None:
        """One after the other: there is one device, and models are for one caller at a time."""
        asked = [self._tab, self._language, *self._knobs]
        answered = [self._tab, self._told, self._numbers, self._channels, *self._views]
        once = {"concurrency_id": "vae", "concurrency_limit": 1}
        taken = self._file.upload(self._take_file, [self._file, *asked], answered, **once)
        taken.then(lambda: None, None, self._file)  # there is room for the next
        self._sample.click(self._take_sample, asked, answered, **once)
        gr.on(
            [self._load.click, self._model.submit],
            self._take_model,
            [self._model, *asked],
            answered,
            **once,
        )
        turning = [knob.input for knob in self._knobs]
        last = {"trigger_mode": "always_last", "show_progress": "hidden"}
        gr.on(turning, self._turn, asked, answered, **last, **once)
        self._reset.click(_untouched, None, self._knobs).then(self._turn, asked, answered, **once)
        labelled = [*self._labelled.values(), self._told, self._numbers]
        self._language.input(self._speak, [self._language, self._tab], labelled)
        blocks.load(self._greet, self._tab, [self._language, *labelled])

    # --- what is computed

    def _take_file(
        self, path: str | None, tab: _Tab, language: Language, *knobs: object
    ) -> list[object]:
        try:
            if path is None:
                return self._answer(tab, language)
            image = open_picture(Path(path), self._max_side_px)
        except UnusableError as error:
            return self._answer(_refused(tab, error), language)
        return self._take(tab.model, image, tab, language, *knobs)

    def _take_sample(self, tab: _Tab, language: Language, *knobs: object) -> list[object]:
        return self._take(tab.model, sample(), tab, language, *knobs)

    def _take_model(self, name: str, tab: _Tab, language: Language, *knobs: object) -> list[object]:
        return self._take(name, tab.image, tab, language, *knobs)

    def _take(
        self,
        name: str,
        image: Image.Image | None,
        tab: _Tab,
        language: Language,
        *knobs: object,
    ) -> list[object]:
        """With another model or picture; what was there stays where they will not do."""
        try:
            model = self._models.load(name)
            if image is None:
                return self._answer(_Tab(model.name), language)
            seen = encoded(model, image)
            tab = _Tab(model.name, image, seen, viewed(model, seen, _knobs(knobs)))
        except UnusableError as error:
            tab = _refused(tab, error)
        return self._answer(tab, language)

    def _turn(self, tab: _Tab, language: Language, *knobs: object) -> list[object]:
        if tab.seen is None:
            return self._answer(tab, language)
        try:
            view = viewed(self._models.load(tab.model), tab.seen, _knobs(knobs))
            tab = _Tab(tab.model, tab.image, tab.seen, view)
        except UnusableError as error:
            tab = _refused(tab, error)
        return self._answer(tab, language)

    def _answer(self, tab: _Tab, language: Language) -> list[object]:
        """For all that is answered."""
        told, view = _told(tab, language), tab.view
        if view is None or tab.error is not None:
            return [tab, told, *[gr.skip()] * (2 + len(self._views))]
        channels = gr.update(choices=[(str(n), n) for n in range(len(view.statistics))])
        tiny = gr.update(value=view.tiny, visible=view.tiny is not None)
        pictures = [view.picture, view.preview, tiny, view.decoded, view.difference, view.channels]
        return [tab, told, _numbers(tab, language), channels, *pictures]

    # --- languages

    def _greet(self, tab: _Tab, request: gr.Request) -> list[object]:
        language = language_of(request.headers.get("accept-language", ""))
        return [language, *self._speak(language, tab)]

    def _speak(self, language: Language, tab: _Tab) -> list[object]:
        """All words anew."""
        updates = []
        for name, component in self._labelled.items():
            text = WORDS[language][name]
            if isinstance(component, gr.Markdown | gr.Button):
                updates.append(gr.update(value=text))
            elif name == "normalisation":
                updates.append(gr.update(label=text, choices=normalisation_choices(language)))
            else:
                updates.append(gr.update(label=text))
        return [*updates, _told(tab, language), _numbers(tab, language)]


def _knobs(values: Sequence[object]) -> Knobs:
    factor, shift, normalisation, channels, gain = values
    return Knobs(
        cast(float, factor),
        cast(float, shift),
        cast(Normalisation, normalisation),
        tuple(cast("list[int]", channels or [])),
        cast(float, gain),
    )


def _untouched() -> list[object]:
    knobs = Knobs()
    return [knobs.factor, knobs.shift, knobs.normalisation, [], knobs.gain]


def _refused(tab: _Tab, error: UnusableError) -> _Tab:
    """All as it was, and why."""
    return _Tab(tab.model, tab.image, tab.seen, tab.view, error)


def _told(tab: _Tab, language: Language) -> str:
    """What is wrong, or what to do, as HTML."""
    if tab.error is not None:
        text = html.escape(complaint(tab.error, language))
        return f'<p class="sd-alert" role="alert">{text}</p>'
    if tab.view is None:
        return f'<p class="sd-wait">{WORDS[language]["waiting"]}</p>'
    return ""


def _numbers(tab: _Tab, language: Language) -> str:
    if tab.seen is None or tab.view is None:
        return ""
    return f"{numbers(tab.seen, tab.view, language)}\n\n{verdict(tab.seen, language)}"
