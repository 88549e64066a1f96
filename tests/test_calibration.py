"""Calibration from end to end: the VAE's own pictures, the map, and what is refused."""

import math
import multiprocessing
import random
import re

import diffusers
import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from PIL import Image
from test_latent_space import (
    CENTRE,
    MIX,
    UNMIX,
    averaging_vae,
    batches,
    noise,
    random_vae,
    without_encoder,
)
from test_regression import least_squares
from test_vae import offloaded, traces
from torch import nn

from sd_progress.calibration import CalibrationError, calibrate, round_trip, score
from sd_progress.decoders import LinearDecoder, PCADecoder
from sd_progress.factors import Factors, VaeKey
from sd_progress.fingerprint import fingerprint
from sd_progress.pixels import to_uint8
from sd_progress.scores import Score
from sd_progress.share import Share

ANY = -math.inf  # whatever the map is worth
IMAGES = noise(8, 3, 24, 16)


def ridge_of(factors):
    """As its provenance says."""
    return float(factors.provenance.rpartition("ridge ")[2])


# --- what is fitted


def test_the_map_undoes_the_vae():
    """Latents that are an affine map of colours give these back, and everything is written down."""
    vae = averaging_vae(scaling_factor=0.5)
    found = calibrate(vae, kernel_size=1, images=IMAGES, name="mine")
    np.testing.assert_allclose(found.weight[:, :3, 0, 0], UNMIX, atol=2e-3)
    np.testing.assert_allclose(found.bias, -UNMIX @ CENTRE, atol=2e-3)
    assert found.psnr_db > 50
    assert (found.name, found.kind, found.vae_hash) == ("mine", "linear", fingerprint(vae))
    assert found.vae_key == VaeKey("AutoencoderKL", 4, 0.5)
    assert re.fullmatch(r"sd-progress calibrate: 8 pictures, ridge [\d.e-]+", found.provenance)


def independent_fit(pairs, ridge, kernel_size, upscale):
    """Weight and bias by numpy, of pictures (3, H, W) and their latents (C, h, w)."""
    features, targets, margin = [], [], kernel_size // 2
    for picture, latents in pairs:
        channels, h, w = latents.shape
        padded = np.pad(latents, [(0, 0), (margin, margin), (margin, margin)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size,) * 2, axis=(1, 2))
        rows = windows.transpose(1, 2, 0, 3, 4).reshape(h * w, -1)
        features.append(np.append(rows, np.ones((h * w, 1)), axis=1).astype(np.float64))
        s, side = upscale, picture.shape[1] // h // upscale
        means = picture.reshape(3, h, s, side, w, s, side).mean(axis=(3, 6))
        targets.append(means.transpose(1, 3, 0, 2, 4).reshape(h * w, -1).astype(np.float64))
    solved = least_squares(np.concatenate(features), np.concatenate(targets), ridge)
    return solved[:-1].T.reshape(-1, channels, kernel_size, kernel_size), solved[-1]


def pairs_of(vae, images):
    """Pictures and latents, by diffusers alone; clips that stand still have two of each."""
    is_video = isinstance(vae, diffusers.AutoencoderKLWan)
    for image in images.split(1):
        with torch.no_grad():
            encoded = vae.encode(image[:, :, None].repeat(1, 1, 5, 1, 1) if is_video else image)
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:
            latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        for one in latents.unbind(2) if is_video else [latents]:
            yield image[0].numpy(), one[0].numpy()


VAES = {
    "scale and shift": lambda: tiny.vae(scaling_factor=0.3, shift_factor=0.1),
    "many channels": lambda: tiny.vae(channels=6),
    **{
        name: lambda name=name: random_vae(name)
        for name in ("AutoencoderTiny", "AutoencoderDC", "VQModel", "AutoencoderKLWan")
    },
}


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize(("kernel_size", "upscale"), [(3, 1), (1, 2)])
def test_the_map_is_ridge_regression_of_all_pictures(name, kernel_size, upscale):
    """Of any class of VAE, with random weights; by numpy, from what diffusers encodes."""
    vae = VAES[name]()
    found = calibrate(
        vae, kernel_size=kernel_size, upscale=upscale, images=IMAGES, least_gain_db=ANY
    )
    pairs = pairs_of(vae, IMAGES)
    weight, bias = independent_fit(pairs, ridge_of(found), kernel_size, upscale)
    np.testing.assert_allclose(found.weight, weight, atol=1e-4 * np.abs(weight).max())
    np.testing.assert_allclose(found.bias, bias, atol=1e-4 * np.abs(bias).max() + 1e-5)
    assert found.vae_key.class_name == type(vae).__name__


