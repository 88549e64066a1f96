"""Packed and patchified image pipelines: latents are tokens, or 2x2 patches in the channels."""

import diffusers
import numpy
import tiny
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zoo import Case, case, filled, generator, joined, last, noise, statistics

SIZE = {"height": 32, "width": 48}  # 16 x 24 latents, 8 x 12 patches
TEXT = 16  # width of the text embeddings
TOKENS, LONGEST = 300, 512
SCALE = {"scaling_factor": 0.37, "shift_factor": 0.21}
ONE_IMAGE = {"num_images_per_prompt": 1}  # where more cannot be had, or would take too long
PROMPTS = ["a red fox", "two boats on a lake"]
NEGATIVE = ["blurry", "a drawing"]
TEMPLATE = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
IMAGE = "<|image_pad|>"


def call(steps=3, **arguments):
    """What a pipeline is called with that has its size from elsewhere."""
    return {
        "num_images_per_prompt": 2,
        "num_inference_steps": steps,
        "generator": generator(),
        "output_type": "np",
        **arguments,
    }


def sized(**arguments):
    """What most pipelines here are called with."""
    return call(**{**SIZE, **arguments})


def guided(is_on, prompts, negative, *, name="guidance_scale", off=1.0, **masks):
    """Embeddings, and guidance under the name that the pipeline has for it."""
    arguments = {"prompt_embeds": prompts, name: 3.5 if is_on else off, **masks}
    if is_on:
        arguments["negative_prompt_embeds"] = negative
        arguments |= {f"negative_{mask}": mask_of for mask, mask_of in masks.items()}
    return arguments


def masked(is_on, *, batch=2, shape=(5, TEXT), **options):
    """Embeddings with masks, and guidance, as the Qwen-Image family takes them."""
    mask_of = torch.ones(batch, shape[0], dtype=torch.bool)
    return guided(is_on, *noise(2, batch, *shape), prompt_embeds_mask=mask_of, **options)


def asked(is_on, **arguments):
    """Prompts as text, and guidance."""
    scale = 3.5 if is_on else 1.0
    return {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "guidance_scale": scale, **arguments}


def picture(width=48, height=32, seed=0, mode="RGB"):
    """An image of random pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, len(mode)))
    return Image.fromarray(pixels.astype(numpy.uint8))


def half():
    """A mask whose right half is to be painted."""
    mask = Image.new("L", (48, 32))
    mask.paste(255, (24, 0, 48, 32))
    return mask


def euler():
    """The scheduler of these pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler()


def shifted():
    """The scheduler of these pipelines, with a shift that depends on the size."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


# --- autoencoders, besides the one of tiny.py


def video_vae(name="AutoencoderKLQwenImage", *, channels=4, levels=2, base=4, blocks=1, **config):
    """A video autoencoder that is used for images, with 2x down per level after the first."""
    return filled(
        getattr(diffusers, name)(
            base_dim=base,
            z_dim=channels,
            dim_mult=[1] * levels,
            num_res_blocks=blocks,
            temperal_downsample=[False] * (levels - 1),
            **statistics(channels),
            **config,
        )
    )


def wan_vae(patch):
    """A video autoencoder that makes `patch` x `patch` pixels channels, and then 2x down."""
    return video_vae(
        "AutoencoderKLWan",
        blocks=0,
        patch_size=patch,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        scale_factor_spatial=2 * patch,
    )


def patch_vae():
    """The autoencoder whose statistics are those of a batch norm, over 2x2 patches."""
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        batch_norm_eps=0.05,
    )
    mean, variance = noise(2, 16)
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(variance.square() + 0.1)
    return vae.eval()


def deep_vae():
    """An autoencoder with 32x down and little work per pixel, for large images."""
    return diffusers.AutoencoderKL(
        block_out_channels=(2,) * 6,
        down_block_types=("DownEncoderBlock2D",) * 6,
        up_block_types=("UpDecoderBlock2D",) * 6,
        latent_channels=16,
        norm_num_groups=1,
        **SCALE,
    ).eval()


# --- text encoders, for pipelines that take no embeddings

LANGUAGE = {
    "vocab_size": TOKENS,
    "hidden_size": TEXT,
    "intermediate_size": TEXT,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def tokenizer():
    """A tokenizer whose tokens are bytes, and those that templates use."""
    special = [*TEMPLATE, IMAGE]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=special[0],
        eos_token=special[0],
        additional_special_tokens=special[1:],
        model_max_length=LONGEST,
        chat_template="{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
    )


class Processor:
    """The part of a vision-language processor that is used; the whole one needs torchvision."""

    def __init__(self):
        self.tokenizer = tokenizer()
        self.image_processor = transformers.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
        )

    def __call__(self, text, images=None, **arguments):
        """Tokens of texts, which have nothing of the images."""
        return self.tokenizer(text, **arguments)

    def apply_chat_template(self, messages, **arguments):
        """Tokens of a conversation."""
        return [self.tokenizer.apply_chat_template(messages, **arguments)]


def reader(name="Qwen2_5_VLForConditionalGeneration", layers=1):
    """A vision-language model."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**LANGUAGE, "num_hidden_layers": layers, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": TEXT,
            "intermediate_size": TEXT,
            "num_heads": 2,
            "out_hidden_size": TEXT,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=len(TEMPLATE),
        vision_start_token_id=TEMPLATE.index("<|vision_start|>"),
    )
    return getattr(transformers, name)(config).eval()


