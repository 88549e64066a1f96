"""The closed-form solution: features of latents, normal equations, and a network beside it."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from sd_progress.decoders import LinearDecoder
from sd_progress.factors import Hidden, Polynomial, VaeKey
from sd_progress.regression import (
    RIDGES,
    ROWS_AT_ONCE,
    Equations,
    Maker,
    Shape,
    best_ridge,
    with_network,
)
from sd_progress.scores import Pair, scored
from sd_progress.share import Share

ALONE = Share(None)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def maker(shape):
    return Maker(shape, "test", "7 pictures", VaeKey("AutoencoderKL", shape.channels), "ab" * 32)


def summed(shape, pairs):
    """The normal equations of pictures."""
    return Equations.of(shape, torch.device("cpu")).with_more(shape, pairs, ALONE)


def least_squares(features, targets, ridge=0.0):
    """By numpy, with a row for each penalty; the constant, which is last, has none."""
    rows = np.sqrt(ridge * (features**2).sum(axis=0))
    rows[-1] = 0
    padded = np.concatenate([features, np.diag(rows)])
    zeros = np.zeros((len(rows), targets.shape[1]))
    return np.linalg.lstsq(padded, np.concatenate([targets, zeros]), rcond=None)[0]


# --- rows


def test_the_counts_of_a_shape():
    """Three by three of four channels, ten products of two of them, and a constant."""
    shape = Shape(channels=4, kernel_size=3, upscale=2, degree=2)
    assert (shape.affine, shape.features, shape.outputs) == (36, 36 + 10 + 1, 12)
    assert Shape(4, 3, 1, 3).features == 36 + 10 + 20 + 1
    assert Shape(4, 5, 1, 1).features == 100 + 1


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_features_are_neighbourhoods(kernel_size):
    """By channel, row and column, the border repeated; then a one."""
    latents, margin = normal(2, 3, 4, 6), kernel_size // 2
    padded = np.pad(latents, [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode="edge")
    found = Shape(3, kernel_size, 1, 1).features_of(latents).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel_size,) * 2, axis=(2, 3))
    expected = windows.transpose(0, 2, 3, 1, 4, 5).reshape(2 * 4 * 6, -1)
    np.testing.assert_array_equal(found[:, :-1], expected)
    assert (found[:, -1] == 1).all()


def test_products_are_of_the_latents_under_the_pixel():
    """Before the constant; each by hand."""
    latents = normal(1, 2, 3, 4)
    a, b = latents[0].flatten(1)
    quadratic = Shape(2, 3, 1, 2).features_of(latents)
    torch.testing.assert_close(quadratic[:, 18:-1].T, torch.stack([a * a, a * b, b * b]))
    cubic = Shape(2, 3, 1, 3).features_of(latents)
    torch.testing.assert_close(
        cubic[:, 21:-1].T, torch.stack([a**3, a * a * b, a * b * b, b**3]), atol=1e-6, rtol=1e-5
    )


def test_targets_are_the_pixels_of_a_latent():
    """Colour by colour, row by row, means where the map has fewer than the picture."""
    picture = normal(1, 3, 8, 12)
    ((features, targets),) = Shape(4, 1, 2, 1).rows(Pair(picture, normal(1, 4, 2, 3)))
    assert features.dtype == targets.dtype == torch.float64
    means = picture.numpy().reshape(3, 4, 2, 6, 2).mean(axis=(2, 4))  # two pixels per latent
    expected = means.reshape(3, 2, 2, 3, 2).transpose(1, 3, 0, 2, 4).reshape(6, 12)
    np.testing.assert_allclose(targets, expected, atol=1e-6)


def test_rows_come_some_at_a_time():
    """However large the pictures, and however many; together they are all."""
    pair = Pair(normal(2, 3, 96, 96), normal(2, 2, 96, 96))
    rows = list(Shape(2, 1, 1, 1).rows(pair))
    assert [len(features) for features, _ in rows] == [ROWS_AT_ONCE, 96 * 96 - ROWS_AT_ONCE] * 2
    targets = torch.cat([targets for _, targets in rows])
    assert torch.equal(targets.float(), pair.pictures.movedim(1, -1).reshape(-1, 3))


# --- equations


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_the_equations_are_ridge_regression(ridge):
    """The same numbers as numpy's least squares, and the constant is not penalised."""
    shape = Shape(channels=3, kernel_size=3, upscale=2, degree=2)
    pairs = [
        Pair(normal(2, 3, 16, 20, seed=k) + 3, normal(2, 3, 8, 10, seed=9 + k)) for k in (0, 1)
    ]
    rows = [row for pair in pairs for row in shape.rows(pair)]
    features, targets = (torch.cat(parts).numpy() for parts in zip(*rows, strict=True))
    found = summed(shape, pairs).solved(ridge)
    np.testing.assert_allclose(found, least_squares(features, targets, ridge), atol=1e-9)