def test_the_score_is_that_of_every_fourth_picture():
    """By numpy: fitted to the others, drawn, clipped, and compared one by one."""
    vae = tiny.vae()
    found = calibrate(vae, kernel_size=1, images=IMAGES, least_gain_db=ANY)
    pairs = list(pairs_of(vae, IMAGES))
    held_out = [pairs.pop(7), pairs.pop(3)]
    weight, bias = independent_fit(pairs, ridge_of(found), 1, 1)
    scores = []
    for picture, latents in held_out:
        drawn = np.einsum("oc,chw->ohw", weight[:, :, 0, 0], latents) + bias[:, None, None]
        wanted = picture.reshape(3, 12, 2, 8, 2).mean(axis=(2, 4))
        scores.append(-10 * np.log10(np.mean((drawn.clip(-1, 1) - wanted) ** 2) / 4))
    assert found.psnr_db == pytest.approx(np.mean(scores), abs=0.006)


def test_synthetic_pictures_do():
    """Without any pictures of the user's, the map is as near, and its score is on others."""
    found = calibrate(averaging_vae(), kernel_size=1)
    np.testing.assert_allclose(found.weight[:, :3, 0, 0], UNMIX, atol=5e-3)
    assert found.psnr_db > 45
    assert found.provenance.startswith("sd-progress calibrate: 32 synthetic 192x192 pictures, ")


def test_a_vae_without_an_encoder_is_fitted_to_what_it_decodes():
    """Latents so small that it decodes them without clipping; there is no hint of pictures."""
    vae = without_encoder(averaging_vae(scaling_factor=30.0, shift_factor=0.1))
    found = calibrate(vae, kernel_size=1)
    np.testing.assert_allclose(found.weight[:, :3, 0, 0], UNMIX, atol=0.02)
    assert found.provenance.startswith("sd-progress calibrate: 32 decoded latents, ridge")


def test_the_user_s_own_pictures(tmp_path):
    """As a tensor, as PIL pictures or as a folder: the same map."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), np.uint8)
    pictures = [Image.fromarray(array) for array in pixels]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    tensor = torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1
    first, *others = (
        calibrate(averaging_vae(), kernel_size=1, images=images)
        for images in (tensor, pictures, tmp_path, str(tmp_path))
    )
    for other in others:
        np.testing.assert_allclose(other.weight, first.weight, atol=1e-5)
        assert other.provenance == first.provenance


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"degree": 2}, "quadratic"), ({"degree": 3}, "cubic"), ({"hidden_units": 4}, "mlp")],
)
def test_maps_that_are_more_than_linear(options, kind):
    """Draw squares of latents better than the linear map does, and say what they are."""
    vae = averaging_vae()
    images = IMAGES.abs().sqrt() * IMAGES.sign()
    with torch.no_grad():  # SiLU at the end, where it is no identity
        vae.encoder.conv_norm_out.bias.fill_(1)
        vae.encoder.conv_out.bias[:3] = CENTRE - MIX.sum(dim=1)
    linear = calibrate(vae, kernel_size=1, images=images, least_gain_db=ANY)
    found = calibrate(vae, kernel_size=1, images=images, least_gain_db=ANY, **options)
    assert (found.kind, found.vae_hash) == (kind, fingerprint(vae))
    assert found.psnr_db > linear.psnr_db + 1


def test_time_is_limited():
    """A few pictures are enough, and one of them at least is held out."""
    images = IMAGES.repeat(5, 1, 1, 1)
    found = calibrate(averaging_vae(), kernel_size=1, images=images, limit_s=0.0)
    assert found.provenance.startswith("sd-progress calibrate: 8 pictures")
    assert found.psnr_db > 50
    unlimited = calibrate(averaging_vae(), kernel_size=1, images=images, limit_s=1e6)
    assert unlimited.provenance.startswith("sd-progress calibrate: 40 pictures")


def test_progress_is_shown_if_wanted(capfd):
    """On stderr, and nothing otherwise."""
    calibrate(averaging_vae(), kernel_size=1, images=IMAGES)
    assert capfd.readouterr() == ("", "")
    calibrate(averaging_vae(), kernel_size=1, images=IMAGES, progress=True)
    out, err = capfd.readouterr()
    assert "calibrate" in err
    assert "/8" in err
    assert out == ""


# --- what is refused


def without_decoder():
    """A VAE that encodes well and decodes nothing but grey."""
    vae = averaging_vae()
    nn.init.zeros_(vae.decoder.conv_out.weight)
    nn.init.zeros_(vae.decoder.conv_out.bias)
    return vae


@pytest.mark.parametrize("vae", [tiny.vae(), without_decoder()])
def test_random_and_broken_weights_are_refused(vae):
    """Because the VAE's own decoder does not give back what it encoded, however good the map is."""
    with pytest.raises(
        CalibrationError,
        match=r"vae must give back what it encodes, got [\d.]+ dB, where flat pictures have [\d.]+ "
        r"dB from AutoencoderKL; its weights seem to be untrained or broken",
    ):
        calibrate(vae, images=IMAGES)


