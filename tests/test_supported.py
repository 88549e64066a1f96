"""What is told of each pipeline: against diffusers' own source, and against what happens."""

import ast
import importlib.util
import re
import textwrap
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import zoo

from sd_progress import PreviewCallback, supported
from sd_progress.boundary import PreviewWarning
from sd_progress.cli import main

CASES = [name for name in zoo.load_families() if ":" not in name]
KNOWN = {entry.name: entry for entry in supported.pipelines()}
CURRENT = [one for one in KNOWN.values() if not one.is_deprecated and not one.is_modular]
PAGE = Path(__file__).parent.parent / "docs" / "supported.md"


@pytest.fixture(scope="module")
def sources():
    """The folder of diffusers' source, in the version that the lists are of."""
    installed = metadata.version("diffusers")
    if installed != supported.DIFFUSERS_VERSION:
        pytest.skip(f"lists are of diffusers {supported.DIFFUSERS_VERSION}, here is {installed}")
    return Path(importlib.util.find_spec("diffusers").origin).parent


@pytest.fixture(scope="module")
def classes(sources):
    """All classes in diffusers' pipelines, by name: the file, and the syntax tree."""
    return {
        node.name: (path, node)
        for path in (sources / "pipelines").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


@pytest.fixture(scope="module")
def theirs(classes):
    """Names of the classes that derive from DiffusionPipeline."""
    return {name for name in classes if "DiffusionPipeline" in ancestors(name, classes)}


def ancestors(name, classes):
    """Names of the classes that a class derives from, in the order of a method's look-up."""
    _, node = classes.get(name, (None, None))
    bases = [ast.unparse(base) for base in node.bases] if node else []
    return [*bases, *(higher for base in bases for higher in ancestors(base, classes))]


def parameters(name, classes):
    """Names of what a pipeline's `__call__` takes, its own or an inherited one."""
    for cls in [name, *ancestors(name, classes)]:
        for node in classes[cls][1].body if cls in classes else ():
            if isinstance(node, ast.FunctionDef) and node.name == "__call__":
                return {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)}
    return set()


def test_every_pipeline_of_diffusers_is_known(theirs):
    """None is missing, and none is made up."""
    assert {name for name, entry in KNOWN.items() if not entry.is_modular} == theirs


def test_no_pipeline_is_listed_twice():
    """Each has one layout, or one reason to have none."""
    assert len(KNOWN) == len(supported.pipelines())


def test_modular_pipelines_are_there(sources):
    """Each is a class of diffusers' modular pipelines."""
    files = (sources / "modular_pipelines").rglob("*.py")
    theirs = re.findall(r"^class (\w+)", "\n".join(map(Path.read_text, files)), re.M)
    assert {name for name, entry in KNOWN.items() if entry.is_modular} <= set(theirs)


def test_deprecated_pipelines_are_those_that_diffusers_has_put_away(classes, theirs):
    """They are in a folder of their own."""
    put_away = {name for name in theirs if "deprecated" in classes[name][0].parts}
    assert {name for name, entry in KNOWN.items() if entry.is_deprecated} == put_away


def test_callbacks_are_attached_by_what_pipelines_take(classes, theirs):
    """The new callback where there is one, though 30 take the old one, too, through `**kwargs`."""
    kinds = {"callback_on_step_end": "callback", "callback": "legacy callback"}
    for name in theirs:
        taken = parameters(name, classes)
        expected = next((kinds[one] for one in kinds if one in taken), "with block only")
        assert (name, KNOWN[name].attached) == (name, expected)


def test_nine_in_ten_are_shown():
    """At least 230 of the 255 current pipelines of diffusers 0.42.1."""
    shown = [entry for entry in CURRENT if entry.shows]
    assert len(CURRENT) == 255
    assert len(shown) >= 230


def test_the_summary_counts():
    """Shown, all, by kind, not shown; then the deprecated and the modular ones."""
    shows = [entry.shows for entry in CURRENT]
    kinds = [shows.count(kind) for kind in ("image", "video", "audio")]
    deprecated = [entry.shows for entry in KNOWN.values() if entry.is_deprecated]
    modular = sum(entry.is_modular for entry in KNOWN.values())
    rest = (sum(map(bool, deprecated)), len(deprecated), modular)
    expected = [sum(kinds), len(shows), *kinds, len(shows) - sum(kinds), *rest]
    counts = re.findall(r"\d+", supported.summary().partition(":")[2])
    assert [int(count) for count in counts] == expected


def test_what_is_not_shown_has_a_reason():
    """And nothing else; what is shown has a layout and a source."""
    for entry in KNOWN.values():
        is_shown = entry.shows is not None
        assert is_shown == bool(entry.layout) == bool(entry.source) == (not entry.reason)


