"""Packed video tokens, and the video pipelines of Cosmos, Kandinsky and Sana."""

import warnings
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    Cosmos3OmniTransformer,
    CosmosControlNetModel,
    CosmosTransformer3DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRLatentUpscalerBank,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
    Kandinsky6Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    SanaVideoTransformer3DModel,
    SanaWMTransformer3DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.utils import is_torchvision_available
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from zoo import CASES, Case, case, filled, generator, last, noise, statistics

HEIGHT, WIDTH, FRAMES = 32, 64, 5  # 4, 8 and 3 latents of LTX
SIZE = {"height": HEIGHT, "width": WIDTH}
TEXT = 16  # width of the text embeddings
NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
WORDS = ("a", "red", "blue", "fox", "runs", "swims", "blurry")
PROMPTS = {
    "prompt": ["a red fox runs", "a blue fox swims"],
    "negative_prompt": ["blurry", "blurry fox"],
}
COSMOS_FRAMES = 4  # latent frames that there are statistics and positions for
COSMOS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2,
    "text_embed_dim": TEXT,
    "adaln_lora_dim": 4,
    "max_size": (COSMOS_FRAMES, 32, 32),
}
IMAGE_CONTEXT = {"img_context_dim_in": 8, "img_context_dim_out": 32}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": TEXT,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 12,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 4, 4),
    "visual_cond": True,
}


def picture(width=WIDTH, height=HEIGHT, seed=9):
    """A random picture."""
    pixels = noise(height, width, 3, seed=seed).sigmoid() * 255
    return Image.fromarray(pixels.byte().numpy())


def pictures(count, seed=9):
    """Random pictures as one tensor."""
    return noise(count, 3, HEIGHT, WIDTH, seed=seed).sigmoid()


def embeddings(batch=2, width=TEXT):
    """Embeddings of prompts and of negative prompts."""
    return {
        "prompt_embeds": noise(batch, 5, width),
        "negative_prompt_embeds": noise(batch, 5, width, seed=6),
    }


def masks(batch=2):
    """Attention masks for `embeddings`, which hide one token of the negative ones."""
    hidden = torch.ones(batch, 5, dtype=torch.int64)
    hidden[:, 0] = 0
    return {
        "prompt_attention_mask": torch.ones_like(hidden),
        "negative_prompt_attention_mask": hidden,
    }


def sampling(guidance, **arguments):
    """What most calls have in common; 3 steps and a size of 32 x 64."""
    return {
        **SIZE,
        "num_inference_steps": 3,
        "guidance_scale": 3.5 if guidance else 1.0,
        "generator": generator(),
        "output_type": "np",
        **arguments,
    }


def shift():
    """The scheduler of most of these pipelines."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def tokenizer(length=8):
    """A tokenizer that knows a few words."""
    words = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def t5():
    """A text encoder, and its tokenizer."""
    config = T5Config(
        vocab_size=16, d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": tokenizer()}


def with_statistics(vae):
    """Give an autoencoder whose statistics are buffers random ones."""
    for name, numbers in statistics(len(vae.latents_mean)).items():
        getattr(vae, name).copy_(torch.tensor(numbers))
    return vae.eval()


def ltx_vae(**config):
    """LTX's autoencoder, 8x down in space and 2x in time."""
    return with_statistics(
        AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            down_block_types=("LTXVideoDownBlock3D",),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            upsample_residual=(False,),
            upsample_factor=(1,),
            scaling_factor=0.37,
            **config,
        )
    )


