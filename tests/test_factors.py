"""Tests of `sd_progress.factors`: the published rows, lookup by VAE, files."""

import json
import math
import subprocess
import sys
from importlib import resources

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sd_progress import factors as factors_module
from sd_progress.factors import Factors, FactorsRegistry, VaeKey, describe_vae, load, save

DATA = resources.files("sd_progress").joinpath("data")
TABLES = json.loads(DATA.joinpath("published_factors.json").read_text("utf-8"))["tables"]
FAMILIES = json.loads(DATA.joinpath("vae_families.json").read_text("utf-8"))["families"]

SD1 = VaeKey("AutoencoderKL", 4, 0.18215)
TINY_KL = {
    "block_out_channels": (4,),
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}


@pytest.fixture(scope="module")
def shipped():
    """A registry of its own, so that no test changes another's."""
    return FactorsRegistry.shipped()


def _kl(channels, scale, shift=None, **options):
    return diffusers.AutoencoderKL(
        latent_channels=channels, scaling_factor=scale, shift_factor=shift, **TINY_KL, **options
    )


def _flux2():
    vae = diffusers.AutoencoderKLFlux2(**TINY_KL)
    vae.bn.running_mean.copy_(torch.tensor(FAMILIES["flux2"]["latents_mean"]))
    vae.bn.running_var.copy_(torch.tensor(FAMILIES["flux2"]["latents_std"]) ** 2 - vae.bn.eps)
    return vae


def _ltx2():
    vae = diffusers.AutoencoderKLLTX2Video(
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
    )
    vae.latents_mean.copy_(torch.tensor(FAMILIES["ltx2"]["latents_mean"]))
    vae.latents_std.copy_(torch.tensor(FAMILIES["ltx2"]["latents_std"]))
    return vae


def _minimax_h3():
    statistics = {name: FAMILIES["minimax_h3"][name] for name in ("latents_mean", "latents_std")}
    return diffusers.AutoencoderKLMiniMaxH3(
        block_out_channels=(4,) * 6,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
        **statistics,
    )


def _wan22():
    statistics = {name: FAMILIES["wan22"][name] for name in ("latents_mean", "latents_std")}
    return diffusers.AutoencoderKLWan(base_dim=2, z_dim=48, **statistics)


REAL_VAES = {
    "sd1": lambda: _kl(4, 0.18215),
    "sdxl": lambda: _kl(4, 0.13025),
    "sd3": lambda: _kl(16, 1.5305, 0.0609),
    "flux": lambda: _kl(16, 0.3611, 0.1159),
    "cogview4": lambda: _kl(16, 1.0),
    "flux2": _flux2,
    "wan21": lambda: diffusers.AutoencoderKLWan(base_dim=2),
    "wan22": _wan22,
    "ltx2": _ltx2,
    "minimax_h3": _minimax_h3,
}


def _rgb(factors, latents):
    """RGB of latents that are (C,) everywhere in the picture."""
    return np.einsum("ocyx,c->o", factors.weight, latents) + factors.bias


def test_every_published_row_is_there(shipped):
    """Each table of the JSON is usable by its own name, finite, with provenance and licence."""
    rows = [shipped.by_name(name) for name in TABLES]
    assert [row.name for row in rows] == list(TABLES)
    for row in rows:
        assert row.latent_channels == row.vae_key.latent_channels
        assert TABLES[row.name]["source"] in row.provenance
        assert row.licence == TABLES[row.name]["licence"]


