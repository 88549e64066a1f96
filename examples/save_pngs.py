"""Watch a run as PNGs, one for each step, with the preview flags that any script can have."""

import argparse

from diffusers import DiffusionPipeline

from sd_progress import add_preview_arguments, demo_model_path, preview_from_args

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=demo_model_path(), help="a Hub id or a folder")
parser.add_argument("--prompt", default="a house in a meadow at dawn with trees")
parser.add_argument("--steps", type=int, default=20)
add_preview_arguments(parser)
parser.set_defaults(write_intermediates="steps")
args = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(args.model)
pipe(
    args.prompt,
    num_inference_steps=args.steps,
    callback_on_step_end=preview_from_args(pipe, args),
).images[0].save("house.png")
print(f"The steps are in {args.write_intermediates}/, the picture is house.png.")
