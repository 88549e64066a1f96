"""Pictures and their latents: what a VAE is calibrated on, made or opened as needed."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from sd_progress.latent_space import LARGEST_SIDE, Source, Space, picture_files
from sd_progress.scores import Pair
from sd_progress.share import Share

# What `averaging_vae` makes of the mean colour of two by two pixels.
MIX = torch.tensor([[0.6, 0.2, -0.3], [-0.1, 0.5, 0.2], [0.2, -0.4, 0.3]])
CENTRE = torch.tensor([0.5, -0.2, 0.1])
UNMIX = torch.linalg.inv(MIX)


def averaging_vae(**config):
    """A real KL autoencoder of four channels whose latents are `MIX @ colour + CENTRE` and a zero.

    Colours are means of two by two pixels, and it decodes to them. Its layers pass on what they
    get: colours and their negatives, and two constants that dwarf them in the group norms.
    """
    vae = tiny.vae(mid_block_add_attention=False, **config)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for part in (vae.encoder, vae.decoder):
            part.conv_in.bias[6:8] = torch.tensor([100.0, -100.0])
            part.conv_norm_out = nn.GroupNorm(1, 8)
            part.conv_norm_out.weight.fill_(50)  # the standard deviation of the constants
            part.conv_norm_out.bias.fill_(20)  # where SiLU is the identity
        vae.encoder.down_blocks[0].downsamplers[0].conv.weight[range(8), range(8), :2, :2] = 0.25
        vae.decoder.up_blocks[0].upsamplers[0].conv.weight[range(8), range(8), 1, 1] = 1
        _connect(vae.encoder.conv_in, torch.eye(3))
        _connect(vae.encoder.conv_out, MIX, CENTRE - 20 * MIX.sum(dim=1))
        _connect(vae.decoder.conv_in, UNMIX, -UNMIX @ CENTRE)
        _connect(vae.decoder.conv_out, torch.eye(3), torch.full((3,), -20.0))
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight[:, :, 0, 0] = torch.eye(len(conv.weight))
    return vae


def _connect(conv, matrix, bias=0):
    conv.weight[:3, :3, 1, 1] = matrix
    conv.bias[:3] = bias
    if len(conv.weight) == 8 and conv.weight.shape[1] < 8 and bool(conv.bias[6]):
        conv.weight[3:6, :3, 1, 1] = -matrix
        conv.bias[3:6] = -conv.bias[:3]


def without_encoder(vae):
    """As people save memory."""
    vae.encoder = None
    return vae


def random_vae(name):
    """Of another class than KL's, with two pixels a side per latent; of Wan's, four."""
    torch.manual_seed(1)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    if name == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(
            **blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
        ).eval()
    if name == "AutoencoderDC":
        return diffusers.AutoencoderDC(
            **blocks,
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
        ).eval()
    if name == "VQModel":
        return diffusers.VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            num_vq_embeddings=16,
        ).eval()
    statistics = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    return diffusers.AutoencoderKLWan(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        **statistics,
    ).eval()


def noise(*shape, seed=0):
    """From -1 to 1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batches(images, vae, seed=0, **options):
    """What a source yields."""
    return list(Source.of(images, Space.of(vae), seed, Share(None), **options))


# --- spaces


