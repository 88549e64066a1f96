"""Video pipelines whose latents keep their axes."""

import numpy as np
import tiny
import torch
from diffusers import (
    AllegroTransformer3DModel,
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    ChronoEditTransformer3DModel,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EasyAnimateTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    I2VGenXLUNet,
    LatteTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import (
    FramepackSamplingType,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from zoo import CASES, Case, case, filled, generator, last, noise, statistics

HEIGHT, WIDTH, FRAMES = 32, 48, 9  # 4, 6 and 3 latents with the usual compression
SIZE = {"height": HEIGHT, "width": WIDTH}
SMALL = {"height": 16, "width": 24}  # for less compression
TEXT = 16  # width of the text embeddings
NO_TEXT = {"text_encoder": None, "tokenizer": None}


def picture(width=WIDTH, height=HEIGHT, seed=9):
    """A random picture."""
    pixels = noise(height, width, 3, seed=seed).sigmoid() * 255
    return Image.fromarray(pixels.byte().numpy())


def pictures(count, width=WIDTH, height=HEIGHT):
    """Random pictures, each another."""
    return [picture(width, height, seed=20 + n) for n in range(count)]


def embeddings(batch=2):
    """Embeddings of prompts and of negative prompts."""
    return {
        "prompt_embeds": noise(batch, 5, TEXT),
        "negative_prompt_embeds": noise(batch, 5, TEXT, seed=6),
    }


def without(call, *names):
    """A call without some of its arguments."""
    return {name: value for name, value in call.items() if name not in names}


def sampling(guidance, **arguments):
    """What all calls have in common; 3 steps and a size of 32 x 48."""
    return {
        **SIZE,
        "num_inference_steps": 3,
        "guidance_scale": 3.5 if guidance else 1.0,
        "generator": generator(),
        "output_type": "np",
        **arguments,
    }


def wan_vae():
    """Wan's autoencoder, 8x down in space and 4x in time."""
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics(4)
    ).eval()


def wan_transformer(cls=WanTransformer3DModel, **config):
    """A denoiser of Wan's architecture."""
    return filled(
        cls(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": TEXT,
                "freq_dim": 16,
                "ffn_dim": 16,
                "num_layers": 1,
                **config,
            }
        )
    )


def wan_parts(**parts):
    """What pipelines with Wan's autoencoder have in common."""
    return {
        "vae": wan_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        **NO_TEXT,
        **parts,
    }


def image_encoder(cls=CLIPVisionModel, processor="image_processor", width=8, size=4):
    """A CLIP model for pictures, and its processor; gives 5 tokens, or one embedding."""
    config = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        intermediate_size=16,
        patch_size=size // 2,
    )
    return {
        "image_encoder": cls(config).eval(),
        processor: CLIPImageProcessor(crop_size=size, size=size),
    }


@case("WanPipeline")
def wan(cls, guidance):
    """Text to video, with two experts that take turns."""
    experts = {name: wan_transformer() for name in ("transformer", "transformer_2")}
    pipe = cls(**wan_parts(**experts, boundary_ratio=0.8))
    return Case(pipe, sampling(guidance, num_frames=FRAMES, **embeddings()))


@case("WanVideoToVideoPipeline")
def wan_video_to_video(cls, guidance):
    """Video to video; all but the first of the steps."""
    pipe = cls(**wan_parts(transformer=wan_transformer()))
    videos = [pictures(FRAMES), pictures(FRAMES)[::-1]]
    call = sampling(guidance, num_inference_steps=4, strength=0.8, video=videos, **embeddings())
    return Case(pipe, call)


@case("WanImageToVideoPipeline")
def wan_image_to_video(cls, guidance):
    """Image to video, with the image's latents as further channels."""
    denoiser = wan_transformer(in_channels=4 + 4 + 4, image_dim=8, added_kv_proj_dim=24)
    pipe = cls(**wan_parts(transformer=denoiser), **image_encoder())
    return Case(pipe, sampling(guidance, num_frames=FRAMES, image=picture(), **embeddings()))


def wan_image_to_video_expanded(cls, guidance):
    """Image to video, with the image as the first latent frame."""
    pipe = cls(**wan_parts(transformer=wan_transformer()), expand_timesteps=True)
    return Case(pipe, sampling(guidance, num_frames=FRAMES, image=picture(), **embeddings()))


CASES["WanImageToVideoPipeline:expand_timesteps"] = wan_image_to_video_expanded


