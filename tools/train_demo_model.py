"""Train the demo model: a whole little StableDiffusionPipeline, from nothing, on two CPU cores.

First the VAE on drawn scenes, then the UNet and the text encoder together on their latents, then
everything is saved in diffusers' own format. Each stage has its time; interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from demo_scenes import SIZE, caption, draw, random_scene, vocabulary
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_progress.synthetic import dead_leaves

HELD_OUT: Final = 1_000_000  # scenes from this number on are never trained on


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out, from the command line."""

    work: Path
    out: Path
    start: Path | None
    scenes: int
    vae_minutes: float
    unet_minutes: float
    device: str
    workers: int
    seed: int


# ---- data -------------------------------------------------------------------------------------


def pixels(seed: int) -> np.ndarray:
    """The picture of a scene: (H, W, 3) uint8."""
    return np.asarray(draw(random_scene(seed)))


def drawn_scenes(settings: Settings) -> Tensor:
    """All training pictures, drawn once and kept in a file: (scenes, 3, H, W) uint8."""
    path = settings.work / f"scenes-{settings.scenes}.npy"
    if not path.exists():
        pictures = np.empty((settings.scenes, SIZE, SIZE, 3), np.uint8)
        with multiprocessing.Pool() as pool:
            drawn = pool.imap(pixels, range(settings.scenes), chunksize=64)
            for index, picture in enumerate(tqdm(drawn, "draw", settings.scenes, mininterval=2)):
                pictures[index] = picture
        _replace(path, lambda file: _save_array(file, pictures))
    return torch.from_numpy(np.load(path, mmap_mode="c")).permute(0, 3, 1, 2)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would add a suffix to it
        np.save(file, array)


def held_out_pictures(count: int) -> Tensor:
    """Pictures that no stage trains on: (count, 3, H, W) float in [-1, 1]."""
    stack = np.stack([pixels(HELD_OUT + index) for index in range(count)])
    return to_float(torch.from_numpy(stack).permute(0, 3, 1, 2))


def to_float(pictures: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def save_grid(path: Path, pictures: Tensor, columns: int = 8) -> None:
    """Write (B, 3, H, W) in [-1, 1] as one PNG."""
    rows = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    height = math.ceil(len(rows) / columns)
    grid = Image.new("RGB", (columns * (SIZE + 4), height * (SIZE + 4)), "white")
    for index, picture in enumerate(rows):
        corner = index % columns * (SIZE + 4) + 2, index // columns * (SIZE + 4) + 2
        grid.paste(Image.fromarray(picture), corner)
    grid.save(path)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a sibling and rename it, so that a killed run leaves the old file or the new one."""
    sibling = path.with_name(path.name + ".part")
    write(sibling)
    sibling.replace(path)


# ---- workers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """One of several equal processes, which meet once per step to average their gradients.

    One process with several threads would meet in every operation instead, hundreds of times a
    step, which is slow to a crawl on cores that are shared with other people.
    """

    rank: int
    count: int

    @property
    def leads(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all workers."""
        flat = torch.cat([value.flatten().float() for value in values])
        if self.count > 1:
            dist.all_reduce(flat)
        flat /= self.count
        ends = np.cumsum([value.numel() for value in values])
        parts = torch.tensor_split(flat, ends[:-1].tolist())
        return [part.view_as(value) for part, value in zip(parts, values, strict=True)]

    def wait(self) -> None:
        """Go on when all workers have come this far."""
        if self.count > 1:
            dist.barrier()


# ---- one training loop for both stages --------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What differs between the two stages; `loss` is given the share of the budget gone by."""

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[float, torch.Generator], Tensor]
    report: Callable[[Path], str]
    minutes: float
    learning_rate: float
    ema_decay: float


CHECKPOINT_EVERY_S: Final = 120.0
REPORT_EVERY_S: Final = 360.0
WARM_UP_STEPS: Final = 200