def test_the_averaging_vae_is_what_it_says():
    """Latents are an affine map of mean colours, and decode to them."""
    vae, x = averaging_vae(), noise(2, 3, 8, 12)
    colours = x.reshape(2, 3, 4, 2, 6, 2).mean(dim=(3, 5))
    expected = torch.einsum("oc,bchw->bohw", MIX, colours) + CENTRE[:, None, None]
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
        decoded = vae.decode(latents).sample
    torch.testing.assert_close(latents[:, :3], expected, atol=1e-3, rtol=0)
    repeated = colours.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(decoded, repeated, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AutoencoderDC", "VQModel"])
def test_spaces_of_picture_vaes(name):
    """Measured by encoding a picture, whatever the class calls its output."""
    space = Space.of(random_vae(name))
    assert (space.channels, space.ratio, space.frames) == (4, 2, 1)
    assert (space.is_video, space.can_encode, space.device.type) == (False, True, "cpu")


def test_the_space_of_a_video_vae():
    """Its clip has one frame, and as many more as make one latent frame."""
    space = Space.of(random_vae("AutoencoderKLWan"))
    assert (space.channels, space.ratio, space.frames) == (4, 4, 5)
    assert (space.is_video, space.can_encode) == (True, True)


def test_the_space_of_a_vae_without_an_encoder():
    """Measured by decoding, whether the encoder is None or gone."""
    vae = tiny.vae()
    del vae.encoder
    for half in (without_encoder(tiny.vae()), vae):
        space = Space.of(half)
        assert (space.channels, space.ratio, space.can_encode) == (4, 2, False)


class Flat(nn.Module):
    """Encodes to tokens."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2)

    def encode(self, x):
        return diffusers.models.autoencoders.vae.EncoderOutput(latent=x.flatten(2))


class Silent(nn.Linear):
    """Decodes, but does not say from how many channels."""

    def decode(self, z):
        return z


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (Silent(2, 2), "vae must be an autoencoder of pictures, got Silent; pass pipe.vae"),
        (nn.Linear(2, 2), "vae must be an autoencoder of pictures, got Linear; pass pipe.vae"),
        (Flat(), r"must encode pictures to \(B, C, h, w\), got \(1, 3, 16384\); calibrate needs"),
        (
            without_encoder(random_vae("AutoencoderKLWan")),
            "must have an encoder if it is one of videos, got AutoencoderKLWan without; pass",
        ),
    ],
)
def test_what_is_no_autoencoder_of_pictures(vae, message):
    """The message says what it is."""
    with pytest.raises(TypeError, match=message):
        Space.of(vae)


# --- pairs


def test_a_pair_of_pictures():
    """The pictures themselves, and the mean of the posterior."""
    vae, x = tiny.vae(), noise(2, 3, 8, 12)
    pair = Space.of(vae).pair(x)
    assert torch.equal(pair.pictures, x)
    with torch.no_grad():
        assert torch.equal(pair.latents, vae.encode(x).latent_dist.mode())


def test_a_pair_of_frames():
    """The first latent frame holds the first picture, the second the mean of those that follow."""
    vae, clip = random_vae("AutoencoderKLWan"), noise(1, 3, 5, 8, 12)
    pair = Space.of(vae).pair(clip)
    with torch.no_grad():
        latents = vae.encode(clip).latent_dist.mode()
    torch.testing.assert_close(pair.latents, latents[0].movedim(0, 1))
    one, *others = clip[0].unbind(1)
    expected = torch.stack([one, sum(others) / 4])
    torch.testing.assert_close(pair.pictures, expected)


def test_a_pair_without_an_encoder():
    """The latents themselves, and what they decode to, as far as it can be shown."""
    vae, latents = without_encoder(tiny.vae()), 30 * noise(2, 4, 6, 5)
    pair = Space.of(vae).pair(latents)
    with torch.no_grad():
        decoded = vae.decode(latents).sample
    assert torch.equal(pair.latents, latents)
    assert torch.equal(pair.pictures, decoded.clamp(-1, 1))
    nn.init.constant_(vae.decoder.conv_out.bias, 2.0)
    assert Space.of(vae).pair(latents).pictures.max() == 1


def test_round_trips():
    """A VAE that decodes what it encoded is told from one that does not, and from one of videos."""
    space = Space.of(averaging_vae())
    pair = space.pair(noise(2, 3, 16, 16))
    assert space.round_trip(pair).gain_db > 30
    wrong = Pair(pair.pictures.flip(0), pair.latents)
    assert space.round_trip(wrong).gain_db < 0
    video = Space.of(random_vae("AutoencoderKLWan"))
    clip = noise(1, 3, 5, 16, 16)
    with torch.no_grad():
        first = video.vae.decode(video.pair(clip).latents[:1, :, None]).sample[0, :, 0]
    small = [x.reshape(3, 4, 4, 4, 4).mean(dim=(2, 4)) for x in (first, clip[0, :, 0])]
    expected = -10 * (small[0] - small[1]).square().mean().div(4).log10()
    assert video.round_trip(video.pair(clip)).psnr_db == pytest.approx(expected.item(), abs=1e-3)


# --- the user's pictures


def test_tensors_are_cut_to_whole_latents():
    """One at a time, from the upper left."""
    images = noise(5, 3, 9, 12).double()
    found = batches(images, tiny.vae())
    assert len(found) == 5
    assert torch.equal(torch.cat(found), images[..., :8, :].float())
    assert found[0].dtype == torch.float32


def test_pictures_and_folders_are_read(tmp_path):
    """In the order of their names; grey, transparent and palette pictures, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4, 3), np.uint8)
    pictures = [Image.fromarray(array) for array in pixels]
    expected = torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1
    torch.testing.assert_close(torch.cat(batches(pictures, tiny.vae())), expected)
    for name, picture in zip("dcba", pictures, strict=True):
        picture.save(tmp_path / f"{name}.png")
    torch.testing.assert_close(torch.cat(batches(tmp_path, tiny.vae())), expected.flip(0))
    modes = [pictures[0].convert(mode) for mode in ("L", "RGBA", "P", "1")]
    found = torch.cat(batches(modes, tiny.vae()))
    grey = torch.from_numpy(np.array(modes[0])) / 127.5 - 1
    torch.testing.assert_close(found[0], grey.expand(3, -1, -1))
    torch.testing.assert_close(found[1], expected[0])


