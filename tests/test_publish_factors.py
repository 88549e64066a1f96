"""The tool that makes the package's own rows, on models saved to disk."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from sd_progress import calibrate, factors
from sd_progress.factors import FactorsRegistry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from demo_scenes import draw, random_scene  # noqa: E402
from publish_factors import MODELS, details_of, main  # noqa: E402


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pictures; a VAE with a card, alone in its folder; and a folder with nothing in it."""
    folder = tmp_path_factory.mktemp("publish")
    for name in ("scenes", "empty"):
        (folder / name).mkdir()
    for number in range(16):
        draw(random_scene(number)).save(folder / "scenes" / f"{number:02}.png")
    tiny.working_vae().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\nA VAE.\n")
    return folder


def published(places, out, *only):
    """The exit code of the tool, with all that it makes in one folder."""
    words = ("--images", places / "scenes", "--out-dir", out, "--table", out / "table.md")
    return main([str(word) for word in (*words, "--only", *only)])


def test_each_family_has_a_model():
    """Under its own name, so that the row is found by it."""
    text = (ROOT / "sd_progress" / "data" / "vae_families.json").read_text()
    assert {model.family for model in MODELS} == set(json.loads(text)["families"])
    assert len({model.name for model in MODELS}) == len(MODELS)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", model.where) for model in MODELS)


def test_a_failure_is_told_and_the_others_go_on(places, tmp_path, capsys):
    """A line for each, and exit code 1 in the end."""
    only = (f"broken={places / 'empty'}", f"mine={places / 'model'}")
    assert published(places, tmp_path, *only) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"[1/2] broken: {places / 'empty'}\n[2/2] mine: {places / 'model'}\n  ")
    assert "failed: UsageError: --model must be a model id" in err
    assert out.endswith("table.md: 1 rows; failed: broken\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine-calibrated.safetensors",
        "table.md",
    ]


def test_a_row_says_where_it_comes_from(places, tmp_path):
    """And is found by what a VAE is, in whatever dtype, as published rows are."""
    assert published(places, tmp_path, f"sd1={places / 'model'}") == 0
    row = factors.load(tmp_path / "sd1-calibrated.safetensors")
    assert (row.name, row.kernel_size, row.upscale) == ("sd1-calibrated", 5, 2)
    assert FactorsRegistry([row]).find(tiny.working_vae().half()) is row
    assert (row.vae_hash, row.licence) == (None, "Apache-2.0")
    details = details_of(row)
    assert (details["model"], details["revision"]) == ("model", "a folder")
    assert details["licence of the VAE"] == "mit"
    assert re.fullmatch(r"\d+\.\d dB with sd1", details["before"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", details["date"])


def test_the_table_has_all_rows_that_are_there(places, tmp_path):
    """Also those of an earlier call, which are not made anew."""
    published(places, tmp_path, f"mine={places / 'model'}")
    published(places, tmp_path, f"sd1={places / 'model'}")
    head, rule, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert [row.split(" | ")[0] for row in rows] == ["| mine-calibrated", "| sd1-calibrated"]
    assert all("| AutoencoderKL | 5x5 to 2x2 | 1212 | 3" in row for row in rows)


def test_a_map_that_is_no_better_is_not_kept(places, tmp_path, monkeypatch, capsys):
    """The published row of the family stays what it was."""
    registry = FactorsRegistry.shipped()
    best = replace(calibrate(tiny.working_vae(), upscale=2), name="sd1")
    registry.register(best)
    registry._published.append(registry.by_name("sd1"))
    monkeypatch.setattr(factors, "default_registry", lambda: registry)
    assert published(places, tmp_path, f"sd1={places / 'model'}", "--kernel_size", "1") == 1
    assert "the map must be better than the published row 'sd1' with 3" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_an_unknown_name_is_told(capsys):
    """With those that there are."""
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "sdxl", "sd15"])
    assert "--only must be NAME=FOLDER, or one of sd1, sdxl, " in capsys.readouterr().err


def test_help_names_every_model(capsys):
    """And shows what can be typed."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(model.where in text for model in MODELS)
    assert "python tools/publish_factors.py --only sdxl flux2" in text
