"""Owns the mathematics of the predicted x0: one formula for each family of diffusers schedulers.

A scheduler is given a sample `x = a * x0 + s * noise` and the network's output `m`. What `m` means
(`prediction_type`) and where `(a, s)` are kept is all that differs between schedulers, so a
scheduler is one row: its class name and the function that finds x0. Everything here reads; nothing
of the scheduler is changed, no random number is drawn, and no value is fetched from an accelerator.
"""

from __future__ import annotations

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

    def _sigma_to_alpha_sigma_t(self, sigma: Tensor) -> tuple[Tensor, Tensor]: ...
    def _alpha_cumprod(self, t: Tensor, device: torch.device) -> Tensor: ...
    def precondition_outputs(self, sample: Tensor, m: Tensor, sigma: Tensor) -> Tensor: ...
    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> tuple[Tensor, Tensor]: ...
    def convert_flow_pred_to_x0(
        self, flow_pred: Tensor, xt: Tensor, timestep: Tensor, sigmas: Tensor, timesteps: Tensor
    ) -> Tensor: ...


Formula = Callable[[StepCall, Tensor, Tensor], Tensor]
"""(call, sample x, model output m), both float32 -> x0 float32, of the sample's shape."""


def predict_x0(call: StepCall) -> Tensor | None:
    """The model's guess of the finished latents, at one step.

    Args:
        call: a recorded `scheduler.step`.

    Returns:
        float32, shape and device of the sample (whole numbers where it is token ids); None where
        the scheduler has no closed form.
        Clipping and thresholding, where a scheduler has them switched on, are not applied.

    Source: the `step` and `convert_model_output` methods of diffusers 0.42.1, scheduler by
    scheduler.
    """
    if (given := call.arguments.get("pred_original_sample")) is not None:
        return cast(Tensor, given).float()
    formula = _formula_for(call.scheduler)
    if formula is None:
        named = getattr(call.output, "pred_original_sample", None)
        return named if isinstance(named, Tensor) else None
    sample = call.sample.float()
    model_output = cast(Tensor, call.arguments["model_output"]).float()
    return formula(call, sample, _without_variance(model_output, sample))


def has_x0(scheduler: object) -> bool:
    """Whether `predict_x0` knows this scheduler's family; subclasses count as their parent."""
    return _formula_for(scheduler) is not None


def sigma_after(call: StepCall) -> float | None:
    """Noise level of the latents that the step returned; None where no sigmas are kept on the CPU.

    A value on an accelerator is not fetched: that would wait for it.
    """
    sigmas = getattr(call.scheduler, "sigmas", None)
    index = call.step_index
    if not isinstance(sigmas, Tensor) or index is None or sigmas.device.type != "cpu":
        return None
    return float(sigmas[index + 1]) if index + 1 < len(sigmas) else None


def noise_scale(call: StepCall) -> float:
    """Standard deviation of the latents that the step returned, for unit-variance pictures.

    1 for every family whose latents stay near unit variance; sqrt(sigma^2 + 1) for the
    variance-exploding ones (Euler and its kin), whose noisy latents would otherwise only saturate.
    """
    sigma = sigma_after(call)
    if sigma is None or _formula_for(call.scheduler) not in _VARIANCE_EXPLODING:
        return 1.0
    return float((sigma**2 + 1) ** 0.5)


def initial_noise_scale(call: StepCall) -> float:
    """`noise_scale`, of the latents before the run's first step."""
    if _formula_for(call.scheduler) not in _VARIANCE_EXPLODING or call.step_index is None:
        return 1.0
    sigmas = cast(_Scheduler, call.scheduler).sigmas
    return 1.0 if sigmas.device.type != "cpu" else float((sigmas[call.step_index] ** 2 + 1) ** 0.5)


def _formula_for(scheduler: object) -> Formula | None:
    names = (cls.__name__ for cls in type(scheduler).__mro__)
    return next((_FORMULAS[name] for name in names if name in _FORMULAS), None)


def _without_variance(model_output: Tensor, sample: Tensor) -> Tensor:
    """Drop the learned variance that some denoisers append to the channels."""
    channels = sample.shape[1]
    return model_output[:, :channels] if model_output.shape[1] == 2 * channels else model_output


def _prediction_type(call: StepCall) -> object:
    return cast(_Scheduler, call.scheduler).config.get("prediction_type", "epsilon")


