"""Plain, pixel-space, token-id, audio, combined and modular image pipelines."""

import warnings
from functools import partial

import diffusers
import numpy
import tiny
import torch
import transformers
from diffusers.pipelines import ace_step as ace_step_models
from diffusers.pipelines.deprecated import unclip as unclip_models
from diffusers.pipelines.deprecated import wuerstchen as wuerstchen_models
from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserTextDecoder
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm
from diffusers.pipelines.shap_e import ShapERenderer
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_diffusion import stable_unclip_image_normalizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from zoo import Case, case, filled, generator, noise, statistics

HEIGHT, WIDTH = 32, 64  # some want multiples of 32
SIZE = {"height": HEIGHT, "width": WIDTH}
TEXT = tiny.WIDTH  # width of the text embeddings
SCALE = {"scaling_factor": 0.37}
SHIFT = {"scaling_factor": 0.37, "shift_factor": 0.21}
BINS = {"use_resolution_binning": False}  # not to fill up to about 1024 pixels
ONE_IMAGE = {"num_images_per_prompt": 1}  # where embeddings are not repeated for more
PROMPT = {"prompt": ["a red fox", "a blue cat"]}


def call(steps=3, **arguments):
    """What a pipeline is called with, whatever its size."""
    return {
        "num_inference_steps": steps,
        "generator": generator(),
        "output_type": "np",
        **arguments,
    }


def sized(steps=3, **arguments):
    """What most pipelines here are called with."""
    return call(steps, **{"num_images_per_prompt": 2, **SIZE, **arguments})


def picture(width=WIDTH, height=HEIGHT, seed=0):
    """An image of random pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(numpy.uint8))


def without(*names):
    """Parts that a pipeline does not need when it is given embeddings."""
    return dict.fromkeys(names)


NO_TEXT = without("text_encoder", "tokenizer")


def embeddings(guidance, *, masks="attention", length=5):
    """Prompt embeddings, and the negative ones under guidance, with their masks."""
    prompts = noise(2, 2, length, TEXT)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -1] = 0
    arguments = {"prompt_embeds": prompts[0]}
    if masks:
        arguments[f"prompt_{masks}_mask"] = mask
    if guidance:
        arguments |= {f"negative_{name}": value for name, value in arguments.items()}
        arguments["negative_prompt_embeds"] = prompts[1]
    return arguments


def scale(guidance, off=1.0):
    """The guidance scale."""
    return {"guidance_scale": 3.5 if guidance else off}


def euler(**config):
    """The flow scheduler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def ddim(**config):
    """The scheduler of the older pipelines."""
    return diffusers.DDIMScheduler(**tiny.BETAS, **{"clip_sample": False, **config})


def deep_vae(**config):
    """An autoencoder with 8x down, for the pipelines that take that for granted."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        **config,
    ).eval()


# text


WORDS = ("<unknown>", "<start>", "<end>", "a", "red", "blue", "fox", "cat")


def tokenizer(length=8):
    """A tokenizer that knows a few words, with a start, and ends for padding."""
    words = Tokenizer(models.WordLevel(dict(zip(WORDS, range(8), strict=True)), WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unknown>",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


def clip(name="CLIPTextModel", layers=1):
    """A text encoder of CLIP."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT,
        projection_dim=TEXT,
        intermediate_size=TEXT,
        num_attention_heads=2,
        num_hidden_layers=layers,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return getattr(transformers, name)(config).eval()


def t5():
    """A text encoder without a limit of length."""
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


# img/sf_dt


def sana_transformer(**config):
    """A Sana denoiser."""
    return filled(
        diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=TEXT,
            **config,
        )
    )


def compression_vae():
    """A deep compression autoencoder with 2x down."""
    kind = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8)}
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            **kind,
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), (5,)),
        }.items()
    }
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        **SCALE,
        **sides,
    ).eval()


@case("SanaPipeline")
def sana(cls, guidance):
    """Sana, whose autoencoder has no latent distribution."""
    pipe = cls(
        vae=compression_vae(), transformer=sana_transformer(), scheduler=euler(shift=3.0), **NO_TEXT
    )
    return Case(
        pipe, sized(negative_prompt=None, **embeddings(guidance), **scale(guidance), **BINS)
    )


@case("HunyuanImagePipeline")
def hunyuan_image(cls, guidance):
    """HunyuanImage 2.1, with two text encoders and a guider."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=64,
        **SCALE,
    )
    guider = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=3.5)
    pipe = cls(
        vae=vae.eval(),
        transformer=filled(transformer),
        scheduler=euler(shift=3.0),
        guider=guider if guidance else None,
        **without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    text = embeddings(guidance, masks=None)
    text |= {f"{name}_mask": torch.ones(2, 5, dtype=torch.long) for name in text}
    second = {f"{name}_2": value for name, value in text.items()}
    return Case(pipe, sized(**text, **second))


@case("AuraFlowPipeline")
def aura_flow(cls, guidance):
    """AuraFlow."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    pipe = cls(
        vae=deep_vae(**SCALE),
        transformer=filled(transformer),
        scheduler=euler(shift=1.73),
        **NO_TEXT,
    )
    return Case(pipe, sized(**embeddings(guidance), **scale(guidance)))


