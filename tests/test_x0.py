"""The predicted x0 of every scheduler with a closed form, against a denoiser that knows it.

The denoiser is an oracle of its own: like a real network it sees only the scaled input and the
timestep, works out the noise level from the training schedule, and answers so that x0 is `X0`.
"""

import math

import diffusers
import pytest
import torch

from sd_progress.boundary import Boundary
from sd_progress.tap import SchedulerTap
from sd_progress.x0 import has_x0, initial_noise_scale, noise_scale, predict_x0, sigma_after

X0 = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 7


def has_x0_by_name(name):
    cls = getattr(diffusers, name)
    return has_x0(cls.__new__(cls))


def make(name, **config):
    return getattr(diffusers, name)(**config)


def listening(scheduler):
    tap = SchedulerTap(lambda: 0.0, Boundary("raise"))
    tap.attach([scheduler])
    return tap


def discrete(scheduler, prediction_type="epsilon"):
    """x_in = sqrt(alpha_cumprod) x0 + sqrt(1 - alpha_cumprod) eps, at the given timestep."""
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()

    def denoise(x_in, t):
        t = float(t)
        low = min(int(t), len(table) - 2)
        sigma = float(table[low] + (t - low) * (table[low + 1] - table[low]))
        a, s = 1 / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
        eps = (x_in - a * X0) / s
        return {"epsilon": eps, "v_prediction": a * eps - s * X0, "sample": X0}[prediction_type]

    return denoise


def flow(scheduler):
    return lambda x_in, t: (x_in - X0) / (float(t) / scheduler.config.num_train_timesteps)


def edm(scheduler, sigma_of=lambda t: math.exp(4 * t)):
    data = scheduler.config.sigma_data

    def denoise(x_in, t):
        sigma = sigma_of(float(t))
        norm = math.sqrt(sigma**2 + data**2)
        c_skip, c_out = data**2 / norm**2, sigma * data / norm
        if scheduler.config.prediction_type == "v_prediction":
            c_out = -c_out
        return (X0 - c_skip * x_in * norm) / c_out

    return denoise


def consistency(scheduler):
    data, least = scheduler.config.sigma_data, scheduler.config.sigma_min

    def denoise(x_in, t):
        sigma = math.exp(float(t) / 250)
        norm = math.sqrt(sigma**2 + data**2)
        c_skip = data**2 / ((sigma - least) ** 2 + data**2)
        return (X0 - c_skip * x_in * norm) / ((sigma - least) * data / norm)

    return denoise


def trigonometric(scheduler, *, unit=1.0):
    def denoise(x_in, t):
        angle = float(t) * unit
        return (math.cos(angle) * x_in - X0) / math.sin(angle)

    return denoise


def wuerstchen(scheduler):
    def denoise(x_in, t):
        a2 = math.cos((float(t) + 0.008) / 1.008 * math.pi / 2) ** 2
        a2 /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        a2 = min(max(a2, 0.0001), 0.9999)
        return (x_in - math.sqrt(a2) * X0) / math.sqrt(1 - a2)

    return denoise


