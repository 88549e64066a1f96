"""Latents to pixels: the linear map, principal components, and the VAE that is left as it was."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from sd_progress.decoders import ChannelsDecoder, LinearDecoder, PCADecoder
from sd_progress.factors import Factors, Hidden, Polynomial, by_name, monomials
from sd_progress.pixels import to_uint8
from sd_progress.vae import VaeDecoder


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(kernel_size=1, upscale=1):
    generator = np.random.default_rng(0)
    shape = (3 * upscale**2, 4, kernel_size, kernel_size)
    weight = generator.normal(0, 0.1, shape).astype(np.float32)
    bias = generator.normal(0, 0.1, shape[0]).astype(np.float32)
    return Factors(weight, bias, name="test", provenance="a test", licence="none")


def test_to_uint8():
    """-1 is black, 1 is white, what lies outside is clipped, NaN is grey."""
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, float("nan")])
    images = to_uint8(values.reshape(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert images.shape == (1, 1, 6, 3)
    assert images[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]
    assert values[:5].tolist() == [-2, -1, 0, 1, 2]


def test_one_pixel_per_latent_is_a_matrix_product():
    """k = 1, s = 1 is the classic table."""
    x, map_ = latents(2, 4, 3, 5), factors()
    expected = np.einsum("oc,bchw->bohw", map_.weight[:, :, 0, 0], x.numpy())
    expected = torch.from_numpy(expected + map_.bias[:, None, None])
    np.testing.assert_array_equal(LinearDecoder(map_).decode(x), to_uint8(expected))


def test_a_kernel_sees_its_neighbours_and_upscales():
    """k = 3, s = 2 is a convolution and a pixel shuffle, away from the border."""
    x, map_ = latents(1, 4, 6, 7), factors(kernel_size=3, upscale=2)
    weight, bias = torch.from_numpy(map_.weight), torch.from_numpy(map_.bias)
    expected = to_uint8(functional.pixel_shuffle(functional.conv2d(x, weight, bias), 2))
    images = LinearDecoder(map_).decode(x)
    assert images.shape == (1, 12, 14, 3)
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2], expected)


def test_the_border_is_not_darkened():
    """A flat latent is a flat picture."""
    flat = torch.ones(1, 4, 5, 5) * torch.tensor([0.5, -0.2, 0.1, 0.3]).reshape(1, 4, 1, 1)
    images = LinearDecoder(factors(kernel_size=5)).decode(flat)
    assert (images == images[0, 0, 0]).all()


@pytest.mark.parametrize(
    ("channels", "kernel_size", "upscale"), [(32, 5, 1), (16, 3, 1), (4, 5, 2)]
)
def test_it_is_a_convolution_however_it_is_computed(channels, kernel_size, upscale):
    """Of many channels and of few, small maps and large ones; a batch is drawn one by one."""
    made = np.random.default_rng(0)
    shape = (3 * upscale**2, channels, kernel_size, kernel_size)
    map_ = Factors(made.normal(0, 0.05, shape), made.normal(0, 0.1, shape[0]), name="test")
    x, margin = latents(3, channels, 7, 9), (kernel_size // 2,) * 4
    weight, bias = torch.from_numpy(map_.weight), torch.from_numpy(map_.bias)
    padded = functional.pad(x, margin, mode="replicate")
    expected = functional.pixel_shuffle(functional.conv2d(padded, weight, bias), upscale)
    torch.testing.assert_close(LinearDecoder(map_).decode_float(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("degree", [2, 3])
def test_powers_are_added(degree):
    """Each product of a pixel's latents by its weight, worked out one by one."""
    columns = monomials(2, degree)
    weights = np.arange(3 * len(columns), dtype=np.float32).reshape(3, -1) / 100
    plain = Factors(np.zeros((3, 2, 1, 1)), np.zeros(3), name="test")
    x = latents(1, 2, 2, 3)
    map_ = Factors(plain.weight, plain.bias, name="test", extra=Polynomial(weights, degree))
    drawn = LinearDecoder(map_).decode_float(x)[0, :, 1, 2]
    values = x[0, :, 1, 2].tolist()
    terms = [np.prod([values[channel] for channel in column]) for column in columns]
    np.testing.assert_allclose(drawn, weights @ terms, rtol=1e-5, atol=1e-6)


def test_a_hidden_layer_is_added():
    """The same as torch's own layers."""
    made = np.random.default_rng(0)
    kernel, bias, weight = (
        made.normal(size=(5, 4, 3, 3)),
        made.normal(size=5),
        made.normal(size=(3, 5)),
    )
    plain = factors(kernel_size=3)
    map_ = Factors(plain.weight, plain.bias, name="test", extra=Hidden(weight, kernel, bias))
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 5, 3, padding=1, padding_mode="replicate"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(5, 3, 1, bias=False),
    )
    layers[0].weight.data, layers[0].bias.data = torch.Tensor(kernel), torch.Tensor(bias)
    layers[2].weight.data = torch.Tensor(weight)[:, :, None, None]
    x = latents(2, 4, 6, 7)
    expected = LinearDecoder(plain).decode_float(x) + layers(x)
    torch.testing.assert_close(LinearDecoder(map_).decode_float(x), expected.detach())