# img/sf


@case("PixArtSigmaPipeline")
def pixart(cls, guidance):
    """PixArt-Sigma, whose denoiser predicts the variance as well."""
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=TEXT,
        norm_num_groups=4,
    )
    pipe = cls(vae=tiny.vae(**SCALE), transformer=filled(transformer), scheduler=ddim(), **NO_TEXT)
    arguments = {"negative_prompt": None, **embeddings(guidance), **scale(guidance), **BINS}
    return Case(pipe, sized(**arguments))


@case("HunyuanDiTPipeline")
def hunyuan_dit(cls, guidance):
    """HunyuanDiT, with two text encoders."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=TEXT,
        pooled_projection_dim=4,
        hidden_size=24,
        text_len=5,
        text_len_t5=5,
        activation_fn="gelu-approximate",
    )
    pipe = cls(
        vae=deep_vae(**SCALE),
        transformer=filled(transformer),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    text = embeddings(True)
    text |= {f"{name}_2": value for name, value in text.items()}
    return Case(pipe, sized(**text, **scale(guidance), **BINS, **ONE_IMAGE))


# img/sf_shift


@case("Lumina2Pipeline")
def lumina2(cls, guidance):
    """Lumina 2."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT,
    )
    pipe = cls(
        vae=deep_vae(**SHIFT),
        transformer=filled(transformer),
        scheduler=euler(use_dynamic_shifting=True),
        **NO_TEXT,
    )
    return Case(pipe, sized(**embeddings(guidance), **scale(guidance), **ONE_IMAGE))


