"""Owns the mathematics of the predicted x0: one formula for each family of diffusers schedulers.

A scheduler is given a sample `x = a * x0 + s * noise` and the network's output `m`. What `m` means
(`prediction_type`) and where `(a, s)` are kept is all that differs between schedulers, so a
scheduler is one row: its class name and the function that finds x0. Everything here reads; nothing
of the scheduler is changed, no random number is drawn, and no value is fetched from an accelerator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepCall:
    """One call of `scheduler.step`, kept until the callback that follows it.

    Attributes:
        scheduler: the diffusers scheduler that was stepped.
        arguments: what `step` was given, by parameter name.
        step_index: the scheduler's own index of this step; None where it keeps none.
        is_first_order: False in the second half of a second-order scheduler's step.
        output: what `step` returned, untouched.
    """

    scheduler: object
    arguments: Mapping[str, object]
    step_index: int | None
    is_first_order: bool
    output: object

    @property
    def sample(self) -> Tensor:
        """The latents before the step, in the dtype and layout that the pipeline steps."""
        return cast(Tensor, self.arguments["sample"])

    @property
    def prev_sample(self) -> Tensor | None:
        """The latents after the step; None where it returned something else."""
        first = self.output[0] if isinstance(self.output, tuple) else None
        found = getattr(self.output, "prev_sample", first)
        return found if isinstance(found, Tensor) else None

    @property
    def timestep(self) -> object:
        """What the pipeline passed as the timestep."""
        return self.arguments.get("timestep")


Weight = float | Tensor
Weights = tuple[Weight, Weight]


def plain_attribute(owner: object, name: str) -> object:
    """`owner.name`, or None where there is none, past the config that diffusers would look in.

    That search takes longer than all else that is done when a scheduler steps.
    """
    is_there = name in vars(owner) or hasattr(type(owner), name)
    return getattr(owner, name) if is_there else None


class _Config(Protocol):
    def get(self, key: str, default: object = None) -> object: ...


class _Scheduler(Protocol):
    """The parts of diffusers' schedulers that are read here; each family has some of them."""

    config: _Config
    sigmas: Tensor
    sigmas_interpol: Tensor
    timesteps: Tensor
    alphas: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    initial_alpha_cumprod: Tensor
    num_inference_steps: int

    def _sigma_to_alpha_sigma_t(self, sigma: Weight) -> Weights: ...
    def _alpha_cumprod(self, t: Tensor, device: torch.device) -> Tensor: ...
    def precondition_outputs(self, sample: float, m: float, sigma: Weight) -> Weight: ...
    def get_scalings_for_boundary_condition(self, sigma: Weight) -> Weights: ...


Formula = Callable[[StepCall], Weights]
"""call -> (weight of the sample, weight of the model output), numbers or broadcastable.

x0 is linear in both for every scheduler. The weights are plain numbers wherever the scheduler keeps
its tables on the CPU, so that x0 is one or two passes over the latents.
"""

READ_TENSORS = (
    "sample",
    "model_output",
    "timestep",
    "pred_original_sample",
    "per_token_timesteps",
    "dmd_sigmas",
    "dmd_timesteps",
)
"""The tensors among the arguments of `step` that x0 may be made of."""


def predict_x0(call: StepCall) -> Tensor | None:
    """The model's guess of the finished latents, at one step.

    Args:
        call: a recorded `scheduler.step`.

    Returns:
        float32, shape and device of the sample (whole numbers where it is token ids), in memory of
        its own; None where the scheduler has no closed form.
        Clipping and thresholding, where a scheduler has them switched on, are not applied.

    Source: the `step` and `convert_model_output` methods of diffusers 0.42.1, scheduler by
    scheduler.
    """
    if (given := call.arguments.get("pred_original_sample")) is not None:
        return cast(Tensor, given).to(torch.float32, copy=True)
    formula = _formula_for(call.scheduler)
    if formula is None:
        named = getattr(call.output, "pred_original_sample", None)
        return named.clone() if isinstance(named, Tensor) else None
    sample = call.sample.float()
    model_output = cast(Tensor, call.arguments["model_output"]).float()
    return _weighted(sample, _without_variance(model_output, sample), *formula(call))