def test_channels_are_shown_side_by_side():
    """Row by row, the last cell black where there is none; two and a half deviations are white."""
    x = torch.zeros(1, 5, 2, 2)
    x[0, 3] = 1.0  # of a mean of 0.2 and a deviation of about 0.41
    sheet = ChannelsDecoder().decode(x)
    assert sheet.shape == (1, 4, 6, 3)
    cells = sheet[0, :, :, 0].reshape(2, 2, 3, 2).swapaxes(1, 2)
    assert (cells[1, 0] > 215).all()
    assert (cells[1, 2] == 0).all()
    assert (
        len({int(cell.max()) for cell in (cells[0, 0], cells[0, 1], cells[0, 2], cells[1, 1])}) == 1
    )


def test_other_channel_counts_are_refused():
    """The message names the factors and the shapes."""
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\) for factors 'sd1', got"):
        LinearDecoder(by_name("sd1")).decode(latents(1, 16, 4, 4))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_principal_components_of_any_channel_count(channels):
    """Every channel count gives a picture that is not flat."""
    images = PCADecoder().decode(latents(2, channels, 6, 5))
    assert images.shape == (2, 6, 5, 3)
    assert images.std() > 20


def test_principal_components_do_not_flicker():
    """The same picture under growing noise keeps its colours from frame to frame."""
    decoder, x = PCADecoder(), latents(1, 16, 12, 12)
    x[:, :3] *= 4
    frames = [decoder.decode(x + 0.3 * latents(1, 16, 12, 12, seed=k)) for k in range(5)]
    changes = [np.abs(a.astype(int) - b).mean() for a, b in pairwise(frames)]
    assert max(changes) < 20


def test_principal_components_survive_nan():
    """NaN pixels are grey, and later frames are as ever."""
    decoder, x = PCADecoder(), latents(1, 4, 6, 6)
    broken = torch.full_like(x, float("nan"))
    assert (decoder.decode(broken) == 128).all()
    assert decoder.decode(x).std() > 20


# The full VAE


def reference(vae, z):
    with torch.no_grad():
        return to_uint8(vae.decode(z, return_dict=False)[0])


def test_the_vae_decodes_as_ever():
    """The same pixels as `vae.decode`."""
    vae, z = tiny.vae(), latents(2, 4, 6, 5)
    np.testing.assert_array_equal(VaeDecoder(vae).decode(z), reference(vae, z))


def test_fp16_is_upcast_where_it_must_be_and_put_back():
    """`force_upcast` decodes in float32; afterwards every weight has the storage it had."""
    vae, z = tiny.vae(force_upcast=True), latents(1, 4, 6, 5)
    expected = reference(tiny.vae().half().float(), z)
    vae.half()
    storages = [tensor.data_ptr() for tensor in vae.state_dict().values()]
    np.testing.assert_array_equal(VaeDecoder(vae).decode(z), expected)
    assert [tensor.data_ptr() for tensor in vae.state_dict().values()] == storages
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float16}


def test_weights_are_put_back_when_the_decode_fails():
    """An exception on the way leaves no float32 behind."""
    vae = tiny.vae(force_upcast=True).half()
    with pytest.raises(RuntimeError):
        VaeDecoder(vae).decode(latents(1, 5, 6, 5))
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float16}


def test_a_vae_that_draws_noise_does_not_draw_the_runs():
    """The global random state is as it was."""

    class Noisy(type(tiny.vae())):
        """Adds noise, as some decoders do."""

        def decode(self, z, return_dict=True):
            return super().decode(z + torch.randn_like(z), return_dict=return_dict)

    vae = tiny.vae()
    vae.__class__ = Noisy
    before = torch.get_rng_state()
    VaeDecoder(vae).decode(latents(1, 4, 6, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_decoder_is_not_compiled_anew():
    """Previews of another shape run it eagerly."""
    vae, graphs = tiny.vae(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    vae.decoder = torch.compile(vae.decoder, backend=count)
    reference(vae, latents(2, 4, 6, 5))
    VaeDecoder(vae).decode(latents(1, 4, 8, 6))
    assert len(graphs) == 1


def test_not_a_number_is_an_error():
    """The message says what to do about a VAE that overflows."""
    vae = tiny.vae()
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"vae\.decode must give finite values, got NaN"):
        VaeDecoder(vae).decode(latents(1, 4, 6, 5))


def offloaded(vae, kind):
    """The VAE as `enable_*_cpu_offload` leaves it; its predecessor tells whether it was woken."""
    import accelerate

    if kind == "sequential":
        accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
        return vae, lambda: False
    accelerate.cpu_offload_with_hook(vae, torch.device("cpu"))
    hook, woken = vae._hf_hook, []
    pre_forward = hook.pre_forward  # what sends the module before it away
    hook.pre_forward = lambda *args, **kwargs: woken.append(True) or pre_forward(*args, **kwargs)
    return vae, lambda: bool(woken)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_vaes(kind):
    """Offloaded VAEs decode as ever, and the denoiser is not sent away for it."""
    z = latents(1, 4, 6, 5)
    expected = reference(tiny.vae(), z)
    vae, was_denoiser_sent_away = offloaded(tiny.vae(), kind)
    np.testing.assert_array_equal(VaeDecoder(vae).decode(z), expected)
    assert not was_denoiser_sent_away()
    reference(vae, z)  # `vae.decode` itself does send it away
    assert was_denoiser_sent_away() == (kind == "model")


def test_group_offloaded_vae():
    """A VAE whose weights come in groups decodes as ever."""
    from diffusers.hooks import apply_group_offloading

    vae, z = tiny.vae(), latents(1, 4, 6, 5)
    expected = reference(vae, z)
    apply_group_offloading(vae, torch.device("cpu"), offload_type="leaf_level")
    np.testing.assert_array_equal(VaeDecoder(vae).decode(z), expected)
