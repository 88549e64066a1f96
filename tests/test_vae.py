"""Encoding with the user's own VAE, leaving no trace on it; `test_decoders` has the decoding."""

import diffusers
import pytest
import tiny
import torch
from test_decoders import offloaded
from test_latent_space import averaging_vae, noise, random_vae, without_encoder
from torch import nn

from sd_progress.vae import VaeDecoder, VaeEncoder


def reference(vae, x):
    """What diffusers makes of it."""
    with torch.no_grad():
        return vae.encode(x).latent_dist.mode()


def test_the_vae_encodes_as_ever():
    """The same latents as `vae.encode`, in float32 and without a graph."""
    vae, x = tiny.vae(), noise(2, 3, 8, 12)
    latents = VaeEncoder(vae).encode(x)
    assert torch.equal(latents, reference(vae, x))
    assert (latents.dtype, latents.requires_grad) == (torch.float32, False)


def test_latents_are_the_mean_of_the_posterior():
    """However uncertain the encoder is."""
    vae, x = averaging_vae(), noise(1, 3, 8, 8)
    expected = VaeEncoder(vae).encode(x)
    nn.init.constant_(vae.quant_conv.bias[4:], 4.0)  # the logarithm of the variance
    sample = vae.encode(x).latent_dist.sample()
    assert (sample - expected).abs().mean() > 1
    assert torch.equal(VaeEncoder(vae).encode(x), expected)


def test_latents_can_be_drawn_from_the_posterior():
    """As the VAE's own distribution draws them, where there is one."""
    vae, x = tiny.vae(), noise(2, 3, 8, 12)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(5))
    assert torch.equal(VaeEncoder(vae).encode(x, torch.Generator().manual_seed(5)), expected)
    vae = random_vae("AutoencoderTiny")
    drawn = VaeEncoder(vae).encode(x, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, VaeEncoder(vae).encode(x))


@pytest.mark.parametrize(
    ("name", "field"),
    [("AutoencoderTiny", "latents"), ("AutoencoderDC", "latent"), ("VQModel", "latents")],
)
def test_latents_go_by_any_name(name, field):
    """Of VAEs without a posterior."""
    vae, x = random_vae(name), noise(2, 3, 8, 12)
    with torch.no_grad():
        expected = getattr(vae.encode(x), field)
    assert torch.equal(VaeEncoder(vae).encode(x), expected)


def test_latents_of_clips():
    """All frames of a video VAE."""
    vae, clip = random_vae("AutoencoderKLWan"), noise(1, 3, 5, 8, 12)
    latents = VaeEncoder(vae).encode(clip)
    assert latents.shape == (1, 4, 2, 2, 3)
    assert torch.equal(latents, reference(vae, clip))


def test_what_it_takes():
    """Clips if it has convolutions in three dimensions, under whatever name."""
    vaes = [tiny.vae(), random_vae("AutoencoderTiny"), random_vae("AutoencoderKLWan")]
    assert [VaeEncoder(vae).takes_video for vae in vaes] == [False, False, True]
    for name, base in {"FramesConv3d": nn.Conv2d, "Causal": nn.Conv3d}.items():
        vaes[0].encoder.conv_in = type(name, (base,), {})(3, 8, 3)
        assert VaeEncoder(vaes[0]).takes_video


def test_not_every_vae_has_an_encoder():
    """It may be None, gone, or never there; or there may be no method."""
    gone, speechless = tiny.vae(), nn.Linear(2, 2)
    del gone.encoder
    speechless.encoder = nn.ReLU()
    assert VaeEncoder(tiny.vae()).exists
    for vae in (without_encoder(tiny.vae()), gone, speechless, nn.Linear(2, 2)):
        assert not VaeEncoder(vae).exists


class Strange(nn.Linear):
    """Encodes, but not to latents."""

    def encode(self, x):
        return x


def test_other_encoders_are_refused():
    """The message says what they return."""
    with pytest.raises(
        TypeError, match=r"vae\.encode must return latent_dist, latents or latent, g"
    ):
        VaeEncoder(Strange(2, 2)).encode(noise(1, 3, 2, 2))


def traces(vae):
    """All that encoding could leave behind."""
    tensors = vae.state_dict(keep_vars=True)
    state = [(n, t.data_ptr(), t.dtype, t.requires_grad, t._version) for n, t in tensors.items()]
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vae.modules()
    ]
    return state, modules