def test_forum_table_gives_the_forum_colours(shipped):
    """`keturn/SD1_4` on VAE-space latents is the posted table on sampler-space latents."""
    sampler = np.array([0.5, -1.0, 2.0, 0.25])
    expected = 0.5 * np.array([0.298, 0.207, 0.208]) - np.array([0.187, 0.286, 0.173])
    expected += 2 * np.array([-0.158, 0.189, 0.264]) + 0.25 * np.array([-0.184, -0.271, -0.473])
    row = shipped.by_name("keturn/SD1_4")
    np.testing.assert_allclose(_rgb(row, sampler / 0.18215), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale", "shift"),
    [("stability/SD3_reference", 1.5305, 0.0609), ("sdcpp/Flux", 0.3611, 0.1159)],
)
def test_shift_is_applied(shipped, name, scale, shift):
    """Latents equal to the shift are the table's zero, one scale above them its column sum."""
    row, table = shipped.by_name(name), np.array(TABLES[name]["factors"])
    bias = TABLES[name]["bias"] or [0, 0, 0]
    np.testing.assert_allclose(_rgb(row, np.full(16, shift)), bias, atol=1e-6)
    above = _rgb(row, np.full(16, shift + 1 / scale))
    np.testing.assert_allclose(above, table.sum(axis=0) + bias, atol=1e-6)


@pytest.mark.parametrize("family", ["wan21", "wan22", "ltx2", "minimax_h3"])
def test_statistics_are_applied(shipped, family):
    """Where a VAE has statistics, the table is for `(z - mean) / std`."""
    mean, std = (np.array(FAMILIES[family][f"latents_{which}"]) for which in ("mean", "std"))
    table = TABLES[FAMILIES[family]["default"]]
    sampler = np.random.default_rng(0).normal(size=len(mean))
    expected = sampler @ np.array(table["factors"]) + table["bias"]
    got = _rgb(shipped.by_name(family), sampler * std + mean)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_output_range_is_signed(shipped):
    """A table for 0 to 255 comes out in [-1, 1]: its bias alone is (150, 140, 130)."""
    row = shipped.by_name("diffusers_docs/SDXL_255")
    np.testing.assert_allclose(row.bias * 127.5 + 127.5, [150, 140, 130], rtol=1e-6)
    np.testing.assert_allclose(row.weight[:, 0, 0, 0] * 127.5 / 0.13025, 60, rtol=1e-6)


def test_smoothing_matrix_is_part_of_the_kernel(shipped):
    """A single lit latent is spread over 3x3 pixels as `invoke/SDXL` says."""
    row, table = shipped.by_name("invoke/SDXL"), TABLES["invoke/SDXL"]
    assert row.kernel_size == 3
    spread = row.weight[1, 2] / 0.13025
    np.testing.assert_allclose(
        spread, table["factors"][2][1] * np.array(table["smooth_matrix"]), rtol=1e-5
    )


def test_patch_table_is_the_mean_over_covering_patches(shipped):
    """The FLUX.2 patch table, at one pixel, is the mean of what its four patches say."""
    table = TABLES["fused_render/Flux2_klein_packed128_01"]
    mean, std = (np.array(FAMILIES["flux2"][f"latents_{which}"]) for which in ("mean", "std"))
    latents = np.random.default_rng(0).normal(size=(32, 3, 3))
    corners = [latents[:, y : y + 2, x : x + 2].reshape(128) for y in (0, 1) for x in (0, 1)]
    tokens = [(corner - mean) / std @ np.array(table["factors"]) for corner in corners]
    expected = 2 * (np.mean(tokens, axis=0) + table["bias"]) - 1
    row = shipped.by_name("flux2")
    got = np.einsum("ocyx,cyx->o", row.weight, latents) + row.bias
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", REAL_VAES)
def test_real_vae_gets_its_own_row(shipped, name):
    """A diffusers VAE with a family's constants gets that family's row, in bfloat16 too."""
    vae = REAL_VAES[name]()
    assert shipped.find(vae).name == name
    assert shipped.find(vae.to(torch.bfloat16)).name == name


def test_classes_of_one_latent_space_share_a_row(shipped):
    """Qwen-Image's VAE gets Wan 2.1's row, the asymmetric one Stable Diffusion's."""
    assert shipped.find(diffusers.AutoencoderKLQwenImage(base_dim=2)).name == "wan21"
    blocks = {"down_block_out_channels": (4,), "up_block_out_channels": (4,), "norm_num_groups": 2}
    assert shipped.find(diffusers.AsymmetricAutoencoderKL(**blocks)).name == "sd1"