class Training:
    """A stage under way: the optimizer, the averaged weights, and how far it has come."""

    def __init__(self, stage: Stage, settings: Settings, worker: Worker) -> None:
        """Start, or go on from the stage's checkpoint if there is one."""
        self.stage, self.settings, self.worker = stage, settings, worker
        self.path = settings.work / f"{stage.name}.pt"
        self.optimizer = torch.optim.AdamW(
            stage.parameters, stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.ema = EMAModel(
            stage.parameters, decay=stage.ema_decay, use_ema_warmup=True, power=0.75
        )
        self.ema.to(settings.device)
        self.generator = torch.Generator()
        self.step, self.spent_s = 0, 0.0
        self.last_meeting = time.monotonic()
        if self.path.exists():
            self._load()

    def take_step(self) -> float:
        """One step of all workers together; the mean loss.

        The learning rate follows the clock (warm-up, then a cosine to zero at the end of the
        budget), so that a slow machine ends as well annealed as a fast one.
        """
        share = min(self.spent_s / (self.stage.minutes * 60), 1.0)
        rate = min(1.0, (self.step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * rate
        draw_number = (self.settings.seed << 32) + self.step * self.worker.count + self.worker.rank
        self.generator.manual_seed(draw_number)
        with torch.autocast(torch.device(self.settings.device).type, torch.bfloat16):
            loss = self.stage.loss(share, self.generator)
        own = torch.autograd.grad(loss, self.stage.parameters)
        began, self.last_meeting = self.last_meeting, time.monotonic()
        taken = torch.tensor(self.last_meeting - began, device=loss.device)
        *gradients, loss, taken = self.worker.average([*own, loss.detach(), taken])
        for parameter, gradient in zip(self.stage.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.stage.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.stage.parameters)
        self.step += 1
        self.spent_s += float(taken)
        return float(loss)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "parameters": [p.detach() for p in self.stage.parameters],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "spent_s": self.spent_s,
        }
        _replace(self.path, lambda file: torch.save(state, file))

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.settings.device, weights_only=True)
        with torch.no_grad():
            for mine, saved in zip(self.stage.parameters, state["parameters"], strict=True):
                mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.settings.device)
        self.step, self.spent_s = state["step"], state["spent_s"]

    def report(self) -> str:
        """A picture grid of the averaged weights, and a line that says how good they are."""
        minutes = self.spent_s / 60
        self.ema.store(self.stage.parameters)
        self.ema.copy_to(self.stage.parameters)
        said = self.stage.report(self.settings.work / f"{self.stage.name}-{minutes:03.0f}.png")
        self.ema.restore(self.stage.parameters)
        return f"{self.stage.name} {minutes:.1f} min, step {self.step}: {said}"


def train(stage: Stage, settings: Settings, worker: Worker) -> None:
    """Train for the stage's time, with checkpoints and reports; leave the averaged weights in."""
    training = Training(stage, settings, worker)
    budget_s = stage.minutes * 60
    checkpoint_at = training.spent_s + CHECKPOINT_EVERY_S
    report_at = training.spent_s + 60
    with tqdm(
        total=round(budget_s), desc=stage.name, unit="s", mininterval=5, disable=not worker.leads
    ) as bar:
        while training.spent_s < budget_s:
            loss = training.take_step()
            bar.set_postfix(step=training.step, loss=f"{loss:.4f}", refresh=False)
            bar.update(min(round(training.spent_s), bar.total) - bar.n)
            if worker.leads and training.spent_s >= min(checkpoint_at, budget_s):
                training.save()
                checkpoint_at = training.spent_s + CHECKPOINT_EVERY_S
            if worker.leads and training.spent_s >= min(report_at, budget_s):
                bar.write(training.report())
                report_at = training.spent_s + REPORT_EVERY_S
    training.ema.copy_to(stage.parameters)
    worker.wait()


# ---- stage 1: the VAE -------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """128x128 pixels to 4x16x16 latents and back, in 1.1 million parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 80),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        latent_channels=4,
        sample_size=SIZE,
        force_upcast=False,
    )


LINEAR_KERNEL: Final = 5
LEAVES: Final = 2048  # synthetic pictures, so that the latents are as linear for what is no scene
LEAVES_COUNT_FOR: Final = 0.4  # of a scene