def test_broken_weights_are_refused_at_once():
    """The first picture that shows something tells; a flat one does not."""
    vae, encoded = without_decoder(), []
    vae.encoder.register_forward_hook(lambda *_: encoded.append(True))
    images = IMAGES.clone()
    images[0] = 0.1
    with pytest.raises(CalibrationError, match="vae must give back what it encodes"):
        calibrate(vae, kernel_size=1, images=images)
    assert len(encoded) == 3  # with the one that the size of latents is known from
    assert calibrate(averaging_vae(), kernel_size=1, images=images).psnr_db > 50


def test_a_map_that_draws_nothing_is_refused():
    """One latent for four pixels of noise says their mean: three quarters of the error are left."""
    vae, images = averaging_vae(), noise(8, 3, 64, 64)
    with pytest.raises(
        CalibrationError,
        match=r"the map must win 3 dB over flat pictures, got 12\.\d dB, where flat pictures have "
        r"10\.8 dB for AutoencoderKL; pass a larger kernel_size, or images like those",
    ):
        calibrate(vae, kernel_size=1, upscale=2, images=images)
    found = calibrate(vae, kernel_size=1, upscale=2, images=images, least_gain_db=1)
    assert found.psnr_db == pytest.approx(-10 * math.log10(1 / 12 * 3 / 4), abs=0.1)


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("least_gain_db", [3, ANY])
def test_latents_that_are_not_finite_are_refused(number, least_gain_db):
    """An encoder that overflows, also if only in a picture that is held out."""
    images = IMAGES.clone()
    images[number, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="vae must make finite values, got NaN or infinity"):
        calibrate(averaging_vae(), images=images, least_gain_db=least_gain_db)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "kernel_size must be odd, got 2; pass 1, 3, 5 or 7"),
        ({"kernel_size": -1}, "kernel_size must be odd, got -1; pass"),
        ({"kernel_size": 3.0}, "kernel_size must be a whole number, got 3.0; pass an int"),
        ({"upscale": 0}, "upscale must be at least 1, got 0; pass 1, 2, 4 or 8"),
        ({"upscale": 4}, "upscale must be at most 2 for this VAE, got 4; that is its full resol"),
        ({"degree": 4}, "degree must be 1, 2 or 3, got 4; 1 is an affine map"),
        ({"hidden_units": -1}, "hidden_units must be at least 0, and 0 for degree 1, got -1; pass"),
        ({"hidden_units": 8, "degree": 2}, "and 0 for degree 2, got 8; pass one of the two"),
        ({"hidden_units": 8, "group": "all"}, "hidden_units must be 0 with a group, got 8; fit it"),
        ({"images": IMAGES[:3]}, "images must be at least 4 pictures, got 3; leave it out to fit"),
        ({"images": IMAGES * 255}, "images must be in [-1, 1], got values up to "),
        ({"images": 0 * IMAGES}, "images must show something, got 8 that have one colour each"),
        ({"images": "nowhere"}, "images must be a folder with pictures, got 'nowhere'; leave it"),
    ],
)
def test_options_that_make_no_sense(options, message):
    """The message says what to pass."""
    with pytest.raises(ValueError, match=f"{re.escape(message)}"):
        calibrate(averaging_vae(), **options)


def test_what_is_no_autoencoder():
    """Neither a pipeline nor any other module."""
    with pytest.raises(TypeError, match=r"vae must be an autoencoder, got str; pass pipe\.vae"):
        calibrate("sd1")
    with pytest.raises(TypeError, match=r"must be an autoencoder of pictures, got Linear; pass"):
        calibrate(nn.Linear(2, 2))


