"""Paint in the browser: the forming picture, its steps as a gallery, and a button to cancel."""

import argparse
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import gradio as gr
from diffusers import DiffusionPipeline
from PIL import ImageOps

from sd_progress import demo_model_path, stream

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()
pipe = DiffusionPipeline.from_pretrained(args.model)


def paint(prompt: str, steps: int) -> Iterator[tuple[str, list[str], str]]:
    """Gradio closes it when somebody cancels, or leaves the page, and that ends the run."""
    with TemporaryDirectory() as folder:
        shown: list[str] = []
        for frame in stream(pipe, prompt=prompt, num_inference_steps=steps):
            shown.append(f"{folder}/{len(shown):03}.png")
            ImageOps.contain(frame.image, (512, 512)).save(shown[-1])
            yield shown[-1], shown, f"{frame.progress:.0%}, {frame.eta_s or 0:.0f} s to go"


with gr.Blocks(title="sd-progress", analytics_enabled=False) as page:
    prompt = gr.Textbox("the sea at dawn with a boat", label="Prompt")
    steps = gr.Slider(1, 100, args.steps, step=1, label="Steps")
    with gr.Row():
        go, cancel = gr.Button("Paint", variant="primary"), gr.Button("Cancel")
        words = gr.Markdown()
    with gr.Row():
        views = [gr.Image(label="Now"), gr.Gallery(label="Steps", columns=4), words]
    run = gr.on([go.click, prompt.submit], paint, [prompt, steps], views, show_progress="hidden")
    cancel.click(None, cancels=run)
page.launch()