def test_subclass_is_what_it_inherits_from(shipped):
    """A user's subclass of a diffusers VAE is found like its parent, compiled or not."""

    class Mine(diffusers.AutoencoderKL):
        pass

    mine = Mine(**TINY_KL)
    assert shipped.find(mine).name == "sd1"
    assert shipped.find(torch.compile(mine, backend="eager")).name == "sd1"


@pytest.mark.parametrize(
    "vae",
    [
        lambda: _kl(4, 0.2),
        lambda: _kl(16, 1.5305),
        lambda: _kl(4, 0.13025, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        lambda: diffusers.AutoencoderKLFlux2(**TINY_KL),
    ],
    ids=["other-scale", "other-shift", "own-statistics", "other-batch-norm"],
)
def test_other_constants_are_unknown(shipped, vae):
    """Fitting channels are not enough: another scale, shift or statistics is another VAE."""
    assert shipped.find(vae()) is None


def test_unknown_vae_is_explained(shipped):
    """The message names the VAE, what is shown instead, and every way out."""
    message = shipped.explain_unknown(_kl(4, 0.2))
    assert "AutoencoderKL with latent_channels=4, scaling_factor=0.2, shift_factor=0" in message
    assert "first three principal components" in message
    for way_out in ("decoder='sd1' or 'sdxl'", "Factors(...)", "vae_every=N", "register("):
        assert way_out in message


def test_distilled_vae_is_not_guessed(shipped):
    """TAESD has no row by itself; told whose latents they are, it gets the sampler-space table."""
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
        latent_channels=16,
    )
    assert shipped.find(vae) is None
    table = TABLES["sdcpp/Flux"]
    told = shipped.by_name("flux", vae)
    np.testing.assert_allclose(told.weight[:, :, 0, 0].T, table["factors"], atol=1e-6)
    np.testing.assert_allclose(told.bias, table["bias"], atol=1e-6)


def test_full_vae_keeps_the_row_it_was_told(shipped):
    """A name means VAE space for every full VAE, whatever its scale."""
    assert shipped.by_name("sd1", _kl(4, 0.2)) is shipped.by_name("sd1")


@pytest.mark.parametrize("vae", [None, object(), torch.nn.Identity()])
def test_anything_can_be_described(shipped, vae):
    """What is no VAE at all is unknown, not an error."""
    assert describe_vae(vae) == VaeKey(type(vae).__name__)
    assert shipped.find(vae) is None


def test_offloaded_statistics_are_not_read():
    """Buffers on the meta device hold no values, so the key has none."""
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLFlux2(**TINY_KL)
    assert describe_vae(vae) == VaeKey("AutoencoderKLFlux2", 32)


def test_registered_factors_win(shipped):
    """What the user registers replaces the shipped row for that VAE, and is found by name."""
    registry = FactorsRegistry.shipped()
    mine = Factors.from_table(np.eye(4, 3), name="mine")
    registry.register(mine, _kl(4, 0.18215))
    assert registry.find(SD1).name == "mine"
    assert registry.by_name("mine").vae_key == SD1
    assert shipped.find(SD1).name == "sd1"


def test_register_needs_a_fitting_vae():
    """Factors for other channels, or for no VAE at all, are refused."""
    mine = Factors.from_table(np.eye(4, 3), name="mine")
    with pytest.raises(ValueError, match=r"factors must have 16 latent channels .* got 4; pass"):
        FactorsRegistry().register(mine, _kl(16, 1.0))
    with pytest.raises(ValueError, match="vae must be given for factors 'mine', got None; pass"):
        FactorsRegistry().register(mine)


def test_wrong_name_suggests_the_closest(shipped):
    """A misspelt name raises with what was probably meant."""
    with pytest.raises(ValueError, match=r"name must be .* got 'keturn_SD14'; .*'keturn/SD1_4'"):
        shipped.by_name("keturn_SD14")