def _from_levels(call: StepCall, x: Tensor, m: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """x0 from `x = a * x0 + s * noise`, by what the network predicts."""
    prediction_type = _prediction_type(call)
    if prediction_type == "epsilon":
        return (x - s * m) / a
    if prediction_type == "v_prediction":
        return (a * x - s * m) / (a**2 + s**2)
    if prediction_type == "flow_prediction":
        return x - s * m
    if prediction_type in ("sample", "original_sample"):
        return m
    raise ValueError(
        f"prediction_type must be epsilon, v_prediction, sample or flow_prediction, got "
        f"{prediction_type!r}; pass source='noisy' for this scheduler"
    )


def _sigma(call: StepCall) -> Tensor:
    return cast(_Scheduler, call.scheduler).sigmas[_index(call)]


def _index(call: StepCall) -> int:
    if call.step_index is None:
        raise ValueError(
            f"step_index must be kept by {type(call.scheduler).__name__}, got None; "
            "pass source='noisy' for this scheduler"
        )
    return call.step_index


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or (1,) -> broadcastable over `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _alpha_cumprod_at(call: StepCall, timestep: Tensor) -> Tensor:
    table = cast(_Scheduler, call.scheduler).alphas_cumprod
    # index_select, because indexing by a 0-d accelerator tensor would wait for its value
    return table.to(timestep.device, non_blocking=True).index_select(0, timestep.long())


def _timestep_1d(call: StepCall) -> Tensor:
    return _timestep(call).reshape(-1)


def _timestep(call: StepCall) -> Tensor:
    value = call.timestep
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def _discrete(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    alpha_cumprod = _column(_alpha_cumprod_at(call, _timestep_1d(call)), x).float()
    return _from_levels(call, x, m, alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt())


def _discrete_inverse(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    scheduler = cast(_Scheduler, call.scheduler)
    train_steps = cast(int, scheduler.config.get("num_train_timesteps"))
    earlier = _timestep_1d(call) - train_steps // scheduler.num_inference_steps
    alpha_cumprod = _alpha_cumprod_at(call, earlier.clamp(0, train_steps - 1))
    start = scheduler.initial_alpha_cumprod.to(alpha_cumprod)
    alpha_cumprod = _column(torch.where(earlier >= 0, alpha_cumprod, start), x).float()
    return _from_levels(call, x, m, alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt())


def _exploding_at(call: StepCall, x: Tensor, m: Tensor, sigma: Tensor) -> Tensor:
    a = 1 / (sigma**2 + 1).sqrt()  # x * a has unit variance, which is what v is defined for
    return _from_levels(call, x * a, m, a, sigma * a)


def _exploding(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    return _exploding_at(call, x, m, _sigma(call))


def _k_dpm_2(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    sigmas = cast(_Scheduler, call.scheduler).sigmas_interpol
    midpoint = sigmas[_index(call)]
    return _exploding_at(call, x, m, _sigma(call) if call.is_first_order else midpoint)


def _k_dpm_2_ancestral(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    sigmas = cast(_Scheduler, call.scheduler).sigmas_interpol
    midpoint = sigmas[_index(call) - 1]
    return _exploding_at(call, x, m, _sigma(call) if call.is_first_order else midpoint)


def _dpm_solver_sde(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    sigmas = cast(_Scheduler, call.scheduler).sigmas
    midpoint = (sigmas[_index(call) - 1] * sigmas[_index(call)]).sqrt()
    return _exploding_at(call, x, m, _sigma(call) if call.is_first_order else midpoint)


def _solver(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    sigma = _sigma(call)
    a, s = cast(_Scheduler, call.scheduler)._sigma_to_alpha_sigma_t(sigma)
    if _prediction_type(call) == "flow_prediction":
        s = sigma
    return _from_levels(call, x, m, a, s)


def _edm(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    return cast(_Scheduler, call.scheduler).precondition_outputs(x, m, _sigma(call))


def _flow(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    per_token = call.arguments.get("per_token_timesteps")
    if per_token is None:
        return x - _sigma(call) * m
    train_steps = cast(int, cast(_Scheduler, call.scheduler).config.get("num_train_timesteps"))
    # callers of the per-token form pass the negated velocity
    return x + (cast(Tensor, per_token).float() / train_steps)[..., None] * m


def _flow_dmd(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    timestep = _timestep_1d(call).to(x.device).long().expand(len(x))
    sigmas = cast(Tensor, call.arguments["dmd_sigmas"])
    timesteps = cast(Tensor, call.arguments["dmd_timesteps"])
    scheduler = cast(_Scheduler, call.scheduler)
    return scheduler.convert_flow_pred_to_x0(m, x, timestep, sigmas, timesteps)


def _data_at_one(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    timestep = _timestep(call).float()
    return x + (1 - timestep.reshape(timestep.shape + (1,) * (x.ndim - timestep.ndim))) * m


def _trigflow(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    angle = cast(_Scheduler, call.scheduler).timesteps[_index(call)].float()
    return torch.cos(angle) * x - torch.sin(angle) * m


def _consistency(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    scheduler = cast(_Scheduler, call.scheduler)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(_sigma(call))
    return c_out * m + c_skip * x


def _ipndm(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    scheduler = cast(_Scheduler, call.scheduler)
    index = _index(call)
    return scheduler.alphas[index] * x - scheduler.betas[index] * m


def _wuerstchen(call: StepCall, x: Tensor, m: Tensor) -> Tensor:
    scheduler = cast(_Scheduler, call.scheduler)
    alpha_cumprod = _column(scheduler._alpha_cumprod(_timestep_1d(call).to(x.device), x.device), x)
    return (x - (1 - alpha_cumprod).sqrt() * m) / alpha_cumprod.sqrt()


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