@case("ZImagePipeline")
def z_image(cls, guidance):
    """Z-Image, whose embeddings are a list."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 64, 64],
    )
    pipe = cls(
        vae=tiny.vae(**SHIFT),
        transformer=filled(transformer),
        scheduler=euler(use_dynamic_shifting=True),
        **NO_TEXT,
    )
    prompts = noise(2, 2, 5, TEXT)
    text = {"prompt_embeds": [prompts[0, 0], prompts[0, 1, :3]]}
    if guidance:
        text["negative_prompt_embeds"] = [*prompts[1]]
    return Case(pipe, sized(**text, **scale(guidance, 0.0)))


# img/lcm


def lcm(cls, guidance, **arguments):
    """A latent consistency pipeline, whose guidance is an embedding."""
    parts = {"image_encoder": None}
    unet = tiny.unet(time_cond_proj_dim=8)
    pipe = tiny.sd(
        cls,
        scheduler=diffusers.LCMScheduler(**tiny.BETAS),
        vae=tiny.vae(**SCALE),
        unet=unet,
        **parts,
    )
    text = embeddings(False, masks=None)
    arguments = {"num_images_per_prompt": 2, **text, **scale(guidance), **arguments}
    return Case(pipe, call(4, **arguments))


@case("LatentConsistencyModelPipeline")
def lcm_text(cls, guidance):
    """Latent consistency from text."""
    return lcm(cls, guidance, **SIZE)


@case("LatentConsistencyModelImg2ImgPipeline")
def lcm_image(cls, guidance):
    """Latent consistency from an image."""
    return lcm(cls, guidance, image=[picture(seed=seed) for seed in range(4)])


# img/sprint


@case("SanaSprintPipeline")
def sana_sprint(cls, guidance):
    """Sana Sprint, whose guidance is an embedding, and which decodes the predicted image."""
    transformer = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    pipe = cls(
        vae=compression_vae(),
        transformer=transformer,
        scheduler=diffusers.SCMScheduler(sigma_data=0.43),
        **NO_TEXT,
    )
    arguments = {"intermediate_timesteps": None, **embeddings(False), **scale(guidance), **BINS}
    return Case(pipe, sized(**arguments))


# img/meanstd


@case("GlmImagePipeline")
def glm_image(cls, guidance):
    """GLM-Image, given the tokens of its language model."""
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=64,
    )
    pipe = cls(
        vae=tiny.vae(**SCALE, **statistics(4)),
        transformer=filled(transformer),
        scheduler=euler(use_dynamic_shifting=True),
        **without("text_encoder", "tokenizer", "processor", "vision_language_encoder"),
    )
    tokens = torch.randint(64, (2, HEIGHT * WIDTH // 16), generator=generator())
    text = embeddings(guidance, masks=None)
    return Case(pipe, sized(prior_token_ids=tokens, **text, **scale(guidance), **ONE_IMAGE))


# img/prx


def prx_transformer(channels=4, **config):
    """A PRX denoiser."""
    return filled(
        diffusers.PRXTransformer2DModel(
            in_channels=channels,
            context_in_dim=TEXT,
            hidden_size=16,
            num_heads=2,
            depth=1,
            axes_dim=[4, 4],
            **config,
        )
    )


def prx_text(guidance):
    """Embeddings of PRX, whose timesteps under guidance are those of one image."""
    text = embeddings(guidance)
    if guidance:
        text = {name: value[1:] for name, value in text.items()}
    return {**text, **scale(guidance), **BINS, **ONE_IMAGE}


@case("PRXPipeline")
def prx(cls, guidance):
    """PRX, whose guidance works for one image only."""
    pipe = cls(
        vae=tiny.vae(**SHIFT), transformer=prx_transformer(), scheduler=euler(shift=3.0), **NO_TEXT
    )
    return Case(pipe, sized(**prx_text(guidance)))


# img/sf_shift0


@case("DreamLitePipeline", "DreamLiteMobilePipeline")
def dreamlite(cls, guidance):
    """DreamLite, whose denoiser sees a second image beside the latents, and no callback."""
    unet = diffusers.DreamLiteUNetModel(
        block_out_channels=(8, 16),
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        **SHIFT,
    )
    pipe = cls(
        vae=vae.eval(),
        unet=filled(unet),
        scheduler=euler(use_dynamic_shifting=True),
        text_encoder=t5(),
        tokenizer=tokenizer(256),
        processor=None,
    )
    return Case(pipe, sized(prompt="a red fox", **scale(guidance)))


# img/marigold, img/marigold_multi


def marigold(cls, targets=1, **config):
    """A Marigold pipeline, which takes its latents from a picture and has no callback."""
    unet = tiny.unet()
    unet = diffusers.UNet2DConditionModel.from_config(
        {**unet.config, "in_channels": 4 + 4 * targets, "out_channels": 4 * targets}
    )
    pipe = cls(
        vae=tiny.vae(**SCALE),
        unet=unet.eval(),
        scheduler=ddim(prediction_type="v_prediction"),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        default_processing_resolution=0,
        **config,
    )
    return Case(pipe, call(image=[picture(), picture(seed=1)], batch_size=2))


@case("MarigoldDepthPipeline")
def marigold_depth(cls, guidance):
    """Depth."""
    return marigold(cls, prediction_type="depth")


@case("MarigoldIntrinsicsPipeline")
def marigold_intrinsics(cls, guidance):
    """Two pictures of material at once, in the channels."""
    properties = {"target_names": ["albedo", "material"]}
    return marigold(cls, 2, prediction_type="intrinsics", target_properties=properties)


# img/dit


@case("DiTPipeline")
def dit(cls, guidance):
    """DiT, whose latents are doubled under guidance; its images are square."""
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
    )
    pipe = cls(vae=tiny.vae(**SCALE), transformer=filled(transformer), scheduler=ddim())
    return Case(pipe, call(class_labels=[1, 5, 9], **scale(guidance)))


# img/none_movq


def vq(channels=4, width=8, **config):
    """A quantised autoencoder with 2x down."""
    return diffusers.VQModel(
        block_out_channels=(width, width),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=channels,
        **SCALE,
        **config,
    ).eval()


def movq():
    """The quantised autoencoder of Kandinsky."""
    return vq(width=32, norm_type="spatial")


def varied_unet(channels=4, **config):
    """A denoiser that predicts the variance as well."""
    return diffusers.UNet2DConditionModel(
        in_channels=config.pop("in_channels", channels),
        out_channels=2 * channels,
        cross_attention_dim=TEXT,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        **config,
    ).eval()


def kandinsky_parts(kind="image"):
    """What Kandinsky 2 pipelines are made of."""
    return {
        "unet": varied_unet(
            addition_embed_type=kind, encoder_hid_dim=TEXT, encoder_hid_dim_type=f"{kind}_proj"
        ),
        "movq": movq(),
        "scheduler": ddim(),
    }


def image_embeddings():
    """Embeddings of pictures, and negative ones."""
    return dict(zip(("image_embeds", "negative_image_embeds"), noise(2, 2, TEXT), strict=True))


def several(guidance):
    """How many images a prompt; without guidance, embeddings are not repeated for more."""
    return {"num_images_per_prompt": 2 if guidance else 1}


@case("KandinskyV22Pipeline")
def kandinsky22(cls, guidance):
    """Kandinsky 2.2."""
    parts = {**kandinsky_parts(), "scheduler": diffusers.DDPMScheduler(**tiny.BETAS)}
    arguments = {**image_embeddings(), **several(guidance), **scale(guidance)}
    return Case(cls(**parts), sized(**arguments), "movq")


@case("Kandinsky3Pipeline")
def kandinsky3(cls, guidance):
    """Kandinsky 3."""
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=4,
        encoder_hid_dim=TEXT,
    )
    scheduler = diffusers.DDPMScheduler(**tiny.BETAS)
    pipe = cls(unet=unet.eval(), movq=movq(), scheduler=scheduler, **NO_TEXT)
    text = {
        name.replace("prompt_att", "att"): value for name, value in embeddings(guidance).items()
    }
    arguments = {**text, **scale(guidance), "height": 64, "width": 128}
    return Case(pipe, sized(**arguments), "movq")


def multilingual_clip():
    """The text encoder of Kandinsky 2.1."""
    config = MCLIPConfig(
        transformerDimSize=TEXT,
        imageDimSize=TEXT,
        vocab_size=len(WORDS),
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=80,
        pad_token_id=2,
    )
    return MultilingualCLIP(config).eval()


def kandinsky21_parts():
    """What Kandinsky 2.1 is made of."""
    parts = kandinsky_parts("text_image")
    return {**parts, "text_encoder": multilingual_clip(), "tokenizer": tokenizer(77)}


@case("KandinskyPipeline")
def kandinsky21(cls, guidance):
    """Kandinsky 2.1."""
    pipe = cls(**kandinsky21_parts())
    arguments = {**PROMPT, **image_embeddings(), **several(guidance), **scale(guidance)}
    return Case(pipe, sized(**arguments), "movq")


# img/none_vq, img/vq_sf


@case("LDMSuperResolutionPipeline")
def ldm_upscale(cls, guidance):
    """Latent diffusion that makes images larger, without a callback."""
    pipe = cls(vqvae=vq(3), unet=pixel_unet(in_channels=6), scheduler=ddim())
    pictures = noise(2, 3, 16, 24).tanh()
    return Case(pipe, call(image=pictures), "vqvae")


@case("LDMTextToImagePipeline")
def ldm_text(cls, guidance):
    """Latent diffusion with a quantised autoencoder, without a callback."""
    config = ldm.LDMBertConfig(
        vocab_size=len(WORDS),
        d_model=TEXT,
        encoder_layers=1,
        encoder_ffn_dim=TEXT,
        encoder_attention_heads=2,
        head_dim=8,
        max_position_embeddings=77,
        pad_token_id=2,
    )
    pipe = cls(
        vqvae=vq(),
        unet=tiny.unet(),
        bert=ldm.LDMBertModel(config).eval(),
        tokenizer=tokenizer(77),
        scheduler=ddim(),
    )
    arguments = {**PROMPT, "height": 64, "width": 96, **scale(guidance)}
    return Case(pipe, call(**arguments), "vqvae")


# img/vqgan_scale


def vqgan():
    """The autoencoder of Wuerstchen, with 4x down."""
    return wuerstchen_models.PaellaVQModel(
        bottleneck_blocks=1, num_vq_embeddings=12, embed_dim=8, scale_factor=0.37
    ).eval()


def cascade_unet(**config):
    """A denoiser of Stable Cascade."""
    return filled(
        diffusers.StableCascadeUNet(
            timestep_ratio_embedding_dim=8,
            conditioning_dim=TEXT,
            block_out_channels=(8, 16),
            num_attention_heads=(-1, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            clip_text_pooled_in_channels=TEXT,
            clip_seq=2,
            **config,
        )
    )


def cascade_decoder():
    """The second denoiser of Stable Cascade, whose pictures are VQGAN's."""
    return cascade_unet(in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=4)