def ltx(cls, **vae):
    """LTX, with a text encoder, because only that repeats prompts."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        num_layers=1,
    )
    return cls(transformer=filled(transformer), vae=ltx_vae(**vae), scheduler=shift(), **t5())


def ltx_call(guidance, **arguments):
    """What to call LTX with: two prompts, two videos each, 3 latent frames."""
    repeated = {"num_frames": FRAMES, "num_videos_per_prompt": 2, "max_sequence_length": 8}
    return sampling(guidance, **PROMPTS, **repeated, **arguments)


@case("LTXPipeline")
def ltx_text(cls, guidance):
    """Text to video."""
    return Case(ltx(cls), ltx_call(guidance))


def ltx_timestep(cls, guidance):
    """Text to video, with an autoencoder that is told a time; noise would not be repeatable."""
    timed = {"decode_timestep": 0.05, "decode_noise_scale": 0.0, "num_videos_per_prompt": 1}
    return Case(ltx(cls, timestep_conditioning=True), {**ltx_call(guidance), **timed})


CASES["LTXPipeline:timestep"] = ltx_timestep


@case("LTXImageToVideoPipeline")
def ltx_image(cls, guidance):
    """Image to video; the image is the first latent frame."""
    return Case(ltx(cls), ltx_call(guidance, image=pictures(4)))


@case("LTXConditionPipeline")
def ltx_condition(cls, guidance):
    """Conditions for the first frame, and for a later one: leading tokens."""
    conditions = [
        LTXVideoCondition(image=pictures(4)),
        LTXVideoCondition(image=pictures(4, seed=10), frame_index=4, strength=0.7),
    ]
    return Case(ltx(cls), ltx_call(guidance, conditions=conditions), settled=1)


def untiled(decodes):
    """The latents that were decoded as 2 x 2 tiles that overlap by one, and with one more frame."""
    rows = (torch.cat([left, right[..., 1:]], -1) for left, right in (decodes[:2], decodes[2:]))
    top, bottom = rows
    return torch.cat([top, bottom[..., 1:, :]], -2)[:, :, :-1]


def ltx_long_call(guidance, **arguments):
    """What to call the pipeline for long videos with: two windows in time, four tiles to decode."""
    return sampling(
        guidance,
        prompt="a red fox runs | a blue fox swims",
        negative_prompt="blurry",
        cond_image=picture(),
        num_frames=9,
        decode_horizontal_tiles=2,
        decode_vertical_tiles=2,
        decode_overlap=1,
        max_sequence_length=8,
        **arguments,
    )


@case("LTXI2VLongMultiPromptPipeline")
def ltx_long(cls, guidance):
    """Windows that share one latent frame, which is not blended."""
    call = ltx_long_call(guidance, temporal_tile_size=6, temporal_overlap=2, adain_factor=0)
    return Case(ltx(cls), call, decoded=untiled, tolerance=0.3)  # a sigma is left over


def ltx_long_blended(cls, guidance):
    """Windows that share three latent frames, which are blended, with adjusted statistics."""
    call = ltx_long_call(guidance, temporal_tile_size=8, temporal_overlap=6, adain_factor=0.25)
    return Case(ltx(cls), call, decoded=untiled, tolerance=0.3)  # a sigma is left over


CASES["LTXI2VLongMultiPromptPipeline:blended"] = ltx_long_blended


def ltx2_transformer(**config):
    """LTX 2's denoiser of video and sound."""
    return filled(
        LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            vae_scale_factors=(2, 8, 8),
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            caption_channels=8,
            rope_double_precision=False,
            rope_type="split",
            **config,
        )
    )


def ltx2_vae():
    """LTX 2's autoencoder, 8x down in space and 2x in time."""
    return with_statistics(
        AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            down_block_types=("LTX2VideoDownBlock3D",),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            scaling_factor=0.37,
            decoder_causal=False,
            spatial_compression_ratio=8,
            temporal_compression_ratio=2,
        )
    )


def ltx2_sound():
    """The autoencoder of LTX 2's sound, and what makes sound of it."""
    vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return {"audio_vae": with_statistics(vae), "vocoder": vocoder.eval()}


def ltx2(cls, **config):
    """LTX 2, without a text encoder."""
    branches = {
        f"{branch}_connector_{name}": value
        for branch in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 2),
            ("attention_head_dim", 4),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    connectors = LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=TEXT // 8,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **branches,
    )
    return cls(
        transformer=ltx2_transformer(**config),
        vae=ltx2_vae(),
        connectors=connectors.eval(),
        scheduler=shift(),
        **ltx2_sound(),
        **NO_TEXT,
    )


def ltx2_call(guidance, **arguments):
    """What to call LTX 2 with; all of its kinds of guidance, or none."""
    kinds = {
        "guidance_scale": 3.5,
        "modality_scale": 2.0,
        "stg_scale": 1.0,
        "guidance_rescale": 0.7,
    }
    off = {"guidance_scale": 1.0, "modality_scale": 1.0, "stg_scale": 0.0, "guidance_rescale": 0.0}
    scales = kinds if guidance else off
    audio = {f"audio_{name}": value for name, value in scales.items()}
    return {
        **sampling(guidance, num_frames=FRAMES, spatio_temporal_guidance_blocks=[0]),
        **scales,
        **audio,
        **embeddings(),
        **masks(),
        **arguments,
    }


@case("LTX2Pipeline")
def ltx2_text(cls, guidance):
    """Text to video with sound."""
    return Case(ltx2(cls), ltx2_call(guidance))