@case("WanVACEPipeline")
def wan_vace(cls, guidance):
    """Video to video with two reference pictures, which are leading latent frames."""
    denoiser = wan_transformer(
        WanVACETransformer3DModel, num_layers=2, vace_layers=[0], vace_in_channels=2 * 4 + 8 * 8
    )
    pipe = cls(**wan_parts(transformer=denoiser))
    video = {"video": pictures(FRAMES), "mask": [Image.new("L", (WIDTH, HEIGHT), 255)] * FRAMES}
    call = sampling(guidance, num_frames=FRAMES, reference_images=[pictures(2)], **video)
    return Case(pipe, {**call, **embeddings(batch=1)})


@case("WanAnimatePipeline")
def wan_animate(cls, guidance):
    """A picture moved by a video: two segments, each with a leading reference frame."""
    denoiser = wan_transformer(
        WanAnimateTransformer3DModel,
        in_channels=4 + 4 + 4,
        latent_channels=4,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    pipe = cls(**wan_parts(transformer=denoiser), **image_encoder())
    frames = 2 * FRAMES - 1
    videos = {"pose_video": pictures(frames), "face_video": pictures(frames, 8, 8)}
    call = sampling(guidance, image=picture(), segment_frame_length=FRAMES, **videos)
    return Case(pipe, {**call, **embeddings()}, decoded=last)


def motion_unet():
    """A denoiser of pictures that also attends to other frames."""
    return filled(
        UNetMotionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=TEXT,
            num_attention_heads=2,
            norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        )
    )


def unet_3d(cls=UNet3DConditionModel):
    """A denoiser of videos from convolutions."""
    return filled(
        cls(
            sample_size=32,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=TEXT,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )


def frames_parts(**parts):
    """What pipelines that decode frame by frame have in common."""
    return {
        "vae": tiny.vae(scaling_factor=0.37),
        "scheduler": DDIMScheduler(**tiny.BETAS, clip_sample=False),
        **NO_TEXT,
        **parts,
    }


@case("AnimateDiffPipeline")
def animatediff(cls, guidance):
    """Text to video, decoded in chunks of frames."""
    pipe = cls(**frames_parts(unet=motion_unet(), motion_adapter=None))
    call = sampling(guidance, **SMALL, num_frames=3, decode_chunk_size=4, **embeddings())
    return Case(pipe, call)


@case("TextToVideoSDPipeline")
def text_to_video(cls, guidance):
    """Text to video; the scheduler gets a batch of frames."""
    pipe = cls(**frames_parts(unet=unet_3d()))
    return Case(pipe, sampling(guidance, **SMALL, num_frames=3, **embeddings()))


@case("VideoToVideoSDPipeline")
def video_to_video(cls, guidance):
    """Video to video; the scheduler gets a batch of frames."""
    pipe = cls(**frames_parts(unet=unet_3d()))
    video = [np.asarray(image) / 255 for image in pictures(3, SMALL["width"], SMALL["height"])]
    call = sampling(guidance, num_inference_steps=4, strength=0.8, video=video)
    return Case(pipe, {**without(call, "height", "width"), **embeddings(batch=1)})


@case("LattePipeline")
def latte(cls, guidance):
    """Text to video by a transformer, decoded in chunks of frames."""
    denoiser = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=TEXT,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
    )
    pipe = cls(**frames_parts(transformer=filled(denoiser)))
    call = sampling(guidance, **SMALL, video_length=3, decode_chunk_size=4, **embeddings())
    return Case(pipe, {**call, "negative_prompt": None, "num_images_per_prompt": 2})


@case("I2VGenXLPipeline")
def i2vgen(cls, guidance):
    """Image to video; the scheduler gets a batch of frames, and there is no callback."""
    encoder = image_encoder(CLIPVisionModelWithProjection, "feature_extractor", TEXT, size=8)
    pipe = cls(**frames_parts(unet=unet_3d(I2VGenXLUNet)), **encoder)
    call = sampling(guidance, **SMALL, num_frames=3, image=pictures(2), decode_chunk_size=4)
    return Case(pipe, {**call, **embeddings(), "num_videos_per_prompt": 2})