def test_large_pictures_are_reduced(tmp_path):
    """To 512 pixels on the longer side, by averaging."""
    stripes = np.zeros((8, 2 * LARGEST_SIDE, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "0.png")
    files = [tmp_path / "0.png"] * 4
    found = batches(files, tiny.vae())[0]
    assert found.shape == (1, 3, 4, LARGEST_SIDE)
    torch.testing.assert_close(found, torch.full_like(found, 100 / 127.5 - 1))


def test_a_picture_is_a_clip_that_stands_still():
    """For a video VAE."""
    images = noise(4, 3, 8, 12)
    found = torch.cat(batches(images, random_vae("AutoencoderKLWan")))
    assert found.shape == (4, 3, 5, 8, 12)
    assert (found == images[:, :, None]).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(3, 3, 8, 8), "images must be at least 4 pictures, got 3; leave it out to fit on sy"),
        (noise(4, 3, 8, 1), r"must be at least 2 pixels a side for this VAE, got \(8, 1\); pass"),
        (noise(4, 1, 8, 8), r"must be \(B, 3, H, W\) float in \[-1, 1\], got \(4, 1, 8, 8\) torch"),
        (noise(4, 3, 8), r"must be \(B, 3, H, W\) float in \[-1, 1\], got \(4, 3, 8\) torch"),
        (noise(4, 3, 1, 8, 8), r"\(B, 3, H, W\) float in \[-1, 1\], got \(4, 3, 1, 8, 8\) torch"),
        (noise(4, 3, 8, 8).byte(), r"got \(4, 3, 8, 8\) torch.uint8; bytes are `images / 127.5"),
        ("nowhere", "images must be a folder with pictures, got 'nowhere'; leave it out"),
    ],
)
def test_pictures_that_are_none(images, message):
    """The message says what to pass."""
    with pytest.raises(ValueError, match=message):
        batches(images, tiny.vae())


def test_pictures_need_an_encoder():
    """They are not taken for latents, not even where there are three channels of these."""
    with pytest.raises(ValueError, match="images must be None for a VAE without an encoder, got T"):
        batches(noise(4, 3, 8, 8), without_encoder(tiny.vae(channels=3)))


