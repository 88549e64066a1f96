"""Telling one VAE's weights from another's, wherever they rest."""

import copy
import re

import accelerate
import diffusers
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from torch import nn

from sd_progress.fingerprint import SAMPLES, fingerprint


def hashes_of_changes(vae, places):
    """With each of the numbers another one, in turn; (tensor, index) of the flattened tensor."""
    found = []
    for tensor, index in places:
        flat = tensor.detach().view(-1)
        before = flat[index].item()
        flat[index] = before + 1
        found.append(fingerprint(vae))
        flat[index] = before
    return found


def test_it_is_a_hash():
    """Of 256 bits, the same for the same weights, and the VAE is left as it was."""
    vae = tiny.vae()
    before = copy.deepcopy(vae.state_dict())
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(vae))
    assert fingerprint(vae) == fingerprint(tiny.vae())
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())


def test_it_survives_saving_and_loading(tmp_path):
    """And does not depend on the folder."""
    vae = tiny.vae(latents_mean=(0.5,) * 4)
    for folder in ("one", "two"):
        vae.save_pretrained(tmp_path / folder)
        assert fingerprint(AutoencoderKL.from_pretrained(tmp_path / folder)) == fingerprint(vae)


def test_every_tensor_counts():
    """Another first number in any of them makes another hash."""
    vae = tiny.vae()
    before, tensors = fingerprint(vae), list(vae.parameters())
    found = hashes_of_changes(vae, [(tensor, 0) for tensor in tensors])
    assert len({before, *found}) == len(tensors) + 1
    assert fingerprint(vae) == before


def test_every_number_of_a_small_tensor_counts():
    """And some of each part of a large one."""
    vae, large = tiny.vae(), nn.Linear(SAMPLES, 5)
    bias = vae.quant_conv.bias
    assert len({fingerprint(vae), *hashes_of_changes(vae, [(bias, k) for k in range(8)])}) == 9
    ends = [(large.weight, 0), (large.weight, large.weight.numel() - 5)]
    assert len({fingerprint(large), *hashes_of_changes(large, ends)}) == 3


def test_buffers_count():
    """Some VAEs keep the statistics of their latents in them."""
    norm = nn.BatchNorm2d(4)
    assert hashes_of_changes(norm, [(norm.running_mean, 3)]) != [fingerprint(norm)]


def test_names_shapes_and_dtypes_count():
    """The same numbers elsewhere are another VAE."""
    wide, tall = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    for layer in (wide, tall):
        nn.init.ones_(layer.weight)
    half = copy.deepcopy(wide).half()
    renamed = nn.Linear(2, 3, bias=False)
    renamed.kernel, renamed.weight = wide.weight, None
    assert len({fingerprint(layer) for layer in (wide, tall, half, renamed)}) == 4


def test_the_config_and_the_class_count():
    """A VAE of another scaling factor has other latents; private entries say nothing of them."""
    vae, other = tiny.vae(), tiny.vae(scaling_factor=0.5)
    assert fingerprint(other) != fingerprint(vae)
    moved = tiny.vae()
    moved.register_to_config(_name_or_path="elsewhere")
    assert fingerprint(moved) == fingerprint(vae)
    moved.__class__ = diffusers.AutoencoderKLCogVideoX
    assert fingerprint(moved) != fingerprint(vae)


def test_compiled_vaes_are_the_same():
    """The whole of it, or a part."""
    vae = tiny.vae()
    expected = fingerprint(vae)
    assert fingerprint(torch.compile(vae, backend="eager")) == expected
    vae.decoder = torch.compile(vae.decoder, backend="eager")
    assert fingerprint(vae) == expected


def test_the_layout_in_memory_does_not_matter():
    """As little as being frozen, or at work."""
    vae = tiny.vae().to(memory_format=torch.channels_last).requires_grad_(False).train()
    assert not vae.decoder.conv_in.weight.is_contiguous()
    assert fingerprint(vae) == fingerprint(tiny.vae())


def test_offloaded_vaes():
    """One that rests on the CPU is the same; one that is streamed in part by part has no hash."""
    vae = tiny.vae()
    accelerate.cpu_offload_with_hook(vae, torch.device("cpu"))
    assert fingerprint(vae) == fingerprint(tiny.vae())
    streamed = tiny.vae()
    accelerate.cpu_offload(streamed, execution_device=torch.device("cpu"))
    assert fingerprint(streamed) is None


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_weights_that_cannot_be_read(name):
    """Some of them on the meta device, or none at all."""
    vae = tiny.vae()
    getattr(vae, name).conv_in.to("meta")
    assert fingerprint(vae) is None
    assert fingerprint(nn.ReLU()) is None


def test_weights_that_cannot_be_read_have_none():
    """Sparse ones here, as an example of tensors that know only some operations."""
    vae = tiny.vae()
    vae.register_buffer("odd", torch.eye(3).to_sparse())
    assert fingerprint(vae) is None