def test_fp16_is_upcast_where_it_must_be_and_put_back():
    """`force_upcast` encodes in float32; afterwards every weight has the storage it had."""
    vae, x = tiny.vae(force_upcast=True), noise(1, 3, 8, 12)
    expected = reference(tiny.vae().half().float(), x)
    before = traces(vae.half().train())
    assert torch.equal(VaeEncoder(vae).encode(x), expected)
    assert traces(vae) == before
    assert vae.dtype == torch.float16


def test_half_precision_is_used_where_it_can_be():
    """The VAE runs in its own dtype, and its latents come in float32."""
    vae, x = tiny.vae(force_upcast=False).bfloat16(), noise(1, 3, 8, 12)
    before = traces(vae)
    latents = VaeEncoder(vae).encode(x)
    assert torch.equal(latents, reference(vae, x.bfloat16()).float())
    assert latents.dtype == torch.float32
    assert traces(vae) == before


def test_weights_are_put_back_when_encoding_fails():
    """An exception on the way leaves no float32 behind."""
    vae = tiny.vae(force_upcast=True).half()
    before = traces(vae)
    with pytest.raises(RuntimeError):
        VaeEncoder(vae).encode(noise(1, 4, 8, 12))
    assert traces(vae) == before


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_vaes(kind):
    """They encode as ever, and the denoiser is not sent away for it."""
    x = noise(1, 3, 8, 12)
    vae, was_denoiser_sent_away = offloaded(tiny.vae(), kind)
    assert torch.equal(VaeEncoder(vae).encode(x), reference(tiny.vae(), x))
    assert not was_denoiser_sent_away()


def test_group_offloaded_vae():
    """A VAE whose weights come in groups encodes as ever."""
    vae, x = tiny.vae(), noise(1, 3, 8, 12)
    diffusers.hooks.apply_group_offloading(vae, torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(VaeEncoder(vae).encode(x), reference(tiny.vae(), x))


def test_each_half_does_without_the_other():
    """Encoding asks nothing of the decoder's weights, nor decoding of the encoder's."""
    x = noise(1, 3, 8, 12)
    vae, other = tiny.vae(), tiny.vae()
    vae.decoder.to("meta")
    vae.post_quant_conv.to("meta")
    other.encoder.to("meta")
    other.quant_conv.to("meta")
    latents = VaeEncoder(vae).encode(x)
    assert torch.equal(latents, reference(tiny.vae(), x))
    with torch.no_grad():
        expected = tiny.vae().decode(latents).sample
    assert torch.equal(VaeDecoder(other).decode_float(latents), expected)


@pytest.mark.parametrize(
    ("work", "parts"),
    [
        (lambda vae: VaeEncoder(vae).encode(noise(1, 3, 8, 12)), {"encoder", "quant_conv"}),
        (lambda vae: VaeDecoder(vae).decode(noise(1, 4, 4, 6)), {"decoder", "post_quant_conv"}),
    ],
)
def test_only_the_half_at_work_is_upcast(work, parts):
    """The weights of the other are not copied, which would cost memory."""
    vae, upcast = tiny.vae(force_upcast=True).half(), set()

    def look(*_):
        names = {name.partition(".")[0]: p.dtype for name, p in vae.named_parameters()}
        upcast.update(name for name, dtype in names.items() if dtype == torch.float32)

    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(look)
    work(vae)
    assert upcast == parts


def test_a_vae_that_draws_noise_does_not_draw_the_runs():
    """The global random state is as it was."""

    class Noisy(type(tiny.vae())):
        """Adds noise, as some encoders do."""

        def encode(self, x, return_dict=True):
            return super().encode(x + torch.randn_like(x), return_dict=return_dict)

    vae = tiny.vae()
    vae.__class__ = Noisy
    before = torch.get_rng_state()
    VaeEncoder(vae).encode(noise(1, 3, 8, 12))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_compiled_encoder_is_not_compiled_anew():
    """Our pictures run it eagerly."""
    vae, graphs = tiny.vae(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    vae.encoder = torch.compile(vae.encoder, backend=count)
    reference(vae, noise(1, 3, 8, 8))
    VaeEncoder(vae).encode(noise(1, 3, 8, 12))
    assert len(graphs) == 1
