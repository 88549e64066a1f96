"""What the package promises by name."""

import inspect
import subprocess
import sys
from importlib import resources

import pytest

import sd_progress


def test_all_is_sorted_and_exact():
    """`__all__` is every public name there is, in order."""
    public = {name for name in dir(sd_progress) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(sd_progress, name))}
    assert sd_progress.__all__ == sorted(sd_progress.__all__)
    assert set(sd_progress.__all__) == public - modules


@pytest.mark.parametrize("name", sd_progress.__all__)
def test_every_public_name_is_explained(name):
    """Each has a docstring of its own, and so has each of its public methods."""
    thing = getattr(sd_progress, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert thing.__doc__
        methods = vars(thing).items() if inspect.isclass(thing) else ()
        public = [m for n, m in methods if inspect.isfunction(m) and not n.startswith("_")]
        assert all(method.__doc__ for method in public)


def test_import_is_light(tmp_path):
    """Neither diffusers nor transformers nor an extra is loaded before it is needed."""
    heavy = "{'diffusers', 'transformers', 'imageio', 'accelerate', 'rich', 'IPython'}"
    code = f"import sys, sd_progress; print({heavy} & set(sys.modules))"
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    "name", ["py.typed", "data/published_factors.json", "demo_model/model_index.json"]
)
def test_data_is_installed(name):
    """What is no Python code comes along in the wheel."""
    assert resources.files("sd_progress").joinpath(name).is_file()
