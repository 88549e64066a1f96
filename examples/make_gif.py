"""Watch a run as an animation, from the first noise to the finished picture."""

import argparse

from diffusers import DiffusionPipeline

from sd_progress import PreviewCallback, demo_model_path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--prompt", default="the sea at night with a full moon and a boat")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="denoise.gif", help="or .webp, .png (animated), .mp4")
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.model)
preview = PreviewCallback(pipe, args.out, initial=True, final=True)
pipe(args.prompt, num_inference_steps=args.steps, callback_on_step_end=preview)
print(f"{args.steps} steps, the noise before and the picture after them: {args.out}")