def test_files_are_pictures_by_their_names(tmp_path):
    """Sorted, in any case of letters; what can be written but not read is none."""
    for name in ("b.PNG", "a.jpeg", "c.webp", "notes.txt", "scan.pdf"):
        (tmp_path / name).touch()
    assert [file.name for file in picture_files(str(tmp_path))] == ["a.jpeg", "b.PNG", "c.webp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must be a folder with pictures, got .*empty.; leave"):
        picture_files(tmp_path / "empty")


# --- pictures of our own


def test_synthetic_pictures():
    """So many that a CPU has them encoded in seconds, whole latents a side, by seed."""
    found = batches(None, tiny.vae())
    assert [batch.shape for batch in found] == [(4, 3, 192, 192)] * 8
    assert not torch.equal(found[0], batches(None, tiny.vae(), seed=1)[0])
    few = batches(None, tiny.vae(), few=True)
    assert [batch.shape for batch in few] == [(1, 3, 192, 192)] * 4


def test_synthetic_clips_pan():
    """The last frame is the first one moved, by up to two pixels a frame; few clips stand still."""
    found = batches(None, random_vae("AutoencoderKLWan"), few=True)
    assert [batch.shape for batch in found] == [(1, 3, 5, 192, 192)] * 4
    moves = [(y, x) for y in range(9) for x in range(9)]
    seen = [_moves(clip[0, :, 0], clip[0, :, -1], moves) for clip in found]
    assert [len(moves) for moves in seen] == [1] * 4
    assert sum(sum(moves[0]) for moves in seen) > 8


def _moves(first, last, moves):
    """By how many pixels the second is the first one moved."""
    return [
        (y, x) for y, x in moves if torch.equal(first[:, y:, x:], last[:, : 192 - y, : 192 - x])
    ]


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 3.0}, [3.0] * 4, [2.0] * 4),
        ({"latents_mean": [1, 2, 3, 4], "latents_std": [2, 2, 3, 3]}, [1, 2, 3, 4], [2, 2, 3, 3]),
    ],
)
def test_made_up_latents_have_the_statistics_that_the_vae_states(config, mean, std):
    """As a diffusion model makes them: of unit variance in sampler space."""
    vae = without_encoder(tiny.vae(**config))
    latents = torch.cat(batches(None, vae))
    assert latents.shape == (32, 4, 24, 24)
    deviation = latents.movedim(1, 0).flatten(1).std(dim=1)
    centre = latents.movedim(1, 0).flatten(1).mean(dim=1)
    torch.testing.assert_close(deviation, torch.tensor(std, dtype=torch.float32), atol=0, rtol=0.1)
    torch.testing.assert_close(centre, torch.tensor(mean, dtype=torch.float32), atol=0.4, rtol=0)


def test_made_up_latents_are_smooth_in_places():
    """Neighbours agree more than strangers, as in the latents of pictures; seeds make others."""
    vae = without_encoder(tiny.vae())
    latents = torch.cat(batches(None, vae))
    neighbours = latents.diff(dim=-1).square().mean()
    strangers = (latents[..., :12] - latents[..., 12:]).square().mean()
    assert neighbours < 0.7 * strangers
    assert not torch.equal(latents, torch.cat(batches(None, vae, seed=1)))


def test_made_up_latents_are_not_cut_as_pictures_are():
    """Of a VAE of many pixels per latent, nothing would be left."""
    space = replace(Space.of(without_encoder(tiny.vae())), ratio=32)
    latents = list(Source.of(None, space, 0, Share(None), few=True))
    assert [batch.shape for batch in latents] == [(1, 4, 24, 24)] * 4


def test_sources_say_what_they_have():
    """For the progress bar and the provenance."""
    share, space = Share(None), Space.of(tiny.vae())
    made, given = Source.of(None, space, 0, share), Source.of(noise(5, 3, 8, 8), space, 0, share)
    latents = Source.of(None, Space.of(without_encoder(tiny.vae())), 0, share)
    assert (len(made), len(given), len(latents)) == (8, 5, 8)
    words = [source.words for source in (made, given, latents)]
    assert words == ["synthetic 192x192 pictures", "pictures", "decoded latents"]