# --- pack/flux, pack/flux_global, pack/visualcloze


def flux_transformer(name="FluxTransformer2DModel", **config):
    """A Flux denoiser, or its ControlNet, for 4 latent channels."""
    config = {"in_channels": 16, "guidance_embeds": True, **config}
    return filled(
        getattr(diffusers, name)(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=(2, 2, 4),
            **config,
        )
    )


def flux(cls, *, transformer=None, parts=None, **arguments):
    """A Flux pipeline of any class without text encoders, and its call."""
    pipe = cls(
        transformer=transformer or flux_transformer(),
        vae=tiny.vae(**SCALE),
        scheduler=shifted(),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        **parts or {},
    )
    prompts = noise(2, 5, TEXT)
    arguments = {"prompt_embeds": prompts, "pooled_prompt_embeds": prompts[:, 0], **arguments}
    return Case(pipe, sized(**ONE_IMAGE, **arguments))


def flux_guided(is_on):
    """The arguments of true guidance, or none."""
    negative = noise(2, 5, TEXT, seed=6)
    arguments = {
        "true_cfg_scale": 3.5,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative[:, 0],
    }
    return arguments if is_on else {}


@case("FluxPipeline")
def flux_text(cls, guidance):
    """Flux from text."""
    return flux(cls, **flux_guided(guidance))


@case("FluxImg2ImgPipeline")
def flux_image(cls, guidance):
    """Flux from an image."""
    return flux(cls, image=picture(), strength=0.8, steps=5, **flux_guided(guidance))


@case("FluxControlPipeline")
def flux_control(cls, guidance):
    """Flux with a control image in the channels; its guidance is an embedding."""
    transformer = flux_transformer(in_channels=32, out_channels=16)
    return flux(cls, transformer=transformer, control_image=picture())


@case("FluxFillPipeline")
def flux_fill(cls, guidance):
    """Flux with a masked image and the mask in the channels; its guidance is an embedding."""
    transformer = flux_transformer(in_channels=48, out_channels=16)
    return flux(cls, transformer=transformer, image=picture(), mask_image=half())


@case("FluxKontextPipeline")
def flux_kontext(cls, guidance):
    """Flux with a reference of another size behind the tokens; the size asked for is halved."""
    return flux(
        cls,
        image=picture(40, 24),
        height=64,
        width=96,
        max_area=32 * 48,
        _auto_resize=False,
        **flux_guided(guidance),
    )


@case("FluxControlNetInpaintPipeline")
def flux_controlnet_inpaint(cls, guidance):
    """Flux with a ControlNet, painting inside a mask; its guidance is an embedding."""
    return flux(
        cls,
        parts={"controlnet": flux_transformer("FluxControlNetModel")},
        image=picture(),
        mask_image=half(),
        control_image=picture(seed=1),
        strength=0.8,
        steps=5,
    )


@case("ChromaPipeline")
def chroma(cls, guidance):
    """Chroma, with attention masks."""
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=tiny.vae(**SCALE),
        scheduler=shifted(),
        text_encoder=None,
        tokenizer=None,
    )
    embeddings = guided(guidance, *noise(2, 2, 5, TEXT), prompt_attention_mask=torch.ones(2, 5))
    return Case(pipe, sized(**ONE_IMAGE, **embeddings))