def wuerstchen_scheduler():
    """The scheduler of Wuerstchen."""
    return diffusers.DDPMWuerstchenScheduler()


@case("StableCascadeDecoderPipeline")
def cascade(cls, guidance):
    """Stable Cascade from embeddings of pictures, two for each prompt."""
    pipe = cls(
        decoder=cascade_decoder(),
        vqgan=vqgan(),
        scheduler=wuerstchen_scheduler(),
        latent_dim_scale=4,
        **NO_TEXT,
    )
    pooled = noise(2, 4, 1, TEXT)
    arguments = {
        "image_embeddings": noise(4, 4, 3, 4),
        **embeddings(guidance, masks=None),
        "prompt_embeds_pooled": pooled[0],
        "negative_prompt_embeds_pooled": pooled[1] if guidance else None,
        **scale(guidance),
    }
    return Case(pipe, call(**arguments), "vqgan")


@case("WuerstchenDecoderPipeline")
def wuerstchen(cls, guidance):
    """Wuerstchen from embeddings of pictures."""
    decoder = wuerstchen_models.WuerstchenDiffNeXt(
        c_r=8,
        c_cond=TEXT,
        c_hidden=[16],
        nhead=[-1],
        blocks=[1],
        level_config=["CT"],
        inject_effnet=[False],
        clip_embd=TEXT,
    )
    pipe = cls(
        decoder=filled(decoder),
        vqgan=vqgan(),
        scheduler=wuerstchen_scheduler(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        latent_dim_scale=4,
    )
    arguments = {"prompt": "a red fox", "image_embeddings": noise(2, 4, 3, 4), **scale(guidance)}
    return Case(pipe, call(**arguments), "vqgan")


# pix


def pixel_unet(**config):
    """A denoiser of pixels, without text; not square."""
    config = {
        "sample_size": (16, 24),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        **config,
    }
    return diffusers.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **config
    ).eval()