def new_linear_map() -> nn.Conv2d:
    """4 latents of a neighbourhood to one small pixel: what a linear preview can see."""
    return nn.Conv2d(4, 3, LINEAR_KERNEL, padding=LINEAR_KERNEL // 2, padding_mode="replicate")


def train_vae(settings: Settings, worker: Worker, pictures: Tensor) -> AutoencoderKL:
    """L1 + L2 + a little KL, on columns as high as the picture, on whole pictures at the end.

    A linear map from the latents to the picture, eight times smaller, is trained with it: large
    VAEs have nearly linear latents by themselves, one this small would keep its colours in the
    context, and its linear previews would be muddy.
    """
    vae, linear = new_vae(), new_linear_map().to(settings.device)
    if settings.start is not None:
        vae = AutoencoderKL.from_pretrained(settings.start, subfolder="vae")
    vae = vae.to(settings.device).train()
    held_out = held_out_pictures(64).to(settings.device)
    leaves = dead_leaves(LEAVES, SIZE, torch.Generator().manual_seed(settings.seed))

    def loss(share: float, generator: torch.Generator) -> Tensor:
        width, batch = (SIZE // 2, 4) if share < 0.7 else (SIZE, 4)
        batch = max(1, batch // settings.workers)
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        row = torch.randint(len(leaves), (1,), generator=generator)
        left = int(torch.randint(SIZE - width + 1, (), generator=generator))
        columns = slice(left, left + width)
        crops = to_float(pictures[rows, :, :, columns])
        x = torch.cat([crops, leaves[row, :, :, columns]]).to(settings.device)
        counts = torch.tensor([1.0] * batch + [LEAVES_COUNT_FOR], device=x.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        latents = posterior.mean + posterior.std * noise
        missing = vae.decode(latents).sample.float() - x
        missing_small = linear(latents).float() - F.avg_pool2d(x, 8)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
        error = (missing.abs() + 3 * missing.square()).mean((1, 2, 3))
        error = error + missing_small.square().mean((1, 2, 3)) + 1e-4 * kl.mean((1, 2, 3))
        return (counts * error).sum() / batch

    @torch.no_grad()
    def report(path: Path) -> str:
        latents = vae.encode(held_out).latent_dist.mean
        again, small = vae.decode(latents).sample, linear(latents)
        enlarged = F.interpolate(small, scale_factor=8)
        triples = torch.stack([held_out[:24], again[:24], enlarged[:24]], 1).flatten(0, 1)
        save_grid(path, triples, columns=9)
        seen = psnr(F.avg_pool2d(again, 8), small)
        return f"held-out {psnr(held_out, again):.2f} dB, linear map {seen:.2f} dB"

    parameters = [*vae.parameters(), *linear.parameters()]
    stage = Stage("vae", parameters, loss, report, settings.vae_minutes, 2e-3, 0.998)
    train(stage, settings, worker)
    return vae.eval()


def psnr(pictures: Tensor, again: Tensor) -> float:
    """Mean over the pictures of the peak signal-to-noise ratio in dB, both in [-1, 1]."""
    error = (pictures - again.clamp(-1, 1)).pow(2).flatten(1).mean(1) / 4
    return float((-10 * error.log10()).mean())


# ---- stage 2: the UNet and the text encoder ---------------------------------------------------

TOKENS: Final = 48
CAPTIONS_PER_SCENE: Final = 8
CAPTION_DROPOUT: Final = 0.1
BATCH: Final = 32
SAMPLED_CAPTIONS: Final = (
    "a house by the sea at sunset with mountains and a boat",
    "a full moon and stars over a meadow at night with pine trees",
    "palm trees in the desert by day, the sun",
    "snowy mountains at dawn, a house in a green meadow",
    "a sailing boat on the sea at noon, clouds",
    "night, crescent moon, sea, house, stars",
    "a cottage among round trees in the morning",
    "the ocean at dusk under a cloudy sky",
)


def new_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token; the rest falls to bytes."""
    byte_letters = pre_tokenizers.ByteLevel.alphabet()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(
        [" ".join(vocabulary())],
        trainers.BpeTrainer(
            vocab_size=10_000,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=sorted(byte_letters),
            end_of_word_suffix="</w>",
        ),
    )
    model = json.loads(learner.to_str())["model"]
    every_byte = [*sorted(byte_letters), *(letter + "</w>" for letter in sorted(byte_letters))]
    tokens = [*every_byte, *(t for t in model["vocab"] if t not in set(every_byte))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=TOKENS,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """48 tokens to 48 vectors of 96, in a fifth of a million parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """4x16x16 latents, attention at 8x8 only, in 2.4 million parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,  # diffusers means the number of heads
        cross_attention_dim=96,
        time_embedding_dim=128,
    )


NOISE: Final = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",  # ends at a signal-to-noise ratio of 4e-5, so nights can be dark
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
}


def tokenised_captions(settings: Settings, tokenizer: CLIPTokenizer) -> Tensor:
    """Several captions of every training scene: (scenes, captions, TOKENS) int64."""
    texts = []
    for seed in range(settings.scenes):
        rng = random.Random(f"captions {seed}")
        texts += [caption(random_scene(seed), rng) for _ in range(CAPTIONS_PER_SCENE)]
    return tokenise(tokenizer, texts).view(settings.scenes, CAPTIONS_PER_SCENE, TOKENS)


def tokenise(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers as the pipeline makes them: (B, TOKENS) int64."""
    padded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = padded.input_ids
    return ids


@torch.no_grad()
def encoded_scenes(
    settings: Settings, worker: Worker, vae: AutoencoderKL, pictures: Tensor
) -> Tensor:
    """Latents of all pictures and their mirror images, once: (2, scenes, 4, 16, 16), scaled."""
    batches = torch.tensor_split(pictures, max(1, len(pictures) // 50))
    paths = [settings.work / f"latents-{index:04}.pt" for index in range(len(batches))]
    mine = range(worker.rank, len(batches), worker.count)
    for index in tqdm(mine, "encode", mininterval=5, disable=not worker.leads):
        if not paths[index].exists():
            x = to_float(batches[index])
            x = x.to(settings.device)
            means = torch.stack([vae.encode(y).latent_dist.mean.cpu() for y in (x, x.flip(-1))])
            _replace(paths[index], partial(torch.save, means))
    worker.wait()
    latents = torch.cat([torch.load(path, weights_only=True) for path in paths], 1)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def train_unet(
    settings: Settings, worker: Worker, vae: AutoencoderKL, pictures: Tensor
) -> StableDiffusionPipeline:
    """Velocity prediction on cached latents, with captions dropped for guidance."""
    pipeline = new_pipeline(vae, settings.start).to(settings.device)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    latents = encoded_scenes(settings, worker, vae, pictures)
    captions = tokenised_captions(settings, pipeline.tokenizer)
    nothing = tokenise(pipeline.tokenizer, [""])
    noising = DDPMScheduler(**NOISE)
    unet.train().set_attn_processor(AttnProcessor())  # on a CPU, 1.5 times as fast as the fused one
    text_encoder.train().set_attn_implementation("eager")

    def loss(share: float, generator: torch.Generator) -> Tensor:
        batch = BATCH // settings.workers
        rows = torch.randint(settings.scenes, (batch,), generator=generator)
        mirrored = torch.randint(2, (batch,), generator=generator)  # captions know no sides
        version = torch.randint(CAPTIONS_PER_SCENE, (batch,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped, nothing, captions[rows, version]).to(settings.device)
        x = latents[mirrored, rows].to(settings.device)
        noise = torch.randn(x.shape, generator=generator).to(settings.device)
        share_of_t = torch.arange(batch) + torch.rand(batch, generator=generator)
        t = (share_of_t * (1000 / batch)).long().to(settings.device)
        states = text_encoder(ids).last_hidden_state
        predicted = unet(noising.add_noise(x, noise, t), t, states).sample.float()
        error = F.mse_loss(predicted, noising.get_velocity(x, noise, t), reduction="none")
        return (error.mean((1, 2, 3)) * weight(noising, t)).mean()

    def report(path: Path) -> str:
        started = time.monotonic()
        pictures = sample(pipeline, [text for text in SAMPLED_CAPTIONS for _ in range(2)])
        save_grid(path, pictures)
        return f"{len(pictures)} pictures in {time.monotonic() - started:.1f} s"

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    stage = Stage("unet", parameters, loss, report, settings.unet_minutes, 1e-3, 0.9995)
    train(stage, settings, worker)
    return pipeline


def weight(noising: DDPMScheduler, t: Tensor) -> Tensor:
    """Count the nearly clean pictures less: as min-SNR does, but keeping the noisiest at one."""
    kept: Tensor = noising.alphas_cumprod[t.cpu()].to(t.device)
    return (6 * (1 - kept)).clamp(max=1.0)  # velocity error: min(1, 6 / (SNR + 1))


def new_scheduler() -> DPMSolverMultistepScheduler:
    """The default scheduler; its config also suits what others are made of it by `from_config`."""
    for_others = {"clip_sample": False, "skip_prk_steps": True, "steps_offset": 1}
    # steps at more noise than a log-SNR of -4 would change nothing that can be seen
    spacing = {"timestep_spacing": "linspace", "lambda_min_clipped": -2.0}
    config = {**NOISE, **for_others, **spacing}
    return DPMSolverMultistepScheduler.from_config(config)


def new_pipeline(vae: AutoencoderKL, start: Path | None) -> StableDiffusionPipeline:
    """A pipeline around a trained VAE, untrained or with the weights of another."""
    tokenizer = new_tokenizer()
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    if start is not None:
        unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet")
        text_encoder = CLIPTextModel.from_pretrained(start, subfolder="text_encoder")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Paint captions with the default scheduler in 20 steps: (B, 3, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(captions), 4, SIZE // 8, SIZE // 8, generator=generator)
    images: Tensor = pipeline(
        captions,
        num_inference_steps=20,
        latents=latents.to(pipeline.device),
        output_type="pt",
    ).images
    return images * 2 - 1


# ---- stage 3: export --------------------------------------------------------------------------


def export(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Save in float16, in diffusers' own format; plain `from_pretrained` loads it in float32."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.eval().cpu().half()
    pipeline.save_pretrained(out, safe_serialization=True)
    for config_file in out.glob("*/config.json"):
        config = json.loads(config_file.read_text())
        config.pop("_name_or_path", None)  # of the machine that it was trained on
        if config_file.parent.name == "text_encoder":
            config["dtype"] = "float32"  # else loaded as saved
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    pipeline.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))  # transformers 4
    weights = list(out.rglob("*.safetensors"))
    for file in weights:
        file.chmod(0o644)
    print(f"saved {out}: {sum(file.stat().st_size for file in weights) / 1e6:.2f} MB of weights")


# ---- command line -----------------------------------------------------------------------------

EXAMPLES: Final = """\
examples:
  two CPU cores, about two hours, politely:
    nice -n 5 python tools/train_demo_model.py --work demo-training
  one GPU:
    python tools/train_demo_model.py --work demo-training --device cuda --workers 1 \\
        --vae-minutes 5 --unet-minutes 5
  does it run at all? (two minutes; the pictures will be mud)
    python tools/train_demo_model.py --work try --out try/model --scenes 300 \\
        --vae-minutes 0.5 --unet-minutes 0.5

Interrupt it when you like: the same command goes on from the last checkpoint (every two
minutes). In --work, look at vae-*.png (drawn and reconstructed, side by side) and unet-*.png.
Afterwards, measure with tools/evaluate_demo_model.py.
"""


def work(rank: int, settings: Settings, meeting: str) -> None:
    """One worker's whole life."""
    worker = Worker(rank, settings.workers)
    if worker.count > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", meeting, rank=rank, world_size=worker.count)
    torch.manual_seed(settings.seed)
    pictures = drawn_scenes(settings)
    vae = train_vae(settings, worker, pictures)
    pipeline = train_unet(settings, worker, vae, pictures)
    if worker.leads:
        export(pipeline, settings.out)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for drawn scenes, checkpoints and picture grids; the same folder goes on",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "sd_progress" / "demo_model",
        help="folder that the finished pipeline is saved in (default: the one in the package)",
    )
    made.add_argument(
        "--start",
        type=Path,
        help="folder of a pipeline like this one whose weights training goes on from",
    )
    made.add_argument(
        "--scenes", type=int, default=12_000, help="how many pictures to draw (default: 12000)"
    )
    made.add_argument(
        "--vae-minutes", type=float, default=45, help="time for the VAE (default: 45)"
    )
    made.add_argument(
        "--unet-minutes", type=float, default=60, help="time for UNet and text (default: 60)"
    )
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    made.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes that share each step: one per CPU core; 1 on a GPU (default: 2)",
    )
    made.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet and save the pipeline."""
    settings = Settings(**vars(parser().parse_args(arguments)))
    settings.work.mkdir(parents=True, exist_ok=True)
    drawn_scenes(settings)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave in order: workers end too
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        if settings.workers == 1:
            work(0, settings, meeting)
        else:
            start_processes(  # type: ignore[no-untyped-call]
                work,
                (settings, meeting),
                settings.workers,
                daemon=True,
                start_method="fork" if sys.platform == "linux" else "spawn",
            )


if __name__ == "__main__":
    main()