def test_the_unit_of_a_channel_does_not_matter():
    """A channel that is thirty times larger has a weight thirty times smaller."""
    shape, pair = Shape(2, 1, 1, 1), Pair(normal(1, 3, 8, 8), normal(1, 2, 8, 8, seed=1))
    units = torch.tensor([30.0, 0.03]).reshape(1, 2, 1, 1)
    plain = summed(shape, [pair]).solved(0.1)
    other = summed(shape, [Pair(pair.pictures, pair.latents * units)]).solved(0.1)
    torch.testing.assert_close(
        other[:2] * units.reshape(2, 1).double(), plain[:2], rtol=1e-5, atol=0
    )
    assert (plain[:2] - summed(shape, [pair]).solved(0.0)[:2]).abs().max() > 1e-3


def test_dead_and_double_channels_do_no_harm():
    """They make the equations singular, and get what little they need."""
    latents = normal(1, 2, 12, 12)
    picture = latents[:, :1].expand(-1, 3, -1, -1) / 2
    latents = torch.cat([latents[:, :1], latents[:, :1], 0 * latents[:, :1]], dim=1)
    solved = summed(Shape(3, 1, 1, 1), [Pair(picture, latents)]).solved(1e-6)
    expected = torch.tensor([0.25, 0.25, 0.0, 0.0], dtype=torch.float64)[:, None].expand(-1, 3)
    torch.testing.assert_close(solved, expected, atol=1e-5, rtol=0)


def test_more_pictures_change_nothing_that_was():
    """The sum is another one."""
    shape = Shape(2, 1, 1, 1)
    first, second = (
        Pair(normal(1, 3, 4, 4, seed=k), normal(1, 2, 4, 4, seed=5 + k)) for k in (0, 1)
    )
    equations = summed(shape, [first])
    before = equations.products.clone()
    both = equations.with_more(shape, [second], ALONE)
    torch.testing.assert_close(both.targets, summed(shape, [first, second]).targets)
    assert torch.equal(equations.products, before)


# --- maps


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("upscale", [1, 2])
def test_a_linear_decoder_is_found(kernel_size, upscale):
    """To its last digits: the weights of torch's own layers come back."""
    conv = nn.Conv2d(
        4, 3 * upscale**2, kernel_size, padding="same", padding_mode="replicate"
    ).requires_grad_(False)
    conv.weight.copy_(normal(*conv.weight.shape))
    conv.bias.copy_(normal(*conv.bias.shape))
    latents = normal(4, 4, 10, 12, seed=1)
    pair = Pair(nn.PixelShuffle(upscale)(conv(latents)), latents)
    shape = Shape(4, kernel_size, upscale, 1)
    found = maker(shape)(summed(shape, [pair]).solved(0.0), 0.0)
    np.testing.assert_allclose(found.weight, conv.weight, atol=1e-5)
    np.testing.assert_allclose(found.bias, conv.bias, atol=1e-5)


def curved(latents, degree):
    """A picture of products of three channels."""
    a, b, c = latents.unbind(1)
    cubes = [a * b * c, a**3, b * c * c] if degree == 3 else [0, 0, 0]
    squares = [a * b + 0.5 * c, b * b - a, 0.2 * a * c + 1]
    return torch.stack([s + cube for s, cube in zip(squares, cubes, strict=True)], dim=1) / 4


@pytest.mark.parametrize(("degree", "kind"), [(2, "quadratic"), (3, "cubic")])
def test_a_polynomial_decoder_is_found(degree, kind):
    """It draws other latents without error, which a map of one degree less cannot."""
    pair = Pair(curved(normal(2, 3, 16, 16), degree), normal(2, 3, 16, 16))
    shapes = [Shape(3, 3, 1, degree), Shape(3, 3, 1, degree - 1)]
    found, lower = (maker(shape)(summed(shape, [pair]).solved(0.0), 0.0) for shape in shapes)
    others = normal(1, 3, 5, 5, seed=7) / 2
    drawn = LinearDecoder(found).decode_float(others)
    torch.testing.assert_close(drawn, curved(others, degree), atol=1e-5, rtol=0)
    assert found.kind == kind
    assert (LinearDecoder(lower).decode_float(others) - curved(others, degree)).abs().max() > 0.05


def test_a_solution_becomes_factors():
    """Every number in its place, with where it comes from."""
    shape = Shape(channels=2, kernel_size=3, upscale=2, degree=2)
    solved = torch.arange(shape.features * 12, dtype=torch.float64).reshape(-1, 12)
    made = maker(shape)(solved, 1e-3)
    assert made.weight[5, 1, 2, 0] == solved[9 + 6, 5]
    assert (made.extra.weight[5].tolist(), made.extra.degree) == (solved[18:21, 5].tolist(), 2)
    np.testing.assert_array_equal(made.bias, solved[-1])
    assert made.provenance == "sd-progress calibrate: 7 pictures, ridge 0.001"
    assert (made.name, made.vae_hash) == ("test", "ab" * 32)
    assert made.vae_key == VaeKey("AutoencoderKL", 2)
    assert isinstance(made.extra, Polynomial)


