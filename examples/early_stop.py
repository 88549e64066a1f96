"""Stop a run when it has nothing more to show, or when you have seen enough; keep the picture."""

import argparse

from diffusers import DiffusionPipeline

from sd_progress import demo_model_path, stops, stream

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--prompt", default="the sea by day with the sun")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--enough", type=float, default=0.8, help="the share of the run to wait for")
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
reasons = [stops.is_not_finite, stops.no_change(levels=0.5)]  # or any function of a frame
done = 0
for frame in stream(pipe, prompt=args.prompt, num_inference_steps=args.steps, stop_when=reasons):
    if frame.source != "final":
        done = frame.step_index + 1
    if frame.progress >= args.enough:
        frame.stop()  # the pipeline finishes what the model expects at this step
frame.image.save("sea.png")
print(f"{done} of {args.steps} steps were enough: sea.png")
