"""Owns schedulers by name: short ones for the command line, and any of diffusers' classes."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from diffusers import ConfigMixin

SHORT_NAMES: Final = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++_single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
    "flow_heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def scheduler_class(name: str) -> type[ConfigMixin]:
    """The scheduler class of a name: one of `SHORT_NAMES`, or any class of diffusers.

    Capitals, dashes, underscores and the ending `Scheduler` make no difference.

    Raises:
        ValueError: there is none; the message has the closest names.
    """
    import diffusers

    classes = [c for c in dir(diffusers) if c.endswith("Scheduler") and not c.startswith("Flax")]
    known = {_plain(c): c for c in classes} | {_plain(s): c for s, c in SHORT_NAMES.items()}
    if _plain(name) in known:
        found: type[ConfigMixin] = getattr(diffusers, known[_plain(name)])
        return found
    shown = {_plain(n): n for n in (*classes, *SHORT_NAMES)}
    close = difflib.get_close_matches(_plain(name), shown, n=3)
    advice = f"did you mean {' or '.join(shown[c] for c in close)}?" if close else "pass one"
    expected = f"scheduler must be a diffusers class or one of {', '.join(SHORT_NAMES)}"
    raise ValueError(f"{expected}, got {name!r}; {advice}")


def exchanged(scheduler: ConfigMixin, name: str) -> ConfigMixin:
    """Another scheduler for the same model, with everything the two have in common.

    A model trained by flow matching gets a scheduler for flows, or a solver in its flow mode.

    Raises:
        ValueError: no such scheduler, or not for this kind of model, or one that needs a package
            or a setting that is missing.
    """
    found = scheduler_class(name)
    changes: dict[str, object] = {}
    if _is_flow(scheduler) and "use_flow_sigmas" in inspect.signature(found).parameters:
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
        changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        changes["flow_shift"] = shift
    try:
        made = found.from_config(scheduler.config, **changes)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"scheduler must be one that works here, got {name!r}; {cause}") from error
    if _is_flow(made) != _is_flow(scheduler):
        kind = "flow matching (flow_euler, unipc)" if _is_flow(scheduler) else "noise (euler, ddim)"
        expected = f"scheduler must be one for models trained on {kind}"
        raise ValueError(f"{expected}, got {name!r}; leave it out for the model's own")
    return made


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").removesuffix("scheduler")


def _is_flow(scheduler: ConfigMixin) -> bool:
    is_flow_class = type(scheduler).__name__.startswith("FlowMatch")
    return is_flow_class or bool(scheduler.config.get("use_flow_sigmas"))
