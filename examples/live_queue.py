"""Use previews while the run goes on: a second thread takes them from a queue as they come."""

import argparse
import queue
import threading

from diffusers import DiffusionPipeline

from sd_progress import Frame, PreviewCallback, QueueWriter, demo_model_path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--prompt", default="a desert by day with palm trees and the sun")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

frames: queue.Queue[Frame | None] = queue.Queue(maxsize=4)  # full: the oldest makes room


def show_live() -> None:
    """Replace one picture on disk, as a web page or a window would show it."""
    while (frame := frames.get()) is not None:
        frame.image.resize((256, 256)).save("live.png")
        print(f"{frame.progress:4.0%}, {frame.eta_s or 0:.1f} s to go: live.png")


pipe = DiffusionPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
viewer = threading.Thread(target=show_live, daemon=True)
viewer.start()
preview = PreviewCallback(pipe, QueueWriter(frames, end=None))
pipe(args.prompt, num_inference_steps=args.steps, callback_on_step_end=preview)
viewer.join()
