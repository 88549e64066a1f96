"""The demo model in the package, and the scenes that it was trained on."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from sd_progress.factors import find

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "sd_progress" / "demo_model"
sys.path.insert(0, str(ROOT / "tools"))

from demo_scenes import (  # noqa: E402
    caption,
    describe,
    draw,
    facets,
    random_scene,
    vocabulary,
)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(MODEL)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_loads_with_plain_from_pretrained_and_without_a_warning(capfd):
    """What diffusers prints on loading is no more than its progress bars."""
    diffusers_logging.set_verbosity_warning()
    StableDiffusionPipeline.from_pretrained(MODEL)
    said = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in said if line and not line.startswith("Loading")] == []


def test_all_parts_are_loaded_in_float32(pipeline):
    """The weights are stored in half precision and computed with in single precision."""
    parts = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    assert {part.dtype for part in parts} == {torch.float32}


def test_the_weights_are_small_enough_for_a_package():
    """All weights together take at most 8 MB."""
    assert sum(file.stat().st_size for file in MODEL.rglob("*.safetensors")) <= 8_000_000


def test_four_steps_paint_a_picture(pipeline):
    """A 128x128 picture comes out that is neither flat nor broken."""
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a boat on the sea at sunset", num_inference_steps=4, generator=generator)
    pixels = np.asarray(image.images[0])
    assert pixels.shape == (128, 128, 3)
    assert pixels.std() > 20


def test_day_is_brighter_than_night(pipeline):
    """The model listens to its caption."""
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0)]
    pictures = pipeline(
        ["the sea by day", "the sea at night"], num_inference_steps=8, generator=seeds
    ).images
    day, night = (float(np.asarray(picture).mean()) for picture in pictures)
    assert day > night + 50


def test_the_sea_keeps_its_place_in_the_vae(pipeline):
    """A drawn scene survives the VAE at 30 dB or better."""
    drawn = torch.from_numpy(np.array(draw(random_scene(3_000_000)))).permute(2, 0, 1)[None]
    x = drawn / 127.5 - 1
    with torch.inference_mode():
        y = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample
    assert -10 * torch.log10((y.clamp(-1, 1) - x).pow(2).mean() / 4) > 30


def test_every_word_of_the_captions_is_one_token(pipeline):
    """The tokenizer falls back to letters for no word of the vocabulary."""
    ids = [pipeline.tokenizer(word).input_ids for word in vocabulary()]
    assert {len(tokens) for tokens in ids} == {3}  # start, the word, end
    assert len({tokens[1] for tokens in ids}) == len(ids)


def test_a_scene_number_is_always_the_same_picture():
    """Scenes are drawn from their number and nothing else."""
    random.seed(1)
    first = np.asarray(draw(random_scene(7)))
    random.seed(2)
    assert np.array_equal(first, np.asarray(draw(random_scene(7))))
    assert not np.array_equal(first, np.asarray(draw(random_scene(8))))


def test_a_caption_is_always_the_same_for_the_same_seed():
    """The wording depends on the random state that is handed in, and on nothing else."""
    scene = random_scene(7)
    texts = {caption(scene, random.Random(3)) for _ in range(3)}
    assert len(texts) == 1
    assert len({caption(scene, random.Random(seed)) for seed in range(20)}) > 10


def test_captions_use_the_vocabulary_only():
    """No word of a full caption is missing in the vocabulary that the tokenizer is made from."""
    known = set(vocabulary())
    rng = random.Random(0)
    texts = [describe(facets(random_scene(seed)), rng) for seed in range(300)]
    words = {word for text in texts for word in text.replace(",", " ").replace(".", " ").split()}
    assert words <= known
    assert len(words) > 100


def test_a_night_has_no_sun_and_a_day_no_moon():
    """Scenes are possible ones."""
    scenes = [random_scene(seed) for seed in range(500)]
    assert {s.light for s in scenes if s.time == "night"} == {"none", "full moon", "crescent moon"}
    assert {s.light for s in scenes if s.time != "night"} == {"none", "sun"}
    assert all(s.ground == "sea" for s in scenes if s.boat)


def test_its_vae_has_a_linear_map_of_its_own(pipeline):
    """The map was fitted for this VAE, is found by what the VAE is, and says how good it is."""
    found = find(pipeline.vae)
    assert found.name == "demo"
    assert found.psnr_db > 28
