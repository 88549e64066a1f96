"""Take the previews of a run as a generator yields them; the last frame has the result."""

import argparse

from diffusers import DiffusionPipeline

from sd_progress import demo_model_path, stream

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--prompt", default="a desert at sunset with palm trees")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.model)
for frame in stream(pipe, prompt=args.prompt, num_inference_steps=args.steps):
    print(f"{frame.progress:4.0%}  {frame.source}, {frame.image.width} pixels wide")
frame.image.save("desert.png")  # the finished picture; frame.output is what the pipeline returned