def _weighted(x: Tensor, m: Tensor, of_x: Weight, of_m: Weight) -> Tensor:
    if isinstance(of_x, Tensor) or isinstance(of_m, Tensor):
        return of_x * x + of_m * m
    if of_x == 0:
        return m * of_m
    if of_x == 1:
        return torch.add(x, m, alpha=of_m)
    return torch.mul(x, of_x).add_(m, alpha=of_m)


def has_x0(scheduler: object) -> bool:
    """Whether `predict_x0` knows this scheduler's family; subclasses count as their parent."""
    return _formula_for(scheduler) is not None


def sigma_after(call: StepCall) -> float | None:
    """Noise level of the latents that the step returned; None where no sigmas are kept on the CPU.

    A value on an accelerator is not fetched: that would wait for it.
    """
    sigmas = plain_attribute(call.scheduler, "sigmas")
    index = call.step_index
    if not isinstance(sigmas, Tensor) or index is None or sigmas.device.type != "cpu":
        return None
    return float(sigmas[index + 1]) if index + 1 < len(sigmas) else None


def noise_scale(call: StepCall) -> float:
    """Standard deviation of the latents that the step returned, for unit-variance pictures.

    1 for every family whose latents stay near unit variance; sqrt(sigma^2 + 1) for the
    variance-exploding ones (Euler and its kin), whose noisy latents would otherwise only saturate.
    """
    if _formula_for(call.scheduler) not in _VARIANCE_EXPLODING:
        return 1.0
    if (sigma := sigma_after(call)) is None:
        return 1.0
    return float((sigma**2 + 1) ** 0.5)


def initial_noise_scale(call: StepCall) -> float:
    """`noise_scale`, of the latents before the run's first step."""
    if _formula_for(call.scheduler) not in _VARIANCE_EXPLODING or call.step_index is None:
        return 1.0
    sigmas = cast(_Scheduler, call.scheduler).sigmas
    return 1.0 if sigmas.device.type != "cpu" else float((sigmas[call.step_index] ** 2 + 1) ** 0.5)


def _formula_for(scheduler: object) -> Formula | None:
    return _formula_of(tuple(cls.__name__ for cls in type(scheduler).__mro__))


@functools.cache
def _formula_of(names: tuple[str, ...]) -> Formula | None:
    return next((_FORMULAS[name] for name in names if name in _FORMULAS), None)


def _without_variance(model_output: Tensor, sample: Tensor) -> Tensor:
    """Drop the learned variance that some denoisers append to the channels."""
    channels = sample.shape[1]
    return model_output[:, :channels] if model_output.shape[1] == 2 * channels else model_output


def _prediction_type(call: StepCall) -> object:
    return cast(_Scheduler, call.scheduler).config.get("prediction_type", "epsilon")


def _from_levels(call: StepCall, a: Weight, s: Weight) -> Weights:
    """Of x0 from `x = a * x0 + s * noise`, by what the network predicts."""
    prediction_type = _prediction_type(call)
    if prediction_type == "epsilon":
        return _inverse(a), -s * _inverse(a)
    if prediction_type == "v_prediction":
        squares = a**2 + s**2
        return a / squares, -s / squares
    if prediction_type == "flow_prediction":
        return 1.0, -s
    if prediction_type in ("sample", "original_sample"):
        return 0.0, 1.0
    raise ValueError(
        f"prediction_type must be epsilon, v_prediction, sample or flow_prediction, got "
        f"{prediction_type!r}; pass source='noisy' for this scheduler"
    )


def _inverse(a: Weight) -> Weight:
    return 1 / a if isinstance(a, Tensor) or a != 0 else math.inf


def _number(value: Tensor) -> Weight:
    """A number, unless it would have to be fetched from an accelerator."""
    return value.item() if value.device.type == "cpu" and value.numel() == 1 else value


def _sigma(call: StepCall) -> Weight:
    return _number(cast(_Scheduler, call.scheduler).sigmas[_index(call)])


