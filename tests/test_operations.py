"""The small tensor functions of layouts, with values that a hand can compute."""

import pytest
import torch
import zoo

from sd_progress import operations as op
from sd_progress.operations import Reading, VaeStatistics


def reading(statistics=None, latents=None, **values):
    return Reading(statistics or VaeStatistics(), values, latents)


def count(*shape):
    """0, 1, 2, ... in this shape."""
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape)


def test_what_is_read_has_a_type():
    """Numbers, tensors on the device and in the dtype of another, and what may be missing."""
    read = reading(height=16, scale=0.5, mask=torch.ones(2))
    assert (read.integer("height"), read.number("scale"), read.optional("no")) == (16, 0.5, None)
    assert read.tensor("mask", torch.ones(1, dtype=torch.float16)).dtype == torch.float16


def test_what_is_missing_is_named():
    """The message says what was there instead."""
    with pytest.raises(ValueError, match=r"width must be a variable of .* got \['height'\]"):
        reading(height=16)["width"]


def test_statistics_of_a_video_vae():
    """A decoder with 3-D convolutions takes (B, C, F, h, w)."""
    zoo.load_families()
    vae = zoo.build("WanPipeline").pipe.vae
    statistics = VaeStatistics.of(vae)
    assert statistics.is_video
    torch.testing.assert_close(statistics.mean, torch.tensor(vae.config.latents_mean))
    assert VaeStatistics.of(None).latent_channels is None


def test_scaling_and_shifting():
    """x / scale, x / scale + shift, x * std / scale + mean."""
    statistics = VaeStatistics(
        2, 0.5, 1.0, mean=torch.tensor([10.0, 20.0]), std=torch.tensor([2.0, 3.0])
    )
    x, read = torch.ones(1, 2, 1, 1), reading(statistics)
    assert op.scaled(x, read).flatten().tolist() == [2, 2]
    assert op.shifted(x, read).flatten().tolist() == [3, 3]
    assert op.standardised(x, read).flatten().tolist() == [12, 23]
    assert op.standardised_or_scaled(x, read).flatten().tolist() == [14, 26]


def test_what_is_normalised_stays_as_it_was():
    """The results have memory of their own: latents are looked at more than once."""
    statistics = VaeStatistics(
        2, 0.5, 1.0, mean=torch.tensor([10.0, 20.0]), std=torch.tensor([2.0, 3.0])
    )
    kept = {"self.mean": statistics.mean, "self.std": statistics.std}
    running = {f"self.vae.bn.running_{name}": torch.ones(2) for name in ("mean", "var")}
    read = reading(statistics, **kept, **running)
    with_kept = [op.standardised_with(*kept, is_inverse=inverse) for inverse in (False, True)]
    for operation in (
        op.scaled,
        op.shifted,
        op.standardised,
        op.standardised_or_scaled,
        op.batch_normed,
        *with_kept,
    ):
        x = torch.ones(1, 2, 1, 1)
        assert operation(x, read).flatten().tolist() != [1, 1]
        assert x.flatten().tolist() == [1, 1]


def test_statistics_may_be_per_frame():
    """Cosmos 1.0 keeps them for each channel and frame, for more frames than there are."""
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
    x = torch.zeros(1, 2, 1, 1, 1)
    shifted = op.standardised(x, reading(VaeStatistics(2, mean=mean, std=std)))
    assert shifted.flatten().tolist() == [1, 3]