@case("LTX2ImageToVideoPipeline")
def ltx2_image(cls, guidance):
    """Image to video with sound; the image is the first latent frame."""
    return Case(ltx2(cls), ltx2_call(guidance, image=pictures(2), image_crf=0))


@case("LTX2ConditionPipeline")
def ltx2_condition(cls, guidance):
    """Conditions for the first frame, and for a later one: trailing tokens."""
    conditions = [
        LTX2VideoCondition(frames=picture(), crf=0),
        LTX2VideoCondition(frames=picture(seed=10), index=2, strength=0.7, crf=0),
    ]
    return Case(ltx2(cls), ltx2_call(guidance, conditions=conditions))


@case("LTX2DFRPipeline")
def ltx2_dfr(cls, guidance):
    """Trailing tokens of a condition and of a keyframe, and frames that are cut off at the end."""
    call = {
        **SIZE,
        "prompt_embeds": embeddings()["prompt_embeds"],
        "prompt_attention_mask": masks()["prompt_attention_mask"],
        "conditions": [LTX2VideoCondition(frames=picture(), index=2, strength=0.7, crf=0)],
        "num_frames": FRAMES,
        "sigmas": [1.0, 0.6, 0.3],
        "generator": generator(),
        "output_type": "np",
    }
    return Case(ltx2(cls, use_keyframes_abs_pos_embedding=True), call)


class AcceptEverything(torch.nn.Module):
    """Stands in for Cosmos' guardrail, which is another package and cannot be left out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.zeros(1))

    @property
    def device(self):
        """Where it is; a pipeline asks its modules for this."""
        return self.place.device

    @property
    def dtype(self):
        """What it computes in."""
        return self.place.dtype

    def check_text_safety(self, prompt):
        """Yes to any text."""
        return True

    def check_video_safety(self, frames):
        """The frames as they are."""
        return frames


def wan_vae(channels=4):
    """Wan's autoencoder, 8x down in space and 4x in time."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        **statistics(channels),
    ).eval()


def cosmos_vae():
    """Cosmos' first autoencoder, 4x down; its statistics differ by frame."""
    return AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        **statistics(4 * COSMOS_FRAMES),
    ).eval()


def nearest(image, size, interpolation):
    """What torchvision's resize does without smoothing."""
    return torch.nn.functional.interpolate(image, size=size, mode=interpolation)


if not is_torchvision_available():  # Cosmos' models resize a mask with it, and with nothing else
    for module in (transformer_cosmos, controlnet_cosmos):
        module.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=nearest),
            InterpolationMode=SimpleNamespace(NEAREST="nearest"),
        )


def cosmos_transformer(in_channels, **config):
    """Cosmos' denoiser."""
    return filled(
        CosmosTransformer3DModel(
            in_channels=in_channels, out_channels=4, num_layers=1, **COSMOS, **config
        )
    )


def cosmos_call(guidance, **arguments):
    """What to call Cosmos with: two prompts, two videos each, 3 latent frames."""
    repeated = {"num_frames": 9, "num_videos_per_prompt": 2, "max_sequence_length": 8}
    return sampling(guidance, **PROMPTS, **repeated, **arguments)


NOISE_LEFT = 0.05  # because the last sigma is not zero