# --- what is left as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upcast", [True, False])
def test_the_vae_is_left_as_it_was(dtype, upcast):
    """Numbers, storages, dtypes, modes and hooks; and the map says whose it is."""
    vae = tiny.vae(force_upcast=upcast).to(dtype).train()
    vae.decoder.requires_grad_(False)
    before = traces(vae)
    numbers = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    found = calibrate(vae, kernel_size=1, images=IMAGES, least_gain_db=ANY)
    assert traces(vae) == before
    assert all(torch.equal(numbers[name], tensor) for name, tensor in vae.state_dict().items())
    assert found.vae_hash == fingerprint(vae)


def everything_random():
    """The global random states."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("options", [{"images": IMAGES, "hidden_units": 2}, {"limit_s": 0.0}])
def test_no_global_randomness(options):
    """None is used, and none has a say; the seed has."""
    vae, before = without_encoder(tiny.vae()) if "limit_s" in options else tiny.vae(), []
    maps = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before.append(everything_random())
        maps.append(calibrate(vae, kernel_size=1, least_gain_db=ANY, **options))
        assert everything_random() == before[-1]
    assert before[0] != before[1]
    np.testing.assert_array_equal(maps[0].weight, maps[1].weight)
    other = calibrate(vae, kernel_size=1, least_gain_db=ANY, seed=3, **options)
    assert not np.array_equal(other.weight, maps[0].weight)


def test_the_seed_chooses_the_pictures():
    """The same seed makes the same map to the bit, another one another."""
    vae = averaging_vae()
    options = {"kernel_size": 1, "limit_s": 0.0}
    first, again, other = (calibrate(vae, seed=seed, **options) for seed in (0, 0, 1))
    np.testing.assert_array_equal(again.weight, first.weight)
    assert again.psnr_db == first.psnr_db
    assert not np.array_equal(other.weight, first.weight)
    assert first.provenance.startswith("sd-progress calibrate: 16 synthetic")


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_vaes(kind):
    """They give the same map; the weights of one that is streamed in cannot be hashed."""
    expected = calibrate(averaging_vae(), images=IMAGES)
    vae, was_denoiser_sent_away = offloaded(averaging_vae(), kind)
    found = calibrate(vae, images=IMAGES)
    np.testing.assert_array_equal(found.weight, expected.weight)
    assert found.vae_hash == (expected.vae_hash if kind == "model" else None)
    assert not was_denoiser_sent_away()


def test_the_host_s_modes_change_nothing():
    """Under inference mode, with another default device and dtype."""
    expected = calibrate(averaging_vae(), images=IMAGES)
    vae = averaging_vae()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            found = calibrate(vae, images=IMAGES)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found.weight, expected.weight)


# --- scores


def exact():
    """The map that undoes `averaging_vae`."""
    table = torch.cat([UNMIX.T, torch.zeros(1, 3)])
    return Factors.from_table(table, -UNMIX @ CENTRE, name="exact")


def test_a_map_is_scored():
    """On pictures given, or on a few synthetic ones; the exact one is as good as the VAE itself."""
    vae = averaging_vae()
    flat_db = score(exact(), vae, IMAGES).flat_db
    wanted = IMAGES.reshape(8, 3, 12, 2, 8, 2).mean(dim=(3, 5))
    variance = wanted.var(dim=(2, 3), correction=0).mean(dim=1)
    assert flat_db == pytest.approx((-10 * (variance / 4).log10()).mean().item(), abs=1e-3)
    assert score(exact(), vae, IMAGES).gain_db > 30
    few = torch.cat(batches(None, vae, seed=1, few=True))
    assert score(exact(), vae) == score(exact(), vae, few)
    shuffled = Factors(exact().weight[[1, 2, 0]], exact().bias[[1, 2, 0]], name="shuffled")
    assert score(shuffled, vae, IMAGES).gain_db < 0


def test_any_decoder_is_scored():
    """The same as its map, to within the rounding to 256 levels; principal components are worse."""
    vae = averaging_vae()
    found = score(LinearDecoder(exact()), vae, IMAGES)
    assert found.psnr_db == pytest.approx(58.9, abs=1)  # a twelfth of a level squared
    assert found.flat_db == score(exact(), vae, IMAGES).flat_db
    assert score(PCADecoder(), vae, IMAGES).gain_db < 0


def test_a_map_for_other_channels_cannot_be_scored():
    """The message names both counts."""
    other = Factors.from_table(np.zeros((16, 3)), name="other")
    with pytest.raises(
        ValueError, match="factors must have 4 latent channels for this VAE, got 16"
    ):
        score(other, tiny.vae(), IMAGES)


def test_round_trips_are_scored():
    """A VAE that is trained gives back what it encodes, one of random weights does not."""
    assert round_trip(averaging_vae()).gain_db > 20
    assert round_trip(tiny.vae(mid_block_add_attention=False)).gain_db < 1


# --- several processes

# Every fourth has more contrast than the others, so that a score says which were held out.
MANY = noise(41, 3, 16, 16) * (0.1 + 0.9 * (torch.arange(41) % 4 == 3))[:, None, None, None]


def _calibrate_together(rank, folder, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    everyone = {"group": dist.group.WORLD}
    found = calibrate(averaging_vae(), images=MANY, kernel_size=3, **everyone)
    limited = calibrate(averaging_vae(), images=MANY, kernel_size=1, limit_s=0.0, **everyone)
    try:
        calibrate(tiny.vae(), images=MANY, **everyone)
    except CalibrationError as error:
        refusal = str(error)
    try:
        calibrate(tiny.vae(), images=MANY[:7], **everyone)
    except ValueError as error:
        few = str(error)
    share, sums = Share(dist.group.WORLD), torch.tensor([rank + 1.0, 10.0])
    share.add_up(sums, torch.zeros(2))
    scores = [] if rank else [Score(10, 1), Score(20, 2), Score(60, 6)]
    summed = share.rank, share.count, sums.tolist(), share.total(3 + rank), share.mean(iter(scores))
    found = found.weight.tolist(), found.psnr_db, found.provenance
    results.put((rank, found, limited.provenance, (refusal, few), summed))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two processes found."""
    context, folder = multiprocessing.get_context("spawn"), tmp_path_factory.mktemp("group")
    results = context.Queue()
    arguments = [(rank, folder, results) for rank in range(2)]
    processes = [context.Process(target=_calibrate_together, args=each) for each in arguments]
    for process in processes:
        process.start()
    told = sorted(results.get(timeout=200) for _ in processes)
    for process in processes:
        process.join()
    return told