@pytest.fixture
def _strangers_may_warn():
    """Tiny random pipelines have unknown VAEs, and something to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PreviewWarning)
        warnings.filterwarnings("ignore", "vae must be one whose latents", PreviewWarning)
        yield


def attached(case, entry):
    """The frames of a run, with the preview attached as told."""
    frames = []
    preview = PreviewCallback(case.pipe, frames.append, on_error="raise")
    if entry.attached == "with block only":
        with preview:
            zoo.run(case)
    else:
        name = "callback_on_step_end" if entry.attached == "callback" else "callback"
        zoo.run(case, **{name: preview})
    return frames


@pytest.mark.usefixtures("_strangers_may_warn")
@pytest.mark.parametrize("name", [name for name in CASES if KNOWN[name].shows])
def test_what_is_told_is_what_is_seen(name):
    """Attached as told, a pipeline shows frames of that source, that layout, and that kind."""
    entry = KNOWN[name]
    frames = attached(zoo.build(name), entry)
    assert {frame.source for frame in frames} == {entry.source}
    assert entry.layout in ("combined", *{frame.layout for frame in frames})
    is_clip = frames[-1].is_video and frames[-1].images.shape[1] > 1
    assert is_clip == (entry.shows == "video" and "side by side" not in entry.limits)


@pytest.mark.usefixtures("_strangers_may_warn")
@pytest.mark.parametrize("name", ["FluxPipeline", "IFPipeline", "DDPMPipeline"])
def test_examples_work(name, tmp_path, monkeypatch):
    """What `details` says can be copied: one example for each way to attach."""
    monkeypatch.chdir(tmp_path)
    case = zoo.build(name)
    heading, code = supported.details(name).split("`:\n\n")[1].split("\n", maxsplit=1)
    assert heading == f"{KNOWN[name].attached}:"
    code = textwrap.dedent(code).replace("...", "**call")
    exec(code, {"PreviewCallback": PreviewCallback, "pipe": case.pipe, "call": case.call})
    assert (tmp_path / "denoise.gif").exists()
    assert any((tmp_path / "steps").iterdir())


def test_details_of_one():
    """The whole name means that one only, in any case."""
    told = supported.details("stablediffusionpipeline")
    assert told.startswith("StableDiffusionPipeline\n  shows   image, denoised")
    assert "Onnx" not in told


def test_details_of_several():
    """A part of a name means all that have it; those that are alike are told together."""
    told = supported.details("LTX2")
    names = [name for name in KNOWN if "LTX2" in name]
    assert len(names) > 8
    assert all(name in told for name in names)
    assert told.count("PreviewCallback(") == 2  # for two ways to attach
    assert len(re.findall("^  shows", told, re.M)) < len(names)


def test_details_of_what_is_not_shown():
    """The reason, and nothing to copy."""
    told = supported.details("shapeimg2img")
    assert "nothing: its latents are a 3-D scene that must be rendered" in told
    assert "PreviewCallback" not in told


def test_details_of_what_is_noisy():
    """That is said."""
    assert "image, noisy: what the pipeline works on" in supported.details("VQDiffusionPipeline")


def test_details_of_what_is_unknown():
    """Inferred; what that means, what was probably meant, and the line that mends it."""
    told = supported.details("FluxPipelin2")
    assert "Did you mean FluxPipeline?" in told
    assert 'layout="inferred"' in told
    assert 'layouts.register("FluxPipelin2", "FluxPipeline")' in told


def test_what_is_no_name_is_no_code():
    """A model id can be asked for; the code to copy is still Python."""
    told = supported.details("someone/model-1.0")
    assert 'layouts.register("MyPipeline", "FluxPipeline")' in told


def test_the_table_has_every_name_once():
    """Under its group, in 100 columns, without spaces at the ends of lines."""
    table = supported.table(supported.pipelines())
    names = re.findall(r"^ {4}(.*)", table, re.M)
    assert sorted(" ".join(names).split()) == sorted(KNOWN)
    assert max(map(len, table.splitlines())) <= 100
    assert not re.search(r" $", table, re.M)


def test_the_table_is_grouped_by_what_is_shown():
    """Headings with counts, in order; empty groups are left out."""
    entries = [
        KNOWN[name] for name in ("LTXPipeline", "LTX2Pipeline", "ShapEPipeline", "IFPipeline")
    ]
    assert supported.table(entries).split("\n") == [
        "Images (1)",
        "  legacy callback",
        "    IFPipeline",
        "",
        "Videos (2)",
        "  callback",
        "    LTXPipeline",
        "  callback (not the sound)",
        "    LTX2Pipeline",
        "",
        "Not shown (1)",
        "  its latents are a 3-D scene that must be rendered",
        "    ShapEPipeline",
    ]


def test_the_page_is_up_to_date(capsys):
    """If not: `sd-progress models --markdown > docs/supported.md`."""
    main(["models", "--markdown"])
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out
    assert "`sd-progress models --markdown > docs/supported.md`" in supported.markdown()


def test_the_page_has_every_name_once():
    """As the first cell of a row, with as many cells as its table has columns."""
    rows = [line.split(" | ") for line in supported.markdown().splitlines() if line[:2] == "| "]
    names = [row[0].removeprefix("| ") for row in rows]
    assert sorted(set(names) - {"pipeline", "---"}) == sorted(KNOWN)
    assert {len(row) for row in rows} == {2, 4}  # of what is not shown there is only the reason