def cosmos1(cls, in_channels):
    """Cosmos 1, which denoises in the way of EDM."""
    return cls(
        transformer=cosmos_transformer(in_channels),
        vae=cosmos_vae(),
        scheduler=EDMEulerScheduler(sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=AcceptEverything(),
        **t5(),
    )


@case("CosmosTextToWorldPipeline")
def cosmos_text(cls, guidance):
    """Text to video."""
    return Case(cosmos1(cls, 4), cosmos_call(guidance), tolerance=NOISE_LEFT)


@case("CosmosVideoToWorldPipeline")
def cosmos_video(cls, guidance):
    """Video to video; the first latent frame is given."""
    video = [picture(seed=seed) for seed in range(20, 25)]
    call = cosmos_call(guidance, video=[video] * 4)
    return Case(cosmos1(cls, 5), call, tolerance=NOISE_LEFT)


def cosmos2(cls, in_channels):
    """Cosmos 2, which has Wan's autoencoder."""
    return cls(
        transformer=cosmos_transformer(in_channels),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=AcceptEverything(),
        **t5(),
    )


@case("Cosmos2TextToImagePipeline")
def cosmos2_image(cls, guidance):
    """Text to image, as a video of one frame."""
    call = sampling(guidance, **PROMPTS, num_images_per_prompt=2, max_sequence_length=8)
    return Case(cosmos2(cls, 4), call, tolerance=NOISE_LEFT)


@case("Cosmos2VideoToWorldPipeline")
def cosmos2_video(cls, guidance):
    """Image to video; the image is the first latent frame."""
    call = cosmos_call(guidance, image=pictures(4))
    return Case(cosmos2(cls, 5), call, tolerance=NOISE_LEFT)


def cosmos25(cls, transformer, **parts):
    """Cosmos 2.5, without a text encoder."""
    return cls(
        transformer=transformer,
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(
            use_karras_sigmas=True,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            sigma_max=200.0,
            sigma_min=0.01,
        ),
        safety_checker=AcceptEverything(),
        **NO_TEXT,
        **parts,
    )


@case("Cosmos2_5_PredictBasePipeline")
def cosmos25_predict(cls, guidance):
    """Text to video."""
    return Case(
        cosmos25(cls, cosmos_transformer(5)), sampling(guidance, num_frames=9, **embeddings())
    )


def cosmos25_video(cls, guidance):
    """Video to video, which takes one prompt only; two latent frames are given."""
    video = [picture(seed=seed) for seed in range(20, 25)]
    call = sampling(guidance, video=video, num_frames=9, **embeddings(batch=1))
    return Case(cosmos25(cls, cosmos_transformer(5)), call)


CASES["Cosmos2_5_PredictBasePipeline:video"] = cosmos25_video


@case("Cosmos2_5_TransferPipeline")
def cosmos25_transfer(cls, guidance):
    """Two chunks of a video, each decoded for itself; the second starts with the first's end."""
    controlnet = CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=4 + 2,
        latent_channels=4 + 2,
        model_channels=32,
        **COSMOS,
        **IMAGE_CONTEXT,
    )
    controls = [pictures(1, seed=seed)[0] for seed in range(20, 37)]
    call = sampling(guidance, controls=controls, num_frames=17, num_frames_per_chunk=9)
    transformer = cosmos_transformer(5, controlnet_block_every_n=1, **IMAGE_CONTEXT)
    pipe = cosmos25(cls, transformer, controlnet=filled(controlnet))
    return Case(pipe, {**call, **embeddings()}, decoded=last)


@case("Cosmos3OmniPipeline")
def cosmos3(cls, guidance):
    """Image to video by a model that reads the words itself; one prompt only."""
    transformer = Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=12,
        intermediate_size=16,
        latent_channel=4,
        latent_patch_size=2,
        patch_latent_dim=16,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
        rope_axes_dim=[2, 2, 2],
        vocab_size=16,
    )
    words = tokenizer(length=64)
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>"]})
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    pipe = cls(
        transformer=filled(transformer),
        text_tokenizer=words,
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        enable_safety_checker=False,
    )
    prompts = {"prompt": "a red fox runs", "negative_prompt": "blurry"}
    call = sampling(guidance, **prompts, image=picture(), num_frames=9)
    return Case(pipe, {**call, "enable_safety_check": False})