@case("DDPMPipeline", "DDIMPipeline")
def ddpm(cls, guidance):
    """Pixels from nothing, without a callback."""
    scheduler = diffusers.DDPMScheduler()
    if cls is diffusers.DDIMPipeline:
        scheduler = ddim(prediction_type="v_prediction", clip_sample=True)
    return Case(cls(unet=pixel_unet(), scheduler=scheduler), call(4, batch_size=2), None)


@case("ConsistencyModelPipeline")
def consistency(cls, guidance):
    """Pixels from nothing in a few steps; its images are square."""
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipe = cls(unet=pixel_unet(sample_size=16), scheduler=scheduler)
    return Case(pipe, call(batch_size=2), None)


def deepfloyd(cls, guidance, *, config=None, parts=None, **arguments):
    """A DeepFloyd pipeline of any class, whose denoiser predicts the variance as well."""
    unet = varied_unet(
        3,
        encoder_hid_dim=TEXT,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        sample_size=16,
        **config or {},
    )
    pipe = cls(
        unet=unet,
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        watermarker=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **NO_TEXT,
        **parts or {},
    )
    text = embeddings(guidance, masks=None)
    arguments = {"num_images_per_prompt": 2, **text, **scale(guidance), **arguments}
    return Case(pipe, call(**arguments), None)


@case("IFPipeline")
def deepfloyd_text(cls, guidance):
    """DeepFloyd from text."""
    return deepfloyd(cls, guidance, height=16, width=24)


@case("IFImg2ImgPipeline")
def deepfloyd_image(cls, guidance):
    """DeepFloyd from an image."""
    return deepfloyd(cls, guidance, image=[picture(24, 16), picture(24, 16, 1)], steps=4)


@case("IFSuperResolutionPipeline")
def deepfloyd_upscale(cls, guidance):
    """DeepFloyd that makes an image larger."""
    return deepfloyd(
        cls,
        guidance,
        config={"in_channels": 6, "class_embed_type": "timestep"},
        parts={"image_noising_scheduler": diffusers.DDPMScheduler()},
        image=noise(2, 3, 8, 12).tanh(),
        height=16,
        width=24,
    )


@case("PRXPixelPipeline")
def prx_pixel(cls, guidance):
    """PRX that predicts the clean image, whose guidance works for one image only."""
    pipe = cls(transformer=prx_transformer(3), scheduler=euler(shift=3.0), **NO_TEXT)
    return Case(pipe, sized(**prx_text(guidance)), None)


LENGTH = 8  # tokens that a prior is given


def prior(**config):
    """A denoiser of embeddings, with statistics that are not zero."""
    return filled(
        diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=1,
            **{"embedding_dim": TEXT, "num_embeddings": LENGTH, **config},
        )
    )


def unclip_scheduler(variance="fixed_small_log", prediction="epsilon", **config):
    """The scheduler of priors."""
    return diffusers.UnCLIPScheduler(variance_type=variance, prediction_type=prediction, **config)


def prior_scheduler():
    """The scheduler of a prior that predicts the embedding."""
    return unclip_scheduler(prediction="sample", clip_sample_range=5.0)