@case("StableVideoDiffusionPipeline")
def stable_video(cls, guidance):
    """Image to video with the frames before the channels, decoded in chunks of frames."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        scaling_factor=0.37,
    )
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
    )
    scheduler = EulerDiscreteScheduler(
        **tiny.BETAS, prediction_type="v_prediction", use_karras_sigmas=True, sigma_max=20.0
    )
    encoder = image_encoder(CLIPVisionModelWithProjection, "feature_extractor", TEXT, size=224)
    pipe = cls(vae=vae.eval(), unet=filled(unet), scheduler=scheduler, **encoder)
    call = sampling(guidance, **SMALL, image=pictures(2), num_frames=3, decode_chunk_size=4)
    call["max_guidance_scale"] = call.pop("guidance_scale")
    return Case(pipe, {**call, "num_videos_per_prompt": 2})


def hunyuan_vae():
    """Hunyuan's autoencoder, 8x down in space and 4x in time."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.37,
    ).eval()


def hunyuan_parts(cls=HunyuanVideoTransformer3DModel, **config):
    """What pipelines with Hunyuan's autoencoder have in common."""
    denoiser = cls(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **{"in_channels": 4, **config},
    )
    return {
        "transformer": filled(denoiser),
        "vae": hunyuan_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        **NO_TEXT,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }


def hunyuan_call(guidance, batch=2, **arguments):
    """What to call a pipeline from `hunyuan_parts` with."""
    prompts = {
        **embeddings(batch),
        "prompt_attention_mask": torch.ones(batch, 5),
        "negative_prompt_attention_mask": torch.ones(batch, 5),
        "pooled_prompt_embeds": noise(batch, 8, seed=15),
        "negative_pooled_prompt_embeds": noise(batch, 8, seed=16),
    }
    scales = {"true_cfg_scale": 3.5 if guidance else 1.0, "guidance_scale": 4.0}
    return sampling(guidance, num_frames=FRAMES, **prompts, **arguments) | scales


@case("HunyuanVideoPipeline")
def hunyuan_video(cls, guidance):
    """Text to video."""
    return Case(cls(**hunyuan_parts()), hunyuan_call(guidance))


@case("HunyuanVideo15Pipeline")
def hunyuan_video_15(cls, guidance):
    """Text to video, guided by a guider; there is no callback."""
    denoiser = HunyuanVideo15Transformer3DModel(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
        scaling_factor=0.37,
    )
    vae.enable_slicing()  # its attention cannot do a batch
    pipe = cls(
        transformer=filled(denoiser),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **NO_TEXT,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.5 if guidance else 1.0),
    )
    prompts = embeddings() | {f"{name}_2": value for name, value in embeddings().items()}
    masks = {name.replace("embeds", "embeds_mask"): torch.ones(2, 5) for name in prompts}
    call = sampling(guidance, **SMALL, num_frames=5, **prompts, **masks)
    return Case(pipe, without(call, "guidance_scale"))


@case("HunyuanVideoImageToVideoPipeline")
def hunyuan_image_to_video(cls, guidance):
    """Image to video whose first latent frame is the image; the scheduler does not see it."""
    parts = hunyuan_parts(image_condition_type="token_replace", guidance_embeds=True)
    pipe = cls(**parts, image_processor=None)
    return Case(pipe, hunyuan_call(guidance, image=pictures(2)))


def hunyuan_image_to_video_concat(cls, guidance):
    """Image to video with the image as further channels; the first 4 decoded frames are dropped."""
    parts = hunyuan_parts(image_condition_type="latent_concat", in_channels=4 + 4 + 1)
    pipe = cls(**parts, image_processor=None)
    return Case(pipe, hunyuan_call(guidance, image=pictures(2)))


CASES["HunyuanVideoImageToVideoPipeline:latent_concat"] = hunyuan_image_to_video_concat


