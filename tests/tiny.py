"""Real diffusers pipelines, tiny and random, built from configs; prompts are embeddings."""

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH = 32  # of the text embeddings


def vae(channels=4, **config):
    """An autoencoder with 2x down, so that 16 pixels are 8 latents."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    ).eval()


@torch.no_grad()
def working_vae(**config):
    """An autoencoder with 4x down that works without training, because it does little.

    Its latents are the colours of 4 by 4 pixels, and how they change from left to right, mixed. The
    residual blocks pass on what they get. So do the normalisations: two channels of plus and minus
    a thousand are all that they see, and of the mean that they take away an empty channel tells.
    """
    made = AutoencoderKL(
        **_WORKING,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    ).eval()
    _wire(made)
    return made


@torch.no_grad()
def working_vq():
    """The same with a codebook, of the 216 colours that are five even steps apart."""
    levels = torch.linspace(-1, 1, 6)
    colours = torch.cartesian_prod(levels, levels, levels)
    made = VQModel(
        **_WORKING,
        norm_num_groups=1,
        mid_block_add_attention=False,
        num_vq_embeddings=len(colours),
    ).eval()
    _wire(made)
    for conv in (made.quant_conv, made.post_quant_conv):
        conv.weight[:, :, 0, 0] = torch.eye(4)
    made.quantize.embedding.weight.copy_(colours @ _MIXED[:, :3].T)
    return made


_MIXED = torch.tensor([[1.0, 2, 0, 1], [0, 1, -1, 2], [2, 0, 1, 0], [1, -1, 0, 3]]) / 2
_WORKING = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
}


def _wire(made):
    """Set the weights of both halves."""
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            parameter.zero_()
        if name.endswith("samplers.0.conv.weight"):
            area = (slice(2), slice(2), 4) if "downsamplers" in name else (1, 1, 1)
            for channel in range(8):
                parameter[channel, channel, area[0], area[1]] = 1 / area[2]
    for half in (made.encoder, made.decoder):
        half.conv_in.bias[4], half.conv_in.bias[5] = 1000, -1000
        half.conv_norm_out.weight.fill_(500)
        half.conv_norm_out.bias.fill_(20)  # where SiLU leaves everything as it is
    for colour in range(3):
        made.encoder.conv_in.weight[colour, colour, 1, 1] = 1
        made.encoder.conv_in.weight[3, colour, 1, :] = torch.tensor([-1.0, 0, 1])
        made.decoder.conv_out.weight[colour, colour, 1, 1] = 1
        made.decoder.conv_out.weight[colour, 6, 1, 1] = -1
    made.encoder.conv_out.weight[:4, :4, 1, 1] = _MIXED
    made.encoder.conv_out.weight[:4, 6, 1, 1] = -_MIXED.sum(dim=1)
    made.decoder.conv_in.weight[:4, :4, 1, 1] = _MIXED.inverse()


def unet(in_channels=4, **config):
    """A denoiser with cross-attention, two levels."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        sample_size=64,  # less is taken for a mistake by some pipelines
        layers_per_block=1,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    ).eval()


def sd(cls=StableDiffusionPipeline, scheduler=None, dtype=torch.float32, **parts):
    """A Stable Diffusion 1 pipeline of any class, without a text encoder."""
    pipe = cls(
        vae=parts.pop("vae", None) or vae(),
        unet=parts.pop("unet", None) or unet(),
        scheduler=scheduler or DDIMScheduler(**BETAS, clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    ).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_call(pipe, *, batch=1, steps=4, **arguments):
    """What to call `sd(...)` with: embeddings, non-square size, a seeded generator."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(2, batch, 5, WIDTH, generator=generator).to(pipe.unet.dtype)
    return {
        "prompt_embeds": embeddings[0],
        "negative_prompt_embeds": embeddings[1],
        "num_inference_steps": steps,
        "generator": generator,
        "output_type": "np",
        **arguments,
    }


def sdxl(cls=StableDiffusionXLPipeline, scheduler=None, dtype=torch.float32, **parts):
    """A Stable Diffusion XL pipeline of any class, without text encoders."""
    pipe = cls(
        vae=parts.pop("vae", None) or vae(scaling_factor=0.13025),
        unet=parts.pop("unet", None)
        or unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + WIDTH,
        ),
        scheduler=scheduler or DDIMScheduler(**BETAS, clip_sample=False),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
        **parts,
    ).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_call(pipe, *, batch=1, **arguments):
    """What to call `sdxl(...)` with."""
    pooled = torch.ones(batch, WIDTH, dtype=pipe.unet.dtype)
    pooled_arguments = {
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": -pooled,
    }
    return sd_call(pipe, batch=batch, **pooled_arguments, **arguments)


def sd3_transformer(cls=SD3Transformer2DModel, **config):
    """A Stable Diffusion 3 denoiser, or its ControlNet."""
    torch.manual_seed(2)
    return cls(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
        **config,
    ).eval()


def sd3(cls, scheduler=None, dtype=torch.float32, **parts):
    """A Stable Diffusion 3 pipeline of any class, without text encoders."""
    pipe = cls(
        transformer=sd3_transformer(),
        vae=vae(channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in _SD3),
        **parts,
    ).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


_SD3 = ("", "_2", "_3")


def sd3_call(pipe, *, batch=1, steps=4, **arguments):
    """What to call `sd3(...)` with."""
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(2, batch, 5, WIDTH, generator=generator).to(pipe.transformer.dtype)
    return {
        "prompt_embeds": embeddings[0],
        "negative_prompt_embeds": embeddings[1],
        "pooled_prompt_embeds": embeddings[0, :, 0],
        "negative_pooled_prompt_embeds": embeddings[1, :, 0],
        "num_inference_steps": steps,
        "generator": generator,
        "output_type": "np",
        **arguments,
    }


def controlnet(**config):
    """A ControlNet for `unet()`, with weights that are not zero."""
    torch.manual_seed(4)
    net = ControlNetModel.from_unet(unet(**config), conditioning_embedding_out_channels=(4, 8))
    return _filled(net).eval()


def sd3_controlnet(**config):
    """A ControlNet for `sd3_transformer()`, with weights that are not zero."""
    return _filled(sd3_transformer(SD3ControlNetModel, **config)).eval()


def _filled(module):
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module