@case("UnCLIPPipeline")
def unclip(cls, guidance):
    """A prior, a decoder and an upscaler, each with its scheduler, without a callback; square."""
    upscaler = {
        "sample_size": 32,
        "in_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }
    pipe = cls(
        prior=prior(),
        decoder=varied_unet(3, sample_size=16, class_embed_type="identity"),
        text_encoder=clip("CLIPTextModelWithProjection"),
        tokenizer=tokenizer(LENGTH),
        text_proj=unclip_models.UnCLIPTextProjModel(
            clip_embeddings_dim=TEXT, time_embed_dim=32, cross_attention_dim=TEXT
        ),
        super_res_first=pixel_unet(**upscaler),
        super_res_last=pixel_unet(**upscaler),
        prior_scheduler=prior_scheduler(),
        decoder_scheduler=unclip_scheduler("learned_range"),
        super_res_scheduler=unclip_scheduler(),
    )
    guided = 3.5 if guidance else 1.0
    arguments = {
        **PROMPT,
        "num_images_per_prompt": 2,
        "prior_num_inference_steps": 3,
        "decoder_num_inference_steps": 4,
        "super_res_num_inference_steps": 2,
        "prior_guidance_scale": guided,
        "decoder_guidance_scale": guided,
        "generator": generator(),
        "output_type": "np",
    }
    return Case(pipe, arguments, None)


# img/sf, with two schedulers


@case("StableUnCLIPPipeline")
def stable_unclip(cls, guidance):
    """Stable Diffusion from an embedding that a prior makes; the callback is called by both."""
    normalizer = stable_unclip_image_normalizer.StableUnCLIPImageNormalizer(TEXT)
    torch.nn.init.normal_(normalizer.mean)
    torch.nn.init.uniform_(normalizer.std, 0.5, 1.5)
    pipe = cls(
        prior_tokenizer=tokenizer(LENGTH),
        prior_text_encoder=clip("CLIPTextModelWithProjection"),
        prior=prior(),
        prior_scheduler=diffusers.DDPMScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(),
        tokenizer=tokenizer(),
        text_encoder=clip(),
        unet=tiny.unet(
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * TEXT
        ),
        scheduler=ddim(prediction_type="v_prediction"),
        vae=tiny.vae(**SCALE),
    )
    guided = {**scale(guidance), "prior_guidance_scale": 3.5 if guidance else 1.0}
    return Case(pipe, sized(4, **PROMPT, **guided, prior_num_inference_steps=3))


# tok/amused


@case("AmusedPipeline")
def amused(cls, guidance):
    """Amused, whose latents are tokens, masked ones among them."""
    transformer = diffusers.UVit2DModel(
        hidden_size=8,
        cond_embed_dim=TEXT,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=TEXT,
        vocab_size=13,
        codebook_size=12,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    pipe = cls(
        vqvae=vq(8, lookup_from_codebook=True, mid_block_add_attention=False),
        transformer=filled(transformer),
        scheduler=diffusers.AmusedScheduler(mask_token_id=12),
        **NO_TEXT,
    )
    prompts = noise(4, 2, 5, TEXT)
    text = {"prompt_embeds": prompts[0, :, 0], "encoder_hidden_states": prompts[1]}
    if guidance:
        text["negative_prompt_embeds"] = prompts[2, :, 0]
        text["negative_encoder_hidden_states"] = prompts[3]
    return Case(pipe, sized(4, **text, **scale(guidance)), "vqvae", settled=0)


# tok/vqdiff


@case("VQDiffusionPipeline")
def vq_diffusion(cls, guidance):
    """VQ Diffusion, whose latents are tokens in one row; its images are square."""
    transformer = diffusers.Transformer2DModel(
        sample_size=6,
        num_vector_embeds=13,
        num_embeds_ada_norm=12,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=18,
        cross_attention_dim=TEXT,
        attention_bias=True,
        activation_fn="geglu-approximate",
    )
    learned = diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion
    pipe = cls(
        vqvae=vq(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        transformer=filled(transformer),
        scheduler=diffusers.VQDiffusionScheduler(num_vec_classes=13, num_train_timesteps=12),
        learned_classifier_free_sampling_embeddings=(
            learned.LearnedClassifierFreeSamplingEmbeddings(learnable=False)
        ),
    )
    arguments = {**PROMPT, "num_images_per_prompt": 2, **scale(guidance)}
    return Case(pipe, call(4, **arguments), "vqvae", settled=0)


# flat/unidiffuser


@case("UniDiffuserPipeline")
def unidiffuser(cls, guidance):
    """UniDiffuser from text; its latents are one row of numbers, its images are square."""
    decoder = UniDiffuserTextDecoder(
        prefix_length=77,
        prefix_inner_dim=TEXT,
        prefix_hidden_dim=TEXT,
        vocab_size=len(WORDS),
        n_positions=128,
        n_embd=16,
        n_layer=1,
        n_head=2,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=TEXT,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=8,
        patch_size=4,
    )
    unet = diffusers.UniDiffuserModel(
        text_dim=TEXT,
        clip_img_dim=TEXT,
        num_text_tokens=77,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        norm_type="unidiffuser",
        norm_elementwise_affine=False,
        use_data_type_embedding=True,
    )
    pipe = cls(
        vae=tiny.vae(**SCALE),
        text_encoder=clip(),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        clip_image_processor=None,
        clip_tokenizer=None,
        text_decoder=decoder.eval(),
        text_tokenizer=None,
        unet=filled(unet),
        scheduler=diffusers.DPMSolverMultistepScheduler(**tiny.BETAS),
    )
    pipe.set_text_to_image_mode()
    prompts = noise(2, 2, 77, TEXT)
    text = {"prompt_embeds": prompts[0]}
    if guidance:
        text["negative_prompt_embeds"] = prompts[1]
    return Case(pipe, call(height=32, width=32, num_images_per_prompt=2, **text, **scale(guidance)))


# 3d/shape


@case("ShapEPipeline")
def shap_e(cls, guidance):
    """Shap-E, whose latents are a shape."""
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        background=(0.1, 0.2, 0.3),
    )
    renderer.decode_to_image = partial(  # which would take seconds with as many as usual
        renderer.decode_to_image, n_coarse_samples=2, n_fine_samples=2
    )
    pipe = cls(
        prior=prior(
            embedding_dim=16,
            num_embeddings=32,
            embedding_proj_dim=TEXT,
            time_embed_dim=64,
            clip_embed_dim=32,
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            embedding_proj_norm_type=None,
            encoder_hid_proj_type=None,
            added_emb_type=None,
        ),
        text_encoder=clip("CLIPTextModelWithProjection"),
        tokenizer=tokenizer(),
        scheduler=diffusers.HeunDiscreteScheduler(
            beta_schedule="exp",
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
        ),
        shap_e_renderer=renderer.eval(),
    )
    arguments = {"prompt": "a red fox", "frame_size": 32, **scale(guidance)}
    return Case(pipe, call(**arguments), None)


# aud/mel_sf


def vocoder():
    """A model that makes sound of a spectrogram."""
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return transformers.SpeechT5HifiGan(config).eval()


@case("AudioLDM2Pipeline")
def audioldm2(cls, guidance):
    """AudioLDM 2, whose images are spectrograms of sound."""
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(TEXT, TEXT),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    pipe = cls(
        vae=tiny.vae(in_channels=1, out_channels=1, **SCALE),
        unet=unet.eval(),
        scheduler=ddim(),
        vocoder=vocoder(),
        feature_extractor=None,
        text_encoder_2=t5(),  # this and the next are asked for their types only
        language_model=transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2)
        ),
        **without("tokenizer_2", "projection_model"),
        **NO_TEXT,
    )
    text = embeddings(guidance)
    text["attention_mask"] = text.pop("prompt_attention_mask")
    more = {"generated_prompt_embeds": noise(2, 3, TEXT, seed=8)}
    if guidance:
        text["negative_attention_mask"] = text.pop("negative_prompt_attention_mask")
        more["negative_generated_prompt_embeds"] = noise(2, 3, TEXT, seed=9)
    arguments = {**text, **more, **scale(guidance), "num_waveforms_per_prompt": 2}
    return Case(pipe, call(audio_length_in_s=0.01, **arguments))