def cogvideox_parts(channels=4, **config):
    """What CogVideoX pipelines have in common."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.37,
    )
    denoiser = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=1,
        sample_width=6,
        sample_height=4,
        sample_frames=FRAMES,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        **config,
    )
    return {"transformer": filled(denoiser), "vae": vae.eval(), **NO_TEXT}


@case("CogVideoXPipeline")
def cogvideox(cls, guidance):
    """Text to video, with the frames before the channels."""
    pipe = cls(**cogvideox_parts(), scheduler=CogVideoXDPMScheduler())
    call = sampling(guidance, num_frames=FRAMES, max_sequence_length=5, **embeddings())
    return Case(pipe, call)


@case("CogVideoXImageToVideoPipeline")
def cogvideox_image_to_video(cls, guidance):
    """Image to video of version 1.5, with a leading frame that is dropped."""
    parts = cogvideox_parts(4 + 4, patch_size_t=2, patch_bias=False)
    pipe = cls(**parts, scheduler=CogVideoXDDIMScheduler())
    call = sampling(guidance, num_frames=FRAMES, max_sequence_length=5, image=pictures(2))
    return Case(pipe, {**call, **embeddings()})


def masks(batch=2, tokens=5):
    """Attention masks that hide nothing, of prompts and of negative prompts."""
    return {
        "prompt_attention_mask": torch.ones(batch, tokens, dtype=torch.bool),
        "negative_prompt_attention_mask": torch.ones(batch, tokens, dtype=torch.bool),
    }


@case("MochiPipeline")
def mochi(cls, guidance):
    """Text to video, with statistics and a scale."""
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.37,
        **statistics(12),
    )
    denoiser = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=12,
        text_embed_dim=TEXT,
        time_embed_dim=4,
        max_sequence_length=5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = cls(transformer=filled(denoiser), vae=vae.eval(), scheduler=scheduler, **NO_TEXT)
    return Case(pipe, sampling(guidance, num_frames=13, **embeddings(), **masks()))


@case("MotifVideoPipeline")
def motif_video(cls, guidance):
    """Text to video, guided by a guider."""
    denoiser = MotifVideoTransformer3DModel(
        in_channels=4 + 4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=TEXT,
        rope_axes_dim=(4, 4, 4),
    )
    guider = ClassifierFreeGuidance(guidance_scale=3.5 if guidance else 1.0)
    pipe = cls(**wan_parts(transformer=filled(denoiser)), guider=guider)
    call = sampling(guidance, num_frames=FRAMES, **embeddings(), **masks())
    return Case(pipe, without(call, "guidance_scale"))


@case("AllegroPipeline")
def allegro(cls, guidance):
    """Text to video; the autoencoder works on tiles only, here one per video."""
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.37,
    )
    vae.kernel = vae.stride = (12, HEIGHT, WIDTH)
    vae.enable_tiling()
    vae.enable_slicing()
    denoiser = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=6,
        sample_height=4,
        sample_frames=3,
        caption_channels=TEXT,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = cls(transformer=filled(denoiser), vae=vae.eval(), scheduler=scheduler, **NO_TEXT)
    call = sampling(guidance, num_frames=FRAMES, negative_prompt=None, **embeddings(), **masks())
    return Case(pipe, call)


@case("EasyAnimatePipeline")
def easyanimate(cls, guidance):
    """Text to video."""
    vae = AutoencoderKLMagvit(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
        scaling_factor=0.37,
    )
    denoiser = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=6,
        sample_height=4,
        num_layers=1,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=TEXT,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = cls(transformer=filled(denoiser), vae=vae.eval(), scheduler=scheduler, **NO_TEXT)
    call = sampling(guidance, num_frames=FRAMES, num_images_per_prompt=2, **embeddings())
    return Case(pipe, {**call, **masks()})


def reasoned(decodes):
    """All frames of a video that was decoded as (first and last), then (all but the last)."""
    ends, start = decodes
    return torch.cat([start, ends[:, :, 1:]], dim=2)


def chronoedit_case(cls, guidance, **call):
    """An edit of a picture through frames between it and the result."""
    denoiser = wan_transformer(
        ChronoEditTransformer3DModel, in_channels=4 + 4 + 4, image_dim=8, added_kv_proj_dim=24
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = cls(**wan_parts(transformer=denoiser, scheduler=scheduler), **image_encoder())
    call |= sampling(guidance, image=picture(), num_frames=FRAMES, enable_temporal_reasoning=True)
    return pipe, {**call, **embeddings()}


@case("ChronoEditPipeline")
def chronoedit(cls, guidance):
    """An edit that keeps the frames between, which are decoded on their own."""
    pipe, call = chronoedit_case(cls, guidance, num_temporal_reasoning_steps=9)
    return Case(pipe, call, decoded=reasoned)


def chronoedit_shortened(cls, guidance):
    """An edit that drops the frames between after two steps."""
    return Case(*chronoedit_case(cls, guidance, num_temporal_reasoning_steps=2), settled=1)


CASES["ChronoEditPipeline:shortened"] = chronoedit_shortened


def anyflow_case(cls, guidance, transformer=AnyFlowTransformer3DModel, **call):
    """Text to video with the frames before the channels."""
    denoiser = wan_transformer(transformer)
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    pipe = cls(**wan_parts(transformer=denoiser, scheduler=scheduler))
    prompts = embeddings() if guidance else without(embeddings(), "negative_prompt_embeds")
    return Case(pipe, sampling(guidance, num_frames=FRAMES, **prompts, **call))


@case("AnyFlowPipeline")
def anyflow(cls, guidance):
    """Text to video."""
    return anyflow_case(cls, guidance)


def anyflow_context(cls, guidance):
    """Text to video whose first latent frame is given."""
    return anyflow_case(cls, guidance, video_latents=noise(1, 1, 4, 4, 6, seed=17))


CASES["AnyFlowPipeline:context"] = anyflow_context


@case("AnyFlowFARPipeline")
def anyflow_far(cls, guidance):
    """Text to video in two chunks of frames, decoded together."""
    return anyflow_case(cls, guidance, AnyFlowFARTransformer3DModel, chunk_partition=[1, 2])


def helios_parts(**scheduler):
    """What Helios pipelines have in common."""
    denoiser = wan_transformer(HeliosTransformer3DModel, rope_dim=(4, 4, 4))
    return wan_parts(transformer=denoiser, scheduler=HeliosScheduler(**scheduler))


HELIOS = {"num_frames": 2 * FRAMES - 1, "num_latent_frames_per_chunk": 3}


@case("HeliosPipeline")
def helios(cls, guidance):
    """Text to video in two chunks of frames, each decoded on its own."""
    pipe = cls(**helios_parts(stages=1, stage_range=[0, 1], use_dynamic_shifting=True))
    return Case(pipe, sampling(guidance, **HELIOS, **embeddings()), decoded=last)


@case("HeliosPyramidPipeline")
def helios_pyramid(cls, guidance):
    """Text to video in two chunks of frames, each from half the size up."""
    pipe = cls(**helios_parts(stages=2, stage_range=[0, 0.5, 1], gamma=0.25))
    call = sampling(guidance, **HELIOS, **embeddings(), pyramid_num_inference_steps_list=[2, 2])
    call = without(call, "num_inference_steps") | {"width": 64}
    return Case(pipe, call, decoded=last)


def framepack_case(cls, guidance, **call):
    """Image to video in two sections, decoded as one longer and longer video."""
    parts = hunyuan_parts(
        HunyuanVideoFramepackTransformer3DModel,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    config = SiglipVisionConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        intermediate_size=16,
        patch_size=4,
    )
    pipe = cls(
        **parts,
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 8, "width": 8}),
    )
    sections = {"num_frames": 2 * FRAMES - 1, "latent_window_size": 3}
    call |= hunyuan_call(guidance, image=pictures(2)) | sections
    return Case(pipe, call, decoded=last)


@case("HunyuanVideoFramepackPipeline")
def framepack(cls, guidance):
    """Sections from the last one to the first."""
    return framepack_case(cls, guidance, last_image=pictures(4)[2:])


def framepack_vanilla(cls, guidance):
    """Sections from the first one to the last."""
    return framepack_case(cls, guidance, sampling_type=FramepackSamplingType.VANILLA)


CASES["HunyuanVideoFramepackPipeline:vanilla"] = framepack_vanilla


def skyreels_case(cls, guidance, **call):
    """Frames that are denoised one after the other, each at its own timestep."""
    denoiser = wan_transformer(SkyReelsV2Transformer3DModel)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = cls(**wan_parts(transformer=denoiser, scheduler=scheduler))
    return Case(pipe, sampling(guidance, ar_step=1, causal_block_size=1, **embeddings(), **call))


@case("SkyReelsV2DiffusionForcingPipeline")
def skyreels(cls, guidance):
    """A long video in three windows that overlap."""
    windows = {"base_num_frames": FRAMES, "overlap_history": 5}
    return skyreels_case(cls, guidance, prompt=None, num_frames=2 * FRAMES - 1, **windows)


@case("SkyReelsV2DiffusionForcingImageToVideoPipeline")
def skyreels_image_to_video(cls, guidance):
    """A video between two pictures; the last one's latent frame is dropped."""
    ends = {"image": picture(), "last_image": picture(seed=10)}
    return skyreels_case(cls, guidance, num_frames=FRAMES, **ends)


def skyreels_image_to_long_video(cls, guidance):
    """A long video between two pictures, in two windows that overlap."""
    ends = {"image": picture(), "last_image": picture(seed=10)}
    windows = {"base_num_frames": FRAMES, "overlap_history": 1}
    return skyreels_case(cls, guidance, num_frames=2 * FRAMES - 1, **ends, **windows)


CASES["SkyReelsV2DiffusionForcingImageToVideoPipeline:long"] = skyreels_image_to_long_video