def test_module_functions_use_the_default_registry():
    """The plain functions are the shipped registry's methods."""
    assert factors_module.names() == FactorsRegistry.shipped().names()
    assert factors_module.find(SD1) is factors_module.by_name("sd1")
    assert factors_module.explain_unknown(VaeKey("Odd", 7)).startswith("vae must be")


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ((3, 4), 3, r"weight must be \(3\*s\*s, C, k, k\) with k odd, got \(3, 4\); "),
        ((3, 4, 2, 2), 3, r"weight must be .* got \(3, 4, 2, 2\); "),
        ((6, 4, 1, 1), 6, r"weight must have 3\*s\*s outputs, got 6; "),
        ((12, 4, 1, 1), 3, r"bias must be \(12,\) .* got \(3,\); "),
    ],
)
def test_factors_check_their_shapes(weight, bias, message):
    """Shapes that are no convolution to RGB are refused at construction."""
    with pytest.raises(ValueError, match=message):
        Factors(np.zeros(weight), np.zeros(bias), "odd")


def test_factors_check_their_numbers():
    """Numbers that are not finite, or a table of the wrong shape, are refused."""
    with pytest.raises(ValueError, match="weight must be finite, got NaN or infinity; "):
        Factors.from_table([[math.nan, 0, 0]], name="odd")
    with pytest.raises(ValueError, match=r"table must be \(C, 3\), got \(3,\); "):
        Factors.from_table([0, 0, 0], name="odd")


def test_saved_factors_come_back_whole(tmp_path):
    """`load` returns bit for bit what `save` was given; no other file is left."""
    rng = np.random.default_rng(0)
    key = VaeKey("AutoencoderKL", 4, 0.9, 0.1, (0.1, 0.2, 0.3, 1 / 3), (1.0, 2.0, 3.0, 4.0))
    given = Factors(
        rng.normal(size=(12, 4, 3, 3)), rng.normal(size=12), "mine", "a fit", "MIT", 25.5, key
    )
    save(given, tmp_path / "mine.safetensors")
    got = load(tmp_path / "mine.safetensors")
    assert (got.weight == given.weight).all()
    assert (got.bias == given.bias).all()
    assert (got.name, got.provenance, got.licence, got.psnr_db) == ("mine", "a fit", "MIT", 25.5)
    assert (got.vae_key, got.kernel_size, got.upscale) == (key, 3, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_failed_save_leaves_nothing(tmp_path):
    """A target that cannot be replaced keeps what it was, and no temporary file stays."""
    (tmp_path / "mine.safetensors").mkdir()
    with pytest.raises(OSError, match=r"mine\.safetensors"):
        save(Factors.from_table(np.eye(4, 3), name="mine"), tmp_path / "mine.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_foreign_files_are_refused(tmp_path):
    """A file that is not ours raises with its path and the key that is wrong."""
    path = tmp_path / "odd.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"path must be a safetensors file, got '.*odd"):
        load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"path must be a factors file, got .*no 'format'"):
        load(path)


def test_file_without_bias_names_it(tmp_path):
    """A factors file that lost a tensor raises with that tensor's name."""
    path = tmp_path / "half.safetensors"
    whole = Factors.from_table(np.eye(4, 3), name="half")
    save_file({"weight": whole.weight}, path, factors_module._metadata(whole))
    with pytest.raises(ValueError, match=r"half\.safetensors' \(no 'bias'\); write it with"):
        load(path)


def test_file_of_another_version_is_refused(tmp_path):
    """A file in a format that this version does not know is not guessed at."""
    path = tmp_path / "later.safetensors"
    whole = Factors.from_table(np.eye(4, 3), name="later")
    metadata = {**factors_module._metadata(whole), "format_version": "3"}
    save_file({"weight": whole.weight, "bias": whole.bias}, path, metadata)
    with pytest.raises(ValueError, match=r"format must be sd_progress\.factors 1 or 2, got .* 3"):
        load(path)


def test_import_is_light():
    """Looking up a row loads neither torch nor diffusers."""
    code = (
        "import sys; from sd_progress.factors import by_name; by_name('sd1');"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_is_sorted_and_real():
    """`__all__` is sorted and names what is there."""
    assert factors_module.__all__ == sorted(factors_module.__all__)
    assert all(hasattr(factors_module, name) for name in factors_module.__all__)