def noisy(count, strength, seed):
    """Pictures that are an affine map of latents, but for noise."""
    latents = normal(count, 4, 8, 8, seed=seed)
    clean = torch.einsum("oc,bchw->bohw", normal(3, 4, seed=99) / 8, latents)
    return Pair(clean + strength * normal(*clean.shape, seed=seed + 50), latents)


@pytest.mark.parametrize(("strength", "is_small"), [(0.0, True), (0.5, False)])
def test_the_ridge_is_chosen_by_pictures_that_are_held_out(strength, is_small):
    """Without noise there is nothing to smooth; with noise, the best of all on those pictures."""
    shape = Shape(4, 5, 1, 1)
    make, equations = maker(shape), summed(shape, [noisy(2, strength, 0)])
    held_out = [noisy(1, 0.0, 1), noisy(1, 0.0, 2)]
    best, ridge = best_ridge(make, equations, held_out, ALONE)
    tried = {each: make(equations.solved(each), each) for each in RIDGES}
    scores = {
        each: sum(scored(map_, pair, 1).psnr_db for pair in held_out)
        for each, map_ in tried.items()
    }
    assert ridge == max(scores, key=scores.get)
    assert (ridge == RIDGES[0]) == is_small
    np.testing.assert_array_equal(best.weight, tried[ridge].weight)


# --- networks


def bent(seed, count=1):
    """Pictures that no polynomial draws: the size of a latent, and of a difference to the right."""
    latents = normal(count, 2, 24, 24, seed=seed) + 1
    right = torch.cat([latents[..., 1:], latents[..., -1:]], dim=-1)
    a, b = latents.unbind(1)
    picture = [a.abs() - 1, (a - right[:, 0]).abs() / 2 - 0.5, b / 4]
    return Pair(torch.stack(picture, dim=1) / 4, 5 * latents)


@functools.cache
def network(seed=0, units=4):
    """Fitted to `bent` pictures, beside the affine map."""
    shape = Shape(2, 3, 1, 1)
    rows = [(x.float(), y.float()) for x, y in shape.rows(bent(0, count=4))]
    equations = summed(shape, [bent(0, count=4)])
    affine, _ = best_ridge(maker(shape), equations, [bent(5)], ALONE)
    return affine, with_network(maker(shape), affine, rows, [bent(5)], units, seed)


def test_a_network_draws_what_no_affine_map_can():
    """On pictures that it has not seen, with its metadata; the affine part is kept beside it."""
    affine, map_ = network()
    plain, found = (scored(each, bent(6), 1).psnr_db for each in (affine, map_))
    assert found > plain + 10
    assert isinstance(map_.extra, Hidden)
    assert map_.extra.kernel.shape == (4, 2, 3, 3)
    assert (map_.kind, map_.vae_hash) == ("mlp", affine.vae_hash)
    assert ", 4 hidden units, ridge " in map_.provenance


def test_a_network_that_is_of_no_use_is_left_out():
    """Where held-out pictures are unlike those that it saw, the affine map is better."""
    shape = Shape(2, 3, 1, 1)
    rows = [(x.float(), y.float()) for x, y in shape.rows(bent(0))]
    opposite = Pair(-bent(5).pictures, bent(5).latents)
    affine, _ = best_ridge(maker(shape), summed(shape, [opposite]), [opposite], ALONE)
    assert with_network(maker(shape), affine, rows, [opposite], 4, 0) is affine


def test_a_network_is_the_same_for_the_same_seed():
    """Whatever the global random state is, under inference mode, and whatever torch's defaults."""
    _, first = network()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            _, again = network.__wrapped__()
    finally:
        torch.set_default_dtype(torch.float32)
    _, other = network(seed=1)
    np.testing.assert_array_equal(again.extra.kernel, first.extra.kernel)
    assert not np.array_equal(other.extra.kernel, first.extra.kernel)


def test_the_outputs_of_a_network_are_solved_for():
    """With its hidden units as features, least squares has hardly a smaller error."""
    _, map_ = network()
    shape, pair = Shape(2, 3, 1, 1), bent(0, count=4)
    features, targets = (torch.cat(parts).float() for parts in zip(*shape.rows(pair), strict=True))
    kernel, bias = (torch.from_numpy(x) for x in (map_.extra.kernel, map_.extra.bias))
    hidden = (features[:, :-1] @ kernel.flatten(1).T + bias).relu()
    columns = torch.cat([hidden, features], dim=1).double().numpy()
    residual = targets.numpy() - columns @ least_squares(columns, targets.numpy())
    error = LinearDecoder(map_).decode_float(pair.latents) - pair.pictures
    assert error.square().mean() < 1.05 * np.mean(residual**2)
    assert error.abs().mean() > 1e-4  # there is an error to compare