# aud/none


def oobleck():
    """An autoencoder of stereo sound, with 4x down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how it normalises its weights
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=2,
            sampling_rate=16,
        )
    return vae.eval()


@case("StableAudioPipeline")
def stable_audio(cls, guidance):
    """Stable Audio, whose latents are a row."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        cross_attention_input_dim=TEXT,
        time_proj_dim=8,
        global_states_input_dim=2 * TEXT,
    )
    projection = StableAudioProjectionModel(
        text_encoder_dim=TEXT, conditioning_dim=TEXT, min_value=0, max_value=8
    )
    pipe = cls(
        vae=oobleck(),
        projection_model=projection.eval(),
        transformer=filled(transformer),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        **NO_TEXT,
    )
    text = embeddings(guidance, masks=None)
    arguments = {**text, **scale(guidance), "num_waveforms_per_prompt": 2, "output_type": "pt"}
    return Case(pipe, call(audio_end_in_s=2.5, **arguments))


# aud/transpose


@case("AceStepPipeline")
def ace_step(cls, guidance):
    """ACE-Step, whose latents are a row, channels last."""
    layers = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    transformer = diffusers.AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, **layers
    )
    conditions = ace_step_models.AceStepConditionEncoder(
        text_hidden_dim=TEXT,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **layers,
    )
    pipe = cls(
        vae=oobleck(),
        transformer=filled(transformer),
        condition_encoder=filled(conditions),
        text_encoder=t5(),
        tokenizer=tokenizer(256),
        scheduler=euler(num_train_timesteps=1),
    )
    arguments = {**PROMPT, "lyrics": ["a fox", "a cat"], **scale(guidance), "output_type": "pt"}
    return Case(pipe, call(audio_duration=2.5, **arguments))


# comb