def visualcloze_parts():
    """The components of VisualCloze, which is Flux filling in pictures, with its text encoders."""
    clip = transformers.CLIPTextConfig(
        vocab_size=TOKENS,
        max_position_embeddings=LONGEST,
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    t5 = transformers.T5Config(
        vocab_size=TOKENS, d_model=TEXT, d_kv=8, d_ff=TEXT, num_layers=1, num_heads=2
    )
    return {
        "transformer": flux_transformer(in_channels=48, out_channels=16),
        "vae": tiny.vae(**SCALE),
        "scheduler": shifted(),
        "text_encoder": transformers.CLIPTextModel(clip).eval(),
        "tokenizer": tokenizer(),
        "text_encoder_2": transformers.T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizer(),
        "resolution": 32,
    }


def visualcloze_call(**arguments):
    """Two prompts, each with an example, and a row of another shape with a picture missing."""
    samples = [
        [[picture(seed=n), picture(seed=n + 1)], [picture(24, 40, seed=n + 2), None]]
        for n in (0, 3)
    ]
    return call(
        task_prompt=PROMPTS,
        content_prompt=NEGATIVE,
        image=samples,
        max_sequence_length=160,
        **arguments,
    )


@case("VisualClozeGenerationPipeline")
def visualcloze_generation(cls, guidance):
    """VisualCloze, which decodes the last row of one sample at a time."""
    return Case(cls(**visualcloze_parts()), visualcloze_call())


@case("VisualClozePipeline")
def visualcloze(cls, guidance):
    """VisualCloze, then a second pipeline on the same components that makes it larger."""
    pipe = cls(**visualcloze_parts())
    for inner in (pipe.generation_pipe, pipe.upsampling_pipe):
        inner.set_progress_bar_config(disable=True)
    size = {"upsampling_height": 64, "upsampling_width": 24}
    return Case(pipe, visualcloze_call(**size), decoded=last)


# --- pack/flux and pack/flux_calc: LongCat, whose embeddings it does not let pass


def longcat(cls, vae, **arguments):
    """A LongCat pipeline of any class, with 16 latent channels as it insists, and its call."""
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=[4, 2, 2],
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=vae,
        scheduler=shifted(),
        text_encoder=reader(),
        tokenizer=tokenizer(),
        text_processor=Processor(),
    )
    pipe.tokenizer_max_length = 24
    return Case(pipe, call(**arguments))


@case("LongCatImagePipeline")
def longcat_text(cls, guidance):
    """LongCat-Image from text, which has no callback."""
    vae = tiny.vae(16, **SCALE)
    return longcat(cls, vae, **SIZE, **asked(guidance), enable_prompt_rewrite=False)


@case("LongCatImageEditPipeline")
def longcat_edit(cls, guidance):
    """LongCat-Image editing a picture, at about a megapixel whatever its size; no callback."""
    prompts = {"prompt": "a fox", "negative_prompt": "a dog"}
    return longcat(cls, deep_vae(), image=picture(), **asked(guidance, **prompts))


# --- pack/qwen, pack/qwen_layered, pack/qwen21


def qwen(cls, vae, *, channels=4, config=None, parts=None, **arguments):
    """A Qwen-Image pipeline of any class, and its call."""
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
        **config or {},
    )
    parts = {"text_encoder": None, "tokenizer": None, **(parts or {})}
    pipe = cls(transformer=filled(transformer), vae=vae, scheduler=shifted(), **parts)
    return Case(pipe, call(**arguments))


@case("QwenImagePipeline")
def qwen_text(cls, guidance):
    """Qwen-Image from text."""
    return qwen(cls, video_vae(), **SIZE, **masked(guidance, name="true_cfg_scale"))


@case("QwenImageImg2ImgPipeline")
def qwen_image(cls, guidance):
    """Qwen-Image from an image."""
    arguments = masked(guidance, name="true_cfg_scale")
    return qwen(cls, video_vae(), **SIZE, image=picture(), strength=0.8, steps=5, **arguments)


@case("QwenImageEditPipeline")
def qwen_edit(cls, guidance):
    """Qwen-Image with a reference behind the tokens, which is about a megapixel in any case."""
    return qwen(
        cls,
        video_vae(levels=6, base=2, blocks=0),
        parts={"processor": None},
        image=picture(),
        height=128,
        width=192,
        **masked(guidance, name="true_cfg_scale"),
    )


