"""One tiny random autoencoder of each class of diffusers that takes pictures or clips.

Left out are AutoencoderKLAllegro, which encodes nothing of a clip that is smaller than its tiles,
AutoencoderKLQwenImage21, which wants pictures with transparency, and AutoencoderKLMiniMaxH3, which
decodes no clip as short as ours.
"""

import diffusers
import tiny
import torch
from test_latent_space import random_vae
from zoo import build, filled, load_families, packed, tokens

# Those that a pipeline of the zoo has.
IN_PIPELINES = {
    "AutoencoderKLCogVideoX": "CogVideoXPipeline",
    "AutoencoderKLHunyuanImage": "HunyuanImagePipeline",
    "AutoencoderKLHunyuanVideo": "HunyuanVideoPipeline",
    "AutoencoderKLHunyuanVideo15": "HunyuanVideo15Pipeline",
    "AutoencoderKLMagvit": "EasyAnimatePipeline",
    "AutoencoderKLMochi": "MochiPipeline",
    "AutoencoderKLTemporalDecoder": "StableVideoDiffusionPipeline",
}


def asymmetric():
    """With a decoder wider than the encoder."""
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 16),
        norm_num_groups=4,
    )


def refiner():
    """Of HunyuanImage's second stage."""
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


def consistency():
    """With a decoder that is a diffusion model itself."""
    return diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8, 8, 8),
        encoder_norm_num_groups=4,
        encoder_layers_per_block=1,
        decoder_block_out_channels=(8, 8, 8, 8),
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    )


def kandinsky():
    """Kandinsky's for pictures."""
    return diffusers.AutoencoderKLKVAE(
        channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1)
    )


def kandinsky_video():
    """Kandinsky's for clips."""
    return diffusers.AutoencoderKLKVAEVideo(
        ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, temporal_compress_times=2
    )


def vidtok(**config):
    """Of Microsoft's VidTok, with numbers or tokens."""
    return diffusers.AutoencoderVidTok(
        ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1, z_channels=4, **config
    )


def representation():
    """Whose encoder is a vision transformer, and whose pictures have one size."""
    return diffusers.AutoencoderRAE(
        encoder_type="mae",
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=4,
        encoder_input_size=32,
    )


BUILDERS = {
    "AsymmetricAutoencoderKL": asymmetric,
    "AutoencoderDC": lambda: random_vae("AutoencoderDC"),
    "AutoencoderKL": tiny.vae,
    "AutoencoderKLCosmos": tokens.cosmos_vae,
    "AutoencoderKLFlux2": packed.patch_vae,
    "AutoencoderKLHunyuanImageRefiner": refiner,
    "AutoencoderKLKVAE": kandinsky,
    "AutoencoderKLKVAEVideo": kandinsky_video,
    "AutoencoderKLLTX2Video": tokens.ltx2_vae,
    "AutoencoderKLLTXVideo": tokens.ltx_vae,
    "AutoencoderKLQwenImage": packed.video_vae,
    "AutoencoderKLWan": lambda: random_vae("AutoencoderKLWan"),
    "AutoencoderRAE": representation,
    "AutoencoderTiny": lambda: random_vae("AutoencoderTiny"),
    "AutoencoderVidTok": vidtok,
    "AutoencoderVidTok:fsq": lambda: vidtok(double_z=False, regularizer="fsq", codebook_size=8**4),
    "ConsistencyDecoderVAE": consistency,
    "VQModel": lambda: random_vae("VQModel"),
}
NAMES = sorted({*BUILDERS, *IN_PIPELINES})


def autoencoder(name):
    """A new one, the same every time."""
    torch.manual_seed(0)
    if name in BUILDERS:
        return filled(BUILDERS[name]())
    load_families()
    return filled(build(IN_PIPELINES[name]).pipe.vae)