def largest_error(scheduler, denoise, timesteps=None, **step_arguments):
    """Run the scheduler on the oracle, listening; the largest error of x0 over all steps."""
    if timesteps is None:
        scheduler.set_timesteps(STEPS)
        timesteps = scheduler.timesteps
    tap = listening(scheduler)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(X0.shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    errors = []
    for t in timesteps:
        m = denoise(scale(x, t), t.reshape(-1)[0])
        x = scheduler.step(m, t, x, **step_arguments).prev_sample
        call, _ = tap.take()
        errors.append((predict_x0(call) - X0).abs().max().item())
    assert len(errors) >= STEPS - 1
    return max(errors)


EXACT = 1e-4
ROUNDED = 2e-2  # a network evaluated at a rounded timestep; see the facts on these solvers

DISCRETE = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMParallelScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMParallelScheduler", {"clip_sample": False}),
    ("CogVideoXDDIMScheduler", {"clip_sample": False}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"predict_x0": False}),
    ("DEISMultistepScheduler", {}),
    ("SASolverScheduler", {}),
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "config"), DISCRETE)
def test_discrete_schedulers(name, config, prediction_type):
    """Schedulers on a training schedule give x0 for both kinds of prediction."""
    if prediction_type == "v_prediction" and name == "PNDMScheduler" and not config:
        config = {"skip_prk_steps": False}
    scheduler = make(name, prediction_type=prediction_type, **BETAS, **config)
    assert largest_error(scheduler, discrete(scheduler, prediction_type)) < EXACT


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_sample_prediction(name):
    """A network that predicts x0 itself is taken at its word."""
    scheduler = make(name, prediction_type="sample", **BETAS)
    assert largest_error(scheduler, discrete(scheduler, "sample")) == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"]
)
def test_second_half_steps(name, prediction_type):
    """Second half steps at a sigma between two steps' are recognised as such."""
    scheduler = make(name, prediction_type=prediction_type, **BETAS)
    assert largest_error(scheduler, discrete(scheduler, prediction_type)) < EXACT


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_rounded_timesteps(name, config):
    """Where the network is evaluated at a rounded timestep, x0 is as exact as that."""
    scheduler = make(name, **BETAS, **config)
    assert largest_error(scheduler, discrete(scheduler)) < ROUNDED


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchLCMScheduler", {}),
        ("FlowMapEulerDiscreteScheduler", {}),
        ("LTXEulerAncestralRFScheduler", {}),
        ("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}),
        ("HeliosScheduler", {"stages": 1, "scheduler_type": "unipc"}),
    ],
)
def test_flow_schedulers(name, config):
    """Rectified flows give x0 at every step."""
    scheduler = make(name, **config)
    assert largest_error(scheduler, flow(scheduler)) < EXACT


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "SASolverScheduler"]
)
def test_solvers_on_flows(name):
    """Solvers that were told to follow a flow give its x0."""
    scheduler = make(name, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    assert largest_error(scheduler, flow(scheduler)) < ROUNDED


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm(name, prediction_type):
    """EDM schedulers give x0 through their preconditioning."""
    scheduler = make(name, prediction_type=prediction_type)
    assert largest_error(scheduler, edm(scheduler)) < EXACT


def test_cosine_edm():
    """The cosine solver conditions on an angle, and gives x0 too."""
    scheduler = make("CosineDPMSolverMultistepScheduler", sigma_min=0.3, sigma_max=50)
    denoise = edm(scheduler, sigma_of=lambda t: math.tan(t * math.pi / 2))
    assert largest_error(scheduler, denoise) < EXACT


def test_consistency_model():
    """A consistency model's x0 is its boundary-conditioned output."""
    scheduler = make("CMStochasticIterativeScheduler", clip_denoised=False)
    scheduler.set_timesteps(STEPS)
    assert largest_error(scheduler, consistency(scheduler)) < EXACT


def test_trigflow():
    """SCM's angle is the timestep itself."""
    scheduler = make("SCMScheduler")
    scheduler.set_timesteps(STEPS, intermediate_timesteps=None)
    denoise = trigonometric(scheduler)
    assert largest_error(scheduler, denoise, scheduler.timesteps[:-1]) < EXACT


def test_ipndm():
    """iPNDM's tables are sines and cosines of a quarter turn."""
    scheduler = make("IPNDMScheduler")
    denoise = trigonometric(scheduler, unit=math.pi / 2)
    assert largest_error(scheduler, denoise) < EXACT


def test_wuerstchen():
    """The continuous cosine schedule is read at the timestep passed."""
    scheduler = make("DDPMWuerstchenScheduler")
    scheduler.set_timesteps(STEPS)
    timesteps = [t.reshape(1).expand(len(X0)) for t in scheduler.timesteps[:-1]]
    assert largest_error(scheduler, wuerstchen(scheduler), timesteps) < EXACT


def test_minimax():
    """MiniMax-H3 walks towards the data, which is at t = 1."""
    scheduler = make("MiniMaxH3Scheduler")
    assert largest_error(scheduler, lambda x, t: (X0 - x) / (1 - float(t))) < EXACT


def test_unclip():
    """unCLIP's scheduler takes the discrete formula."""
    scheduler = make("UnCLIPScheduler", clip_sample=False, variance_type="fixed_small_log")
    table = scheduler.alphas_cumprod

    def denoise(x_in, t):
        a2 = table[int(t)]
        return (x_in - a2.sqrt() * X0) / (1 - a2).sqrt()

    scheduler.set_timesteps(STEPS)  # at the first, alpha_cumprod is 2e-9: x0 drowns in rounding
    assert largest_error(scheduler, denoise, scheduler.timesteps[1:]) < EXACT


def test_cogvideox_dpm():
    """CogVideoX's solver, which is called by position, takes the discrete formula."""
    scheduler = make("CogVideoXDPMScheduler", clip_sample=False, **BETAS)
    scheduler.set_timesteps(STEPS)
    tap, denoise, old = listening(scheduler), discrete(scheduler), None
    x = torch.randn(X0.shape, generator=torch.Generator().manual_seed(1))
    for t, back in zip(scheduler.timesteps, [None, *scheduler.timesteps[:-1]], strict=True):
        x, old = scheduler.step(denoise(x, t), old, t, back, x)[:2]
        assert torch.allclose(predict_x0(tap.take()[0]), X0, atol=EXACT)


def test_repaint():
    """RePaint's scheduler, which is told what not to paint, takes the discrete formula."""
    scheduler = make("RePaintScheduler", clip_sample=False)
    scheduler.set_timesteps(STEPS, jump_length=1, jump_n_sample=1)
    tap, denoise = listening(scheduler), discrete(scheduler)
    x = torch.randn(X0.shape, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        step = scheduler.step(denoise(x, t), t, x, torch.zeros_like(x), torch.ones_like(x))
        x = step.prev_sample
        assert torch.allclose(predict_x0(tap.take()[0]), X0, atol=EXACT)


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_inverse_schedulers(name):
    """Schedulers that go back to noise give the x0 that they themselves compute."""
    scheduler = make(name, **BETAS, **({"clip_sample": False} if "DDIM" in name else {}))
    scheduler.set_timesteps(STEPS)
    tap, x = listening(scheduler), X0
    for t in scheduler.timesteps:
        step = scheduler.step(0.1 * x, t, x)
        theirs = getattr(step, "pred_original_sample", None)
        theirs = scheduler.model_outputs[-1] if theirs is None else theirs
        assert torch.allclose(predict_x0(tap.take()[0]), theirs, atol=EXACT)
        x = step.prev_sample


def test_helios_dmd():
    """The distilled Helios scheduler finds its sigma in the tables that it is handed."""
    scheduler = make("HeliosDMDScheduler", stages=1)
    scheduler.set_timesteps(STEPS)
    tap, denoise = listening(scheduler), flow(scheduler)
    x = torch.randn(*X0.shape, 1, generator=torch.Generator().manual_seed(1))
    tables = {"dmd_sigmas": scheduler.sigmas, "dmd_timesteps": scheduler.timesteps}
    for i, t in enumerate(scheduler.timesteps.long().float()):
        tables["dmd_timesteps"][i] = t
        m = denoise(x[..., 0], 1000 * scheduler.sigmas[i])[..., None]
        x = scheduler.step(
            m, t, x, cur_sampling_step=i, dmd_noisy_tensor=torch.ones_like(x),
            all_timesteps=scheduler.timesteps, **tables,
        ).prev_sample  # fmt: skip
        assert torch.allclose(predict_x0(tap.take()[0])[..., 0], X0, atol=EXACT)


def test_a_given_x0_is_taken():
    """Where a pipeline hands its own x0 to the scheduler, that is the x0."""
    scheduler = make("EDMEulerScheduler")
    scheduler.set_timesteps(STEPS)
    tap, x = listening(scheduler), 80 * torch.ones_like(X0)
    scheduler.step(x, scheduler.timesteps[0], x, pred_original_sample=X0)
    assert torch.equal(predict_x0(tap.take()[0]), X0)


def test_learned_variance_is_dropped():
    """A network that appends a variance to its channels does not disturb x0."""
    scheduler = make("DDPMScheduler", variance_type="learned_range", clip_sample=False, **BETAS)
    plain = discrete(scheduler)

    def denoise(x_in, t):
        return torch.cat([plain(x_in, t), torch.zeros_like(x_in)], dim=1)

    assert largest_error(scheduler, denoise) < EXACT


def test_per_token_flow():
    """With per-token timesteps the callers pass the negated velocity."""
    scheduler = make("FlowMatchEulerDiscreteScheduler")
    scheduler.set_timesteps(STEPS)
    tap = listening(scheduler)
    x0, x = torch.randn(2, 1, 6, 4)
    tokens = torch.full((1, 6), float(scheduler.timesteps[0]))
    velocity = (x - x0) / (tokens / 1000)[..., None]
    scheduler.step(-velocity, scheduler.timesteps[0], x, per_token_timesteps=tokens)
    assert torch.allclose(predict_x0(tap.take()[0]), x0, atol=1e-5)


def test_subclasses_count_as_their_parent():
    """A scheduler of one's own that derives from a known one is understood."""

    class Mine(diffusers.DDIMScheduler):
        """With some other behaviour."""

    scheduler = Mine(**BETAS, clip_sample=False)
    assert largest_error(scheduler, discrete(scheduler)) < EXACT


def test_what_a_scheduler_names_itself_is_taken():
    """One without a formula here may say what its x0 is."""
    scheduler = make("KarrasVeScheduler")
    scheduler.set_timesteps(STEPS)
    tap = listening(scheduler)
    theirs = scheduler.step(X0, 2.0, 1.0, X0).pred_original_sample
    assert torch.equal(predict_x0(tap.take()[0]), theirs)


def test_no_scheduler_of_diffusers_is_forgotten():
    """Each has its x0, or is one of those that have none in closed form."""
    without = {
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "KarrasVeScheduler",  # names its own
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
        "ScoreSdeVeScheduler",
        "VQDiffusionScheduler",
    }
    exported = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    known = {name for name in exported if has_x0_by_name(name)}
    assert exported - known <= without
    assert len(known) >= 38


def test_unknown_schedulers_have_no_x0():
    """Where there is no closed form, None is the answer."""
    assert not has_x0(make("VQDiffusionScheduler", num_vec_classes=4))
    assert has_x0(make("DDIMScheduler"))


def test_noise_levels_of_exploding_schedulers():
    """Euler's sigma after a step, and the scale of its noise, are those of its table."""
    scheduler = make("EulerDiscreteScheduler", **BETAS)
    scheduler.set_timesteps(STEPS)
    tap = listening(scheduler)
    t = scheduler.timesteps[0]
    scheduler.step(torch.zeros_like(X0), t, scheduler.scale_model_input(X0, t))
    call, is_first = tap.take()
    sigmas = scheduler.sigmas.tolist()
    assert is_first
    assert sigma_after(call) == pytest.approx(sigmas[1])
    assert noise_scale(call) == pytest.approx(math.sqrt(sigmas[1] ** 2 + 1))
    assert initial_noise_scale(call) == pytest.approx(math.sqrt(sigmas[0] ** 2 + 1))
