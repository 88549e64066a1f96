"""Owns drawing with a distilled decoder: nearly the VAE's pictures, for a fraction of its time."""

from __future__ import annotations

import contextlib
import copy
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .factors import SAMPLER_SPACE_CLASSES, describe_vae
from .pixels import to_uint8
from .vae import execution_device


class TinyDecoder:
    """Pictures in full size by a distilled VAE, such as `"madebyollin/taesd"`.

    Much dearer than a linear map and much cheaper than the VAE. It draws in the preview's thread:
    on a GPU in a stream of its own beside the run's, on a CPU on one core. A callback that is given
    one tries it on the pipeline's VAE first, and refuses it where it was made for another.

    Args:
        tiny: a Hub id or a folder of an `AutoencoderTiny`, or a module whose `decode(latents)`
            returns pictures in [-1, 1]. An `AutoencoderTiny` takes sampler-space latents; any other
            module is given what `vae.decode` is given.
        device: where it runs; left out, a module stays where it is, and what is loaded here goes
            where the pipeline's VAE runs.

    Raises:
        ValueError: there is no such model.
        TypeError: `tiny` cannot decode.

    Example:
        `PreviewCallback(pipe, "steps/", decoder=TinyDecoder("madebyollin/taesd"))`
    """

    def __init__(
        self,
        tiny: nn.Module | str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self._is_ours = not isinstance(tiny, nn.Module)
        self._has_place = device is not None
        self.module = tiny if isinstance(tiny, nn.Module) else _loaded(os.fspath(tiny))
        if not callable(getattr(self.module, "decode", None)):
            raise TypeError(
                f"tiny must have a method decode(latents), got {type(tiny).__name__}; "
                "pass an AutoencoderTiny, its Hub id or its folder"
            )
        if device is not None:
            self.module.to(device)
        self.name = (
            f"tiny:{type(tiny).__name__ if isinstance(tiny, nn.Module) else Path(tiny).name}"
        )
        self._stream: torch.cuda.Stream | None = None
        self._gain, self._centre = torch.ones(1, device="cpu"), torch.zeros(1, device="cpu")

    def for_vae(self, vae: object) -> TinyDecoder:
        """The same, taking the latents of a VAE; `PreviewCallback` calls this.

        Raises:
            ValueError: the two have different latents.
        """
        theirs, own = describe_vae(vae), describe_vae(self.module)
        if None not in (theirs.latent_channels, own.latent_channels) and (
            theirs.latent_channels != own.latent_channels
        ):
            raise ValueError(
                f"decoder must have {theirs.latent_channels} latent channels for this VAE, got "
                f"{self.name!r} with {own.latent_channels}; pass one that was made for it"
            )
        bound = copy.copy(self)
        if self._is_ours and not self._has_place and isinstance(vae, nn.Module):
            place = execution_device(vae)
            self.module.to(place, torch.float32 if place.type == "cpu" else torch.float16)
        is_sampler_space = own.class_name in SAMPLER_SPACE_CLASSES
        if is_sampler_space and theirs.class_name not in SAMPLER_SPACE_CLASSES:
            gain, centre = theirs.normalisation
            if len(gain) not in (1, theirs.latent_channels):
                raise ValueError(
                    f"decoder must be one whose latents are the VAE's own where those are scaled "
                    f"in patches, got {self.name!r} for {theirs}; pass decoder='auto'"
                )
            bound._gain, bound._centre = (torch.from_numpy(x).float() for x in (gain, centre))
        return bound

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(B, C, h, w) float, VAE-space, any device -> (B, H, W, 3) uint8, one after the other."""
        gain, centre = (x[:, None, None].to(latents.device) for x in (self._gain, self._centre))
        normalised = (latents.float() - centre) * gain
        like = next(self.module.parameters())
        with torch.no_grad(), self._beside_the_run(like.device):
            pictures = [self._decoded(one.to(like)) for one in normalised.split(1)]
            images = torch.cat(pictures)[:, :3].float().cpu()
        return to_uint8(images)

    def _decoded(self, latents: Tensor) -> Tensor:
        decoded = self.module.decode(latents, return_dict=False)  # type: ignore[operator]
        return cast(Tensor, decoded[0])

    def _beside_the_run(self, device: torch.device) -> AbstractContextManager[object]:
        """A stream of its own, so that the run's kernels need not wait for ours in theirs."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return torch.cuda.stream(self._stream)


def _loaded(where: str) -> nn.Module:
    from diffusers import AutoModel

    try:
        return cast(nn.Module, AutoModel.from_pretrained(where).eval())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"tiny must be the Hub id or the folder of an AutoencoderTiny, got {where!r}; {reason}"
        ) from error
