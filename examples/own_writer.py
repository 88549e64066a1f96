"""Write previews your own way: anything with `write` and `close` is a writer."""

import argparse

import numpy as np
from diffusers import DiffusionPipeline

from sd_progress import Frame, PreviewCallback, demo_model_path

SHADES = np.array(list(" .:-=+*#%@"))


class AsciiWriter:
    """Paints every frame into the terminal, in place, in letters."""

    def write(self, frame: Frame) -> None:
        """Called for each frame, in a thread of its own."""
        grey = np.asarray(frame.image.convert("L").resize((64, 28)), dtype=int)
        letters = SHADES[grey * len(SHADES) // 256]
        print("\033[H\033[2J" + "\n".join("".join(row) for row in letters))
        print(f"step {frame.step_index + 1} of {frame.num_steps}, made by {frame.decoder}")

    def close(self) -> None:
        """Called at the end of the run, also of one that failed."""
        print("That was it.")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--prompt", default="snowy mountains by the sea at sunset with the sun")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
preview = PreviewCallback(pipe, AsciiWriter(), final=True)
pipe(args.prompt, num_inference_steps=args.steps, callback_on_step_end=preview)