@case("QwenImageLayeredPipeline")
def qwen_layered(cls, guidance):
    """Qwen-Image taking a picture apart into two layers with alpha, at about 640 x 640.

    With 4 latent channels it would take the picture for latents; it cannot have two prompts, and
    two images for each.
    """
    return qwen(
        cls,
        video_vae(channels=5, levels=6, base=2, blocks=0, input_channels=4),
        channels=5,
        config={"use_layer3d_rope": True, "use_additional_t_cond": True},
        parts={"text_encoder": reader(), "processor": None},
        image=picture(mode="RGBA"),
        prompt="a fox",
        layers=2,
        **masked(guidance, name="true_cfg_scale", batch=1),
    )


@case("QwenImage21Pipeline")
def qwen21(cls, guidance):
    """Qwen-Image 2.1, whose tokens are single latents, of an autoencoder with a scale of 16."""
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=TEXT,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=video_vae("AutoencoderKLQwenImage21", levels=5, is_residual=False, decoder_base_dim=4),
        scheduler=shifted(),
        text_encoder=None,
        processor=Processor(),
    )
    return Case(pipe, call(height=64, width=96, **masked(guidance, name="true_cfg_scale")))


# --- pack/flux2, pack/flux2_inpaint, img/bn_unpatch, img/fibo2, pack/ideogram4


def flux2(cls, *, guidance_embeds=False, **arguments):
    """A Flux 2 pipeline of any class without a text encoder, and its call."""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=patch_vae(),
        scheduler=shifted(),
        text_encoder=None,
        tokenizer=None,
    )
    return Case(pipe, sized(**{"prompt_embeds": noise(2, 5, TEXT), **arguments}))


@case("Flux2Pipeline")
def flux2_text(cls, guidance):
    """Flux 2 with a reference of another size; its guidance is an embedding."""
    return flux2(cls, guidance_embeds=True, image=picture(96, 64))


@case("Flux2KleinPipeline")
def flux2_klein(cls, guidance):
    """Flux 2 Klein from text."""
    return flux2(cls, **guided(guidance, *noise(2, 2, 5, TEXT)))


@case("Flux2KleinKVPipeline")
def flux2_klein_kv(cls, guidance):
    """Flux 2 Klein, without guidance, with a reference that only the first step is given."""
    return flux2(cls, image=picture(96, 64))


@case("Flux2KleinInpaintPipeline")
def flux2_klein_inpaint(cls, guidance):
    """Flux 2 Klein, painting inside a mask."""
    embeddings = guided(guidance, *noise(2, 2, 5, TEXT))
    masked_image = {"image": picture(), "mask_image": half()}
    return flux2(cls, **masked_image, strength=0.8, steps=5, **embeddings)


@case("ErnieImagePipeline")
def ernie(cls, guidance):
    """ERNIE-Image, whose latents are patches in the channels, for prompts of different lengths."""
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=TEXT,
        rope_axes_dim=(4, 2, 2),
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=patch_vae(),
        scheduler=euler(),
        text_encoder=None,
        tokenizer=None,
    )
    prompts = [noise(5, TEXT), noise(3, TEXT)]
    return Case(pipe, sized(**guided(guidance, prompts, list(noise(2, 4, TEXT, seed=6)))))


@case("BriaFibo2Pipeline")
def fibo2(cls, guidance):
    """FIBO 2, whose latents are an image, but whose statistics are those of patches."""
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=TEXT,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=1,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(8, 4, 4),
        axes_lens=(32, 32, 32),
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=patch_vae(),
        scheduler=shifted(),
        text_encoder=None,
        processor=None,
    )
    return Case(pipe, sized(**guided(guidance, *noise(2, 2, 2, 5, TEXT))))


def ideogram4_transformer():
    """A denoiser of Ideogram 4, which has one with the prompt and one without."""
    return filled(
        diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=16,
            llm_features_dim=13 * TEXT,
            mrope_section=(2, 1, 1),
        )
    )


@case("Ideogram4Pipeline")
def ideogram4(cls, guidance):
    """Ideogram 4, whose text encoder must have 36 layers."""
    pipe = cls(
        transformer=ideogram4_transformer(),
        unconditional_transformer=ideogram4_transformer(),
        vae=patch_vae(),
        scheduler=euler(),
        text_encoder=reader("Qwen2_5_VLModel", layers=36),
        tokenizer=tokenizer(),
    )
    arguments = asked(guidance, guidance_schedule=None, max_sequence_length=24)
    del arguments["negative_prompt"]
    return Case(pipe, sized(**arguments))


# --- pack/bria and pack/fibo