def test_patches_in_the_channels():
    """A patch's pixels are neighbours, and the two operations undo each other."""
    image = count(1, 1, 2, 4)
    patches = op.patchified(image, reading())
    assert patches[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(op.unpatchified(patches, reading()), image)


def test_tokens_of_2x2_patches():
    """(B, N, 4C) from the size in pixels: the second token is right of the first."""
    tokens = count(1, 2, 4)
    image = op.unpack_2x2(tokens, height=16, width=32, vae_scale_factor=8)
    assert image.tolist() == [[[[0, 1, 4, 5], [2, 3, 6, 7]]]]


def test_the_pipelines_own_method_is_preferred():
    """Modular pipelines have none, and a function of ours does it."""
    unpack = op.unpacked("height", otherwise=lambda latents, height: latents + height)
    own = {"self._unpack_latents": lambda latents, height: latents - height}
    x = torch.zeros(1)
    assert unpack(x, reading(height=3)).item() == 3
    assert unpack(x, Reading(values={"height": 3, **own})).item() == -3


def test_tokens_are_placed_by_their_ids():
    """In any order, and past the tokens of reference pictures, which come after them."""
    ids = torch.tensor([[[0, 0, 1, 0], [0, 0, 0, 0], [10, 5, 5, 0]]])
    grid = op.placed_by("ids")(torch.tensor([[[7.0], [8.0]]]), reading(ids=ids))
    assert grid.tolist() == [[[[8, 7]]]]


def test_layers_become_a_batch():
    """Of the composite and two layers, the layers are left."""
    layers = op.layers_in_batch(count(1, 1, 3, 1, 1), reading())
    assert (layers.shape, layers.flatten().tolist()) == ((2, 1, 1, 1, 1), [1, 2])


def test_masked_tokens_have_no_entry():
    """Their codebook vector is NaN, which is drawn in grey."""

    class Vqvae:
        """Has a codebook of two entries."""

        class quantize:  # noqa: N801 - diffusers' name
            """The quantizer."""

            embedding = torch.nn.Embedding(2, 3)

    ids = torch.tensor([[[0, 1], [2, 1]]])
    entries = op.codebook_entries(ids, Reading(values={"self.vqvae": Vqvae}))
    book = Vqvae.quantize.embedding.weight
    torch.testing.assert_close(entries[0, :, 0, 1], book[1])
    assert entries.isnan().sum().item() == 3


@pytest.mark.parametrize(("inverted", "expected"), [(True, [5, 6, 1, 2]), (False, [3, 4, 5, 6])])
def test_a_section_with_its_history(inverted, expected):
    """Framepack decodes a section with its neighbours; backwards, they come behind it."""
    history = torch.tensor([1.0, 2, 3, 4]).reshape(1, 1, 4, 1, 1)
    if inverted:  # newest first, and older zeros behind
        history = torch.cat([history[:, :, :2], torch.zeros(1, 1, 2, 1, 1)], dim=2)
    values = {
        "sampling_type": "inverted_anti_drifting" if inverted else "vanilla",
        "history_latents": history,
        "total_generated_latent_frames": 2 if inverted else 4,
        "latent_window_size": 2,
        "history_video?": True,
    }
    section = torch.tensor([5.0, 6.0]).reshape(1, 1, 2, 1, 1)
    shown = op.section_with_history(section, Reading(values=values))
    assert shown.flatten().tolist() == expected


def test_windows_are_faded_into_each_other():
    """LTX's long videos: the overlap is a mean that moves from the old to the new."""
    so_far, new = torch.zeros(1, 1, 4, 1, 1), torch.ones(1, 1, 5, 1, 1)
    values = {"out_latents": so_far, "prev_overlap_len": 1, "overlap_lat": 3, "adain_factor": 0}
    joined = op.window_behind_others(new, Reading(values=values))
    expected = [0, 0, 1 / 3, 2 / 3, 1]
    torch.testing.assert_close(joined.flatten(), torch.tensor(expected))


def test_statistics_are_moved_towards_a_reference():
    """All the way, a window has the reference's mean and deviation."""
    so_far, first = zoo.noise(1, 2, 3, 4, 4), 3 * zoo.noise(1, 2, 3, 4, 4, seed=1) + 5
    values = {
        "out_latents": so_far,
        "first_window_latents": first,
        "prev_overlap_len": 0,
        "overlap_lat": 1,
        "adain_factor": 1.0,
    }
    joined = op.window_behind_others(zoo.noise(1, 2, 4, 4, 4, seed=2), Reading(values=values))
    new = joined[:, :, 3:]
    dims = (2, 3, 4)
    torch.testing.assert_close(new.mean(dims), first.mean(dims), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.std(dims), first.std(dims), rtol=1e-4, atol=1e-4)


def test_a_stepped_part_needs_the_whole():
    """Without the callback's latents there is nothing to fill in from."""
    with pytest.raises(ValueError, match="latents must be known to complete what was stepped"):
        op.behind_first_frame(torch.zeros(1, 1, 2, 1, 1), reading())