def test_processes_get_one_map(told):
    """All the same, and the one that a single process makes of the same pictures."""
    first, psnr_db, provenance = told[0][1]
    assert told[1][1] == told[0][1]
    alone = calibrate(averaging_vae(), images=MANY, kernel_size=3)
    np.testing.assert_allclose(first, alone.weight, atol=1e-5)
    assert psnr_db == pytest.approx(alone.psnr_db, abs=0.011)
    assert provenance == alone.provenance


def test_processes_stop_in_time(told):
    """Also those that hold nothing out; the pictures of all are counted."""
    for _, _, provenance, *_ in told:
        assert provenance.startswith("sd-progress calibrate: 16 pictures")


def test_processes_refuse_together(told):
    """None is left waiting for the others."""
    for *_, (refusal, few), _ in told:
        assert refusal == told[0][-2][0]
        assert refusal.startswith("vae must give back what it encodes")
        assert few.startswith("images must be at least 8 pictures, got 7")


def test_processes_add_up(told):
    """Sums are over all of them, and so are means, also where one has no scores."""
    assert [summed for *_, summed in told] == [
        (rank, 2, [3.0, 20.0], 7, Score(30, 3)) for rank in range(2)
    ]


def test_flat_pictures_do_not_spoil_a_good_fit():
    """Neither as the first one, by which the VAE is judged, nor among those held out."""
    images = IMAGES.clone()
    images[0], images[3] = 0.5, -0.25
    assert calibrate(tiny.working_vae(), images=images, kernel_size=1).psnr_db > 20


def test_pictures_by_their_names(tmp_path):
    """Paths as strings, as glob gives them."""
    for number, picture in enumerate(to_uint8(IMAGES)):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    names = sorted(str(path) for path in tmp_path.iterdir())
    by_name = calibrate(tiny.working_vae(), images=names, kernel_size=1, least_gain_db=ANY)
    by_folder = calibrate(tiny.working_vae(), images=tmp_path, kernel_size=1, least_gain_db=ANY)
    np.testing.assert_array_equal(by_name.weight, by_folder.weight)


def test_a_compiled_vae_is_calibrated_as_it_is():
    """`torch.compile` wraps it, and nothing is compiled for this."""
    graphs = []
    compiled = torch.compile(tiny.working_vae(), backend=lambda graph, _: graphs.append(graph))
    options = {"images": IMAGES, "kernel_size": 1, "least_gain_db": ANY}
    found = calibrate(compiled, **options)
    np.testing.assert_array_equal(found.weight, calibrate(tiny.working_vae(), **options).weight)
    assert graphs == []