@case("BriaPipeline")
def bria(cls, guidance):
    """Bria, which counts the 2x2 patches in the scale of its autoencoder."""
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=[2, 2, 4],
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=tiny.vae(**SCALE),
        scheduler=shifted(),
        text_encoder=None,
        tokenizer=None,
    )
    return Case(pipe, sized(**ONE_IMAGE, **guided(guidance, *noise(2, 2, 5, TEXT))))


def fibo(cls, guidance, *, channels=4, **arguments):
    """FIBO, with a language model, and an autoencoder that must have a scale of 16."""
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT,
        text_encoder_dim=TEXT,
        axes_dims_rope=[4, 2, 2],
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=wan_vae(8),
        scheduler=shifted(),
        text_encoder=transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**LANGUAGE)).eval(),
        tokenizer=tokenizer(),
    )
    return Case(pipe, call(height=64, width=96, **asked(guidance), **arguments))


@case("BriaFiboPipeline")
def fibo_flat(cls, guidance):
    """FIBO, whose tokens are single latents."""
    return fibo(cls, guidance)


@case("BriaFiboPipeline:patched")
def fibo_patched(cls, guidance):
    """FIBO, whose tokens are 2x2 patches."""
    return fibo(cls, guidance, channels=16, do_patching=True)


# --- pack/krea2 and pack/nucleus


@case("Krea2Pipeline")
def krea2(cls, guidance):
    """Krea 2, with the hidden states of three layers of its text encoder."""
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=TEXT,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=video_vae(),
        scheduler=shifted(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_select_layers=(0, 1, 2),
    )
    return Case(pipe, sized(**masked(guidance, off=0.0, shape=(5, 3, TEXT))))


@case("NucleusMoEImagePipeline")
def nucleus(cls, guidance):
    """Nucleus-Image, without its experts."""
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 2, 2),
        mlp_ratio=12.0,
        moe_enabled=False,
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=video_vae(),
        scheduler=shifted(),
        text_encoder=None,
        processor=None,
    )
    return Case(pipe, sized(**masked(guidance)))


# --- img/joy and img/joyplus


def joy_parts(transformer):
    """The components of JoyImage that paint."""
    config = {
        "in_channels": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "text_dim": TEXT,
        "num_layers": 1,
        "rope_dim_list": [4, 2, 2],
    }
    denoiser = filled(getattr(diffusers, transformer)(**config))
    return {"transformer": denoiser, "vae": wan_vae(32), "scheduler": euler()}


def painted(decodes):
    """Every second item of a run's decodes, as the others are references."""
    return joined(decodes)[1::2]


@case("JoyImageEditPipeline")
def joy(cls, guidance):
    """JoyImage editing two pictures, at about a megapixel whatever their size."""
    parts = joy_parts("JoyImageEditTransformer3DModel")
    pipe = cls(**parts, text_encoder=None, tokenizer=None, processor=None)
    pictures = [picture(40, 24), picture(40, 24, seed=1)]
    return Case(pipe, call(image=pictures, **ONE_IMAGE, **masked(guidance)), decoded=painted)


@case("JoyImageEditPlusPipeline")
def joy_plus(cls, guidance):
    """JoyImage with one reference and with two, which are about a megapixel in any case."""
    parts = joy_parts("JoyImageEditPlusTransformer3DModel")
    pipe = cls(**parts, text_encoder=reader(), tokenizer=None, processor=Processor())
    arguments = call(
        images=[[picture(40, 24)], [picture(40, 24, seed=1), picture(24, 40, seed=2)]],
        height=256,
        width=384,
        max_sequence_length=16,
        **asked(guidance),
    )
    del arguments["num_images_per_prompt"]
    return Case(pipe, arguments)


# --- img/hyrefiner


@case("HunyuanImageRefinerPipeline")
def hunyuan_refiner(cls, guidance):
    """The refiner of HunyuanImage, whose latents hold two frames in their channels."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        guidance_embeds=True,
        text_embed_dim=TEXT,
        rope_axes_dim=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=0.37,
    )
    pipe = cls(
        transformer=filled(transformer),
        vae=vae.eval(),
        scheduler=euler(),
        text_encoder=None,
        tokenizer=None,
        guider=diffusers.AdaptiveProjectedMixGuidance(enabled=guidance),
    )
    embeddings = masked(guidance, name="distilled_guidance_scale")
    return Case(pipe, sized(image=picture(), **embeddings))