def _index(call: StepCall) -> int:
    if call.step_index is None:
        raise ValueError(
            f"step_index must be kept by {type(call.scheduler).__name__}, got None; "
            "pass source='noisy' for this scheduler"
        )
    return call.step_index


def _column(values: Tensor, call: StepCall) -> Weight:
    """(B,) or (1,) -> a number, or broadcastable over the sample (B, ...)."""
    number = _number(values)
    if not isinstance(number, Tensor):
        return number
    return values.reshape(-1, *[1] * (call.sample.ndim - 1)).to(call.sample.device)


def _table(call: StepCall) -> Tensor:
    return cast(_Scheduler, call.scheduler).alphas_cumprod


def _alpha_cumprod_at(call: StepCall, timestep: Tensor) -> Tensor:
    # index_select, because indexing by a 0-d accelerator tensor would wait for its value
    return _table(call).to(timestep.device, non_blocking=True).index_select(0, timestep.long())


def _timestep_1d(call: StepCall) -> Tensor:
    return _timestep(call).reshape(-1)


def _timestep(call: StepCall) -> Tensor:
    value = call.timestep
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def _from_alpha_cumprod(call: StepCall, alpha_cumprod: Weight) -> Weights:
    return _from_levels(call, alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5)


def _discrete(call: StepCall) -> Weights:
    timestep = call.timestep if isinstance(call.timestep, int) else _number(_timestep(call))
    if not isinstance(timestep, Tensor):
        return _from_alpha_cumprod(call, _number(_table(call)[int(timestep)]))
    alpha_cumprod = _alpha_cumprod_at(call, _timestep_1d(call)).float()
    return _from_alpha_cumprod(call, _column(alpha_cumprod, call))


def _discrete_inverse(call: StepCall) -> Weights:
    scheduler = cast(_Scheduler, call.scheduler)
    train_steps = cast(int, scheduler.config.get("num_train_timesteps"))
    earlier = _timestep_1d(call) - train_steps // scheduler.num_inference_steps
    alpha_cumprod = _alpha_cumprod_at(call, earlier.clamp(0, train_steps - 1))
    start = scheduler.initial_alpha_cumprod.to(alpha_cumprod)
    alpha_cumprod = torch.where(earlier >= 0, alpha_cumprod, start).float()
    return _from_alpha_cumprod(call, _column(alpha_cumprod, call))


def _exploding_at(call: StepCall, sigma: Weight) -> Weights:
    a = (sigma**2 + 1) ** -0.5  # x * a has unit variance, which is what v is defined for
    of_x, of_m = _from_levels(call, a, sigma * a)
    return of_x * a, of_m


def _exploding(call: StepCall) -> Weights:
    return _exploding_at(call, _sigma(call))


def _k_dpm_2(call: StepCall) -> Weights:
    return _exploding_at(call, _sigma(call) if call.is_first_order else _midpoint(call, 0))


def _k_dpm_2_ancestral(call: StepCall) -> Weights:
    return _exploding_at(call, _sigma(call) if call.is_first_order else _midpoint(call, -1))


def _midpoint(call: StepCall, offset: int) -> Weight:
    return _number(cast(_Scheduler, call.scheduler).sigmas_interpol[_index(call) + offset])


def _dpm_solver_sde(call: StepCall) -> Weights:
    if call.is_first_order:
        return _exploding_at(call, _sigma(call))
    sigmas = cast(_Scheduler, call.scheduler).sigmas
    squared = _number(sigmas[_index(call) - 1] * sigmas[_index(call)])
    return _exploding_at(call, squared**0.5)


def _solver(call: StepCall) -> Weights:
    sigma = _sigma(call)
    a, s = cast(_Scheduler, call.scheduler)._sigma_to_alpha_sigma_t(sigma)
    return _from_levels(call, a, sigma if _prediction_type(call) == "flow_prediction" else s)


def _edm(call: StepCall) -> Weights:
    weighed, sigma = cast(_Scheduler, call.scheduler).precondition_outputs, _sigma(call)
    return weighed(1.0, 0.0, sigma), weighed(0.0, 1.0, sigma)