def hunyuan_vae():
    """Hunyuan's autoencoder, which Kandinsky has; 8x down in space and 4x in time."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
        scaling_factor=0.37,
    ).eval()


def kandinsky5(cls):
    """Kandinsky 5, with further channels for a given image, without text encoders."""
    return cls(
        transformer=filled(Kandinsky5Transformer3DModel(**KANDINSKY)),
        vae=hunyuan_vae(),
        scheduler=shift(),
        **NO_TEXTS,
    )


def kandinsky5_call(guidance, **arguments):
    """What to call Kandinsky 5 with: embeddings of two models, and where each prompt ends."""
    texts = {}
    for sign, (name, tokens) in enumerate(embeddings().items()):
        start = name.removesuffix("_embeds")
        texts[f"{name}_qwen"] = tokens
        texts[f"{name}_clip"] = noise(2, 8, seed=sign)
        texts[f"{start}_cu_seqlens"] = torch.tensor([0, 5, 10], dtype=torch.int32)
    return sampling(guidance, **texts, **arguments)


@case("Kandinsky5T2VPipeline")
def kandinsky5_text(cls, guidance):
    """Text to video."""
    return Case(kandinsky5(cls), kandinsky5_call(guidance, num_frames=9))


@case("Kandinsky5I2VPipeline")
def kandinsky5_image(cls, guidance):
    """Image to video; with fewer than 5 latent frames, the first would be no numbers."""
    return Case(kandinsky5(cls), kandinsky5_call(guidance, num_frames=21, image=pictures(2)))


@case("Kandinsky6TI2VAPipeline")
def kandinsky6(cls, guidance):
    """Image to video with sound; the image is one more latent frame, at the end."""
    transformer = Kandinsky6Transformer3DModel(
        in_audio_dim=4, out_audio_dim=4, visual_token_type_num_embeddings=2, **KANDINSKY
    )
    sound = MMAudioVAE(
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=hunyuan_vae(),
        scheduler=shift(),
        audio_vae=sound.eval(),
        vocoder=vocoder.eval(),
        **NO_TEXTS,
    )
    pooled = {
        "pooled_prompt_embeds": noise(2, 8),
        "negative_pooled_prompt_embeds": noise(2, 8, seed=6),
    }
    repeated = {"num_frames": 9, "num_videos_per_prompt": 2}
    call = sampling(guidance, image=pictures(2), **repeated, **embeddings(), **pooled)
    return Case(pipe, call)


@case("Kandinsky6SRPipeline")
def kandinsky6_larger(cls, guidance):
    """Two videos made larger in two overlapping tiles each, one video after the other."""
    transformer = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=12,
        ff_dim=16,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
        tile_sizes=((32, 32), (32, 64), (64, 32)),
    )
    vae = Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(4, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        layers_per_block=1,
        temporal_compression_start_level=0,
        scaling_factor=0.37,
    )
    upscaler = Kandinsky6SRLatentUpscalerBank(
        in_channels=4,
        stage_channels=(8, 8, 4),
        num_pre_blocks=1,
        num_mid_blocks=1,
        num_post_blocks=1,
        num_x2_adapter_blocks=1,
        scales=(2,),
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=vae.eval(),
        scheduler=shift(),
        latent_upscaler=filled(upscaler),
    )
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    call = {
        "video": noise(2, 9, 3, 16, 48).sigmoid(),
        "resolution_scale": 2,
        "num_inference_steps": 3,
        "tiles_batch_size": 2,
        "generator": generator(),
        "output_type": "np",
    }
    return Case(pipe, call, decoded=last)


def sana_video(cls, vae, scheduler):
    """Sana for video, without a text encoder."""
    transformer = SanaVideoTransformer3DModel(
        in_channels=vae.config.get("z_dim", 8),
        out_channels=vae.config.get("z_dim", 8),
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT,
        rope_max_seq_len=32,
    )
    return cls(transformer=filled(transformer), vae=vae, scheduler=scheduler, **NO_TEXT)


def sana_call(guidance, frames, **arguments):
    """What to call Sana for video with: two prompts, and the size as it is."""
    as_asked = {"use_resolution_binning": False, "negative_prompt": None}
    return sampling(guidance, frames=frames, **as_asked, **embeddings(), **masks(), **arguments)


@case("SanaVideoPipeline")
def sana_text(cls, guidance):
    """Text to video, with Wan's autoencoder."""
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = sana_video(cls, wan_vae(), solver)
    return Case(pipe, sana_call(guidance, 9, num_videos_per_prompt=2))


def sana_ltx2(cls, guidance):
    """Text to video, with LTX 2's autoencoder, of which the scale is not heeded."""
    return Case(sana_video(cls, ltx2_vae(), shift()), sana_call(guidance, FRAMES))


CASES["SanaVideoPipeline:ltx2"] = sana_ltx2


@case("SanaImageToVideoPipeline")
def sana_image(cls, guidance):
    """Image to video; the image is the first latent frame."""
    pipe = sana_video(cls, wan_vae(), shift())
    return Case(pipe, sana_call(guidance, 9, image=picture()))


@case("SanaWMPipeline")
def sana_world(cls, guidance):
    """Image to video along a path; one prompt only."""
    transformer = SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        chunk_plucker_channels=6 * 2,
        caption_channels=TEXT,
        mlp_ratio=2.0,
    )
    pipe = cls(transformer=filled(transformer), vae=ltx2_vae(), scheduler=shift(), **NO_TEXT)
    texts = {name: tokens[:, None] for name, tokens in embeddings(batch=1).items()}
    path = {"action": "w-8", "intrinsics": [40.0, 40.0, WIDTH / 2, HEIGHT / 2]}
    call = sampling(guidance, image=picture(), num_frames=FRAMES, **path, **texts, **masks(1))
    return Case(pipe, {**call, "prompt": ""})