def prior_parts():
    """The prior of a combined pipeline."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=TEXT,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=8,
        patch_size=4,
    )
    return {
        "prior_prior": prior(),
        "prior_image_encoder": transformers.CLIPVisionModelWithProjection(vision).eval(),
        "prior_text_encoder": clip("CLIPTextModelWithProjection"),
        "prior_tokenizer": tokenizer(LENGTH),
        "prior_scheduler": prior_scheduler(),
        "prior_image_processor": None,
    }


def combined(pipe, guidance, **arguments):
    """A combined Kandinsky pipeline."""
    guided = 3.5 if guidance else 1.0
    return Case(
        pipe,
        sized(
            4,
            **PROMPT,
            guidance_scale=guided,
            prior_guidance_scale=guided,
            prior_num_inference_steps=3,
            **arguments,
        ),
        "decoder_pipe.movq",
    )


@case("KandinskyV22CombinedPipeline")
def kandinsky22_combined(cls, guidance):
    """Kandinsky 2.2 with its prior."""
    parts = {**kandinsky_parts(), "scheduler": diffusers.DDPMScheduler(**tiny.BETAS)}
    return combined(cls(**parts, **prior_parts()), guidance)


@case("KandinskyCombinedPipeline")
def kandinsky21_combined(cls, guidance):
    """Kandinsky 2.1 with its prior."""
    return combined(cls(**kandinsky21_parts(), **prior_parts()), guidance)


@case("StableCascadeCombinedPipeline")
def cascade_combined(cls, guidance):
    """Stable Cascade with its prior."""
    first = cascade_unet(
        in_channels=4,
        out_channels=4,
        clip_text_in_channels=TEXT,
        clip_image_in_channels=TEXT,
        switch_level=[False],
    )
    pipe = cls(
        tokenizer=tokenizer(),
        text_encoder=clip("CLIPTextModelWithProjection"),
        decoder=cascade_decoder(),
        scheduler=wuerstchen_scheduler(),
        vqgan=vqgan(),
        prior_prior=first,
        prior_text_encoder=clip("CLIPTextModelWithProjection"),
        prior_tokenizer=tokenizer(),
        prior_scheduler=wuerstchen_scheduler(),
    )
    guided = 3.5 if guidance else 1.0
    arguments = {
        **PROMPT,
        "height": 128,
        "width": 168,
        "num_images_per_prompt": 2,
        "prior_num_inference_steps": 3,
        "prior_guidance_scale": guided,
        "decoder_guidance_scale": guided,
    }
    return Case(pipe, call(4, **arguments), "decoder_pipe.vqgan")


# img/k5


@case("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline")
def kandinsky5(cls, guidance):
    """Kandinsky 5, from text or an image, which gives the latents further channels."""
    from_image = cls is diffusers.Kandinsky5I2IPipeline
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=TEXT,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        visual_cond=from_image,
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=deep_vae(**SCALE),
        scheduler=euler(shift=3.0),
        **without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    pipe.resolutions = [(WIDTH, HEIGHT)]
    tokens = embeddings(guidance, masks=None)
    text = {}
    for sign in ("", "negative_") if guidance else ("",):
        text[f"{sign}prompt_embeds_qwen"] = tokens[f"{sign}prompt_embeds"]
        text[f"{sign}prompt_embeds_clip"] = tokens[f"{sign}prompt_embeds"][:, 0]
        text[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 5, 10], dtype=torch.int32)
    given = {"image": [picture(), picture(seed=1)]} if from_image else {}
    return Case(pipe, sized(**text, **given, **scale(guidance), **ONE_IMAGE))


# modular


def modular(pipe, parts):
    """A modular pipeline with its parts, and without a progress bar."""
    pipe.update_components(**parts)
    loops = list(pipe._blocks.sub_blocks.values())
    for block in loops:
        loops += getattr(block, "sub_blocks", {}).values()
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def guider(guidance):
    """The part of a modular pipeline that guides."""
    return {
        "guider": diffusers.guiders.ClassifierFreeGuidance(guidance_scale=3.5 if guidance else 1.0)
    }


@case("FluxModularPipeline")
def flux_modular(cls, guidance):
    """Flux of blocks, whose guidance is an embedding."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    parts = {
        "text_encoder": clip(),
        "tokenizer": tokenizer(77),
        "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(),
        "vae": tiny.vae(**SHIFT),
        "scheduler": euler(use_dynamic_shifting=True),
        "transformer": filled(transformer),
    }
    arguments = {**PROMPT, "max_sequence_length": 8, **scale(guidance)}
    return Case(modular(cls(), parts), sized(**arguments, output="images"))


@case("StableDiffusionXLModularPipeline")
def sdxl_modular(cls, guidance):
    """Stable Diffusion XL of blocks."""
    unet = tiny.unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + TEXT,
    )
    unet = diffusers.UNet2DConditionModel.from_config(
        {**unet.config, "cross_attention_dim": 2 * TEXT}
    )
    parts = {
        "text_encoder": clip(layers=2),
        "tokenizer": tokenizer(77),
        "text_encoder_2": clip("CLIPTextModelWithProjection", layers=2),
        "tokenizer_2": tokenizer(77),
        "vae": tiny.vae(**SCALE, **statistics(4)),
        "scheduler": diffusers.EulerDiscreteScheduler(**tiny.BETAS),
        "unet": unet.eval(),
        **guider(guidance),
    }
    return Case(modular(cls(), parts), sized(**PROMPT, output="images"))


@case("QwenImageModularPipeline")
def qwen_modular(cls, guidance):
    """QwenImage of blocks."""
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        **statistics(4),
    )
    parts = {
        "vae": vae.eval(),
        "scheduler": euler(use_dynamic_shifting=True),
        "transformer": filled(transformer),
        **guider(guidance),
    }
    text = embeddings(True, masks="embeds")
    return Case(modular(cls(), parts), sized(**text, output="images"))


@case("WanModularPipeline")
def wan_modular(cls, guidance):
    """Wan of blocks."""
    transformer = diffusers.WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        text_dim=TEXT,
        freq_dim=8,
        ffn_dim=16,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics(4)
    )
    parts = {
        "vae": vae.eval(),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "transformer": filled(transformer),
        **guider(guidance),
    }
    blocks = diffusers.WanBlocks()
    blocks.sub_blocks.pop("text_encoder")  # needs ftfy
    text = embeddings(True, masks=None)
    arguments = {**text, "num_frames": 9, "num_videos_per_prompt": 2}
    return Case(modular(cls(blocks), parts), call(**SIZE, **arguments, output="videos"))