def _flow(call: StepCall) -> Weights:
    per_token = call.arguments.get("per_token_timesteps")
    if per_token is None:
        return 1.0, -_sigma(call)
    train_steps = cast(int, cast(_Scheduler, call.scheduler).config.get("num_train_timesteps"))
    # callers of the per-token form pass the negated velocity
    return 1.0, (cast(Tensor, per_token).float() / train_steps)[..., None]


def _flow_dmd(call: StepCall) -> Weights:
    sigmas, timesteps = (cast(Tensor, call.arguments[f"dmd_{x}"]) for x in ("sigmas", "timesteps"))
    timestep = _timestep_1d(call).to(timesteps.device)
    nearest = (timesteps.double() - timestep.double()[:, None]).abs().argmin(dim=1)
    return 1.0, -_column(sigmas.index_select(0, nearest).float(), call)


def _data_at_one(call: StepCall) -> Weights:
    timestep, x = _timestep(call).float(), call.sample
    left = 1 - timestep
    return 1.0, left.reshape(timestep.shape + (1,) * (x.ndim - timestep.ndim)).to(x.device)


def _trigflow(call: StepCall) -> Weights:
    angle = cast(_Scheduler, call.scheduler).timesteps[_index(call)].float()
    return _number(torch.cos(angle)), -_number(torch.sin(angle))


def _consistency(call: StepCall) -> Weights:
    return cast(_Scheduler, call.scheduler).get_scalings_for_boundary_condition(_sigma(call))


def _ipndm(call: StepCall) -> Weights:
    scheduler, index = cast(_Scheduler, call.scheduler), _index(call)
    return _number(scheduler.alphas[index]), -_number(scheduler.betas[index])


def _wuerstchen(call: StepCall) -> Weights:
    timestep = _timestep_1d(call)
    alpha_cumprod = cast(_Scheduler, call.scheduler)._alpha_cumprod(timestep, timestep.device)
    return _of_noise(_column(alpha_cumprod, call))


def _of_noise(alpha_cumprod: Weight) -> Weights:
    return alpha_cumprod**-0.5, -(((1 - alpha_cumprod) / alpha_cumprod) ** 0.5)


_FORMULAS: dict[str, Formula] = {
    "DDIMScheduler": _discrete,
    "DDIMParallelScheduler": _discrete,
    "DDPMScheduler": _discrete,
    "DDPMParallelScheduler": _discrete,
    "CogVideoXDDIMScheduler": _discrete,
    "CogVideoXDPMScheduler": _discrete,
    "LCMScheduler": _discrete,
    "TCDScheduler": _discrete,
    "PNDMScheduler": _discrete,
    "UnCLIPScheduler": _discrete,
    "RePaintScheduler": _discrete,
    "DDIMInverseScheduler": _discrete_inverse,
    "EulerDiscreteScheduler": _exploding,
    "EulerAncestralDiscreteScheduler": _exploding,
    "LMSDiscreteScheduler": _exploding,
    "HeunDiscreteScheduler": _exploding,
    "KDPM2DiscreteScheduler": _k_dpm_2,
    "KDPM2AncestralDiscreteScheduler": _k_dpm_2_ancestral,
    "DPMSolverSDEScheduler": _dpm_solver_sde,
    "DPMSolverMultistepScheduler": _solver,
    "DPMSolverMultistepInverseScheduler": _solver,
    "DPMSolverSinglestepScheduler": _solver,
    "UniPCMultistepScheduler": _solver,
    "DEISMultistepScheduler": _solver,
    "SASolverScheduler": _solver,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "CosineDPMSolverMultistepScheduler": _edm,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
    "FlowMapEulerDiscreteScheduler": _flow,
    "LTXEulerAncestralRFScheduler": _flow,
    "HeliosScheduler": _flow,
    "HeliosDMDScheduler": _flow_dmd,
    "MiniMaxH3Scheduler": _data_at_one,
    "SCMScheduler": _trigflow,
    "CMStochasticIterativeScheduler": _consistency,
    "IPNDMScheduler": _ipndm,
    "DDPMWuerstchenScheduler": _wuerstchen,
}

_VARIANCE_EXPLODING = (_exploding, _k_dpm_2, _k_dpm_2_ancestral, _dpm_solver_sde)
