"""Schedulers by name."""

import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from sd_progress.schedulers import SHORT_NAMES, exchanged, scheduler_class


@pytest.mark.parametrize(
    "name", ["euler_a", "Euler-A", "EulerAncestralDiscrete", "EulerAncestralDiscreteScheduler"]
)
def test_spellings(name):
    """Short names and class names, in any capitals, with or without the ending."""
    assert scheduler_class(name) is EulerAncestralDiscreteScheduler


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_every_short_name_is_a_class_of_diffusers(name):
    """The table names classes that are there."""
    assert scheduler_class(name).__name__ == SHORT_NAMES[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eulr", r"got 'eulr'; did you mean euler or euler_a or EDMEulerScheduler\?"),
        ("!", r"one of ddim, .*, unipc, got '!'; pass one"),
    ],
)
def test_unknown_names_are_told_with_the_closest(name, message):
    """A typing mistake gets suggestions."""
    with pytest.raises(ValueError, match=message):
        scheduler_class(name)


def test_the_models_settings_are_kept():
    """What the model was trained with goes over to the new scheduler."""
    old = DPMSolverMultistepScheduler(beta_start=0.002, prediction_type="v_prediction")
    new = exchanged(old, "euler")
    assert type(new) is EulerDiscreteScheduler
    assert (new.config.beta_start, new.config.prediction_type) == (0.002, "v_prediction")


def test_a_solver_is_put_into_its_flow_mode():
    """A flow-matching model gets a solver that integrates flows, with the model's shift."""
    new = exchanged(FlowMatchEulerDiscreteScheduler(shift=3.0), "unipc")
    assert type(new) is UniPCMultistepScheduler
    config = new.config
    assert (config.use_flow_sigmas, config.prediction_type) == (True, "flow_prediction")
    assert config.flow_shift == 3.0


@pytest.mark.parametrize(
    ("old", "name", "message"),
    [
        (FlowMatchEulerDiscreteScheduler, "ddim", "trained on flow matching .*, got 'ddim'"),
        (DPMSolverMultistepScheduler, "flow_euler", "trained on noise .*, got 'flow_euler'"),
        (DPMSolverMultistepScheduler, "AmusedScheduler", "got 'AmusedScheduler'; .*mask_token_id"),
    ],
)
def test_what_cannot_work_is_told(old, name, message):
    """Noise schedulers for flow models, and the other way round, would only paint noise."""
    with pytest.raises(ValueError, match=message):
        exchanged(old(), name)
