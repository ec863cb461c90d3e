"""Settings: where they come from, in which order, and how a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsosm_cli.errors import UsageError
from rsosm_cli.presets import preset_names
from rsosm_cli.settings import (
    BuildSettings,
    FetchSettings,
    GraphSettings,
    ModelSettings,
    PretrainSettings,
    TaskSettings,
    dump,
    load_yaml,
    resolve,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_override_earlier_ones_key_by_key(tmp_path: Path) -> None:
    config = write(tmp_path / "mine.yaml", "grid: {tile: 128, gsd: 1.2}\n")
    settings = resolve(
        BuildSettings,
        config=config,
        options={"grid.gsd": 0.9, "grid.stride": None},
        assignments=["grid.gsd=0.7", "bands=[1]"],
    )
    assert (settings.grid.tile, settings.grid.stride, settings.grid.gsd) == (128, 224, 0.7)
    assert settings.bands == (1,)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("optim.epoch=3", "'optim.epochs'"),
        ("model.mask_patch=0.5", "'model.mask_patches'"),
        ("temperatur=1", "'model.temperature'"),
        ("mode.temperature=1", "unknown key 'mode'. Did you mean 'model'?"),
        ("model.epochs=1", "Did you mean 'optim.epochs'?"),
        ("optim.epochs=-1", "'optim.epochs' = -1: input should be greater than 0"),
        ("precision=64", "'precision' = 64"),
        ("optim.epochs", "not of the form key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_known_one(assignment: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(PretrainSettings, kind="pretrain", assignments=[assignment])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_group_s_unknown_key_is_never_the_group() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'graph\.foo'\. graph has the keys compat, relations, "):
        resolve(BuildSettings, assignments=["graph.foo=1"])
    with pytest.raises(UsageError, match=r"Did you mean 'graph\.relations'\?"):
        resolve(BuildSettings, assignments=["graph.relation=released"])


@pytest.mark.parametrize(("kind", "schema"), [("tasks", TaskSettings), ("pretrain", PretrainSettings)])
def test_every_packaged_preset_fits_its_schema(kind: str, schema: type) -> None:
    for name in preset_names(kind):
        resolve(schema, kind=kind, preset=name)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'landuse'"):
        resolve(TaskSettings, kind="tasks", preset="landuses")


def test_a_yaml_extends_a_preset_or_another_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "extends: landuse\noptim: {epochs: 7}\n")
    top = write(tmp_path / "top.yaml", "extends: base.yaml\nname: mine\n")
    settings = resolve(TaskSettings, kind="tasks", config=top)
    packaged = resolve(TaskSettings, kind="tasks", preset="landuse")
    assert (settings.name, settings.optim.epochs) == ("mine", 7)
    assert settings.classes == packaged.classes


def test_a_circle_of_extends_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UsageError, match="extends itself"):
        load_yaml(tmp_path / "a.yaml")


def test_a_wrong_value_is_blamed_on_who_says_it(tmp_path: Path) -> None:
    config = write(tmp_path / "cfg.yaml", "overpass_days: 3\nnominatim_days: -1\n")
    with pytest.raises(UsageError, match=r"cfg\.yaml: key 'nominatim_days' = -1"):
        resolve(FetchSettings, config=config, options={"date": "2019-01-01"})
    config = write(tmp_path / "cfg.yaml", "overpass_days: 3\nbands: [1]\n")
    with pytest.raises(UsageError, match=r"^the command line: key 'date' = '2999-06-01': it lies in the future\."):
        resolve(FetchSettings, config=config, options={"date": "2999-06-01"})
    with pytest.raises(UsageError, match=r"^the command line: key 'bands': 0 is no band: they are counted from 1"):
        resolve(FetchSettings, config=config, options={"bands": [0, 1]})
    with pytest.raises(UsageError, match=r"^--set overpass_days=-2: key 'overpass_days' = -2"):
        resolve(FetchSettings, config=config, options={"bands": [2]}, assignments=["overpass_days=-2"])


def test_where_a_command_has_no_presets_none_can_be_extended(tmp_path: Path) -> None:
    for name in ("nothere", "cities"):  # of cities, there is a table beside the presets
        config = write(tmp_path / "a.yaml", f"extends: {name}\n")
        with pytest.raises(
            UsageError, match=rf"a\.yaml extends '{name}', and this command has no presets\..*other\.yaml"
        ):
            resolve(FetchSettings, config=config)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [1\n", "\x00"])
def test_a_file_that_is_no_mapping_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml(write(tmp_path / "bad.yaml", text))
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file .*gone\.yaml"):
        resolve(BuildSettings, config=tmp_path / "gone.yaml")


def test_settings_written_out_read_back_the_same(tmp_path: Path) -> None:
    for name in preset_names("tasks"):
        settings = resolve(TaskSettings, kind="tasks", preset=name)
        again = resolve(TaskSettings, kind="tasks", config=write(tmp_path / f"{name}.yaml", dump(settings)))
        assert again == settings


def test_compat_sets_the_rules_of_the_released_code_and_leaves_what_is_said() -> None:
    assert GraphSettings(compat="released").relations == "released"
    assert GraphSettings(compat="released", relations="partition").relations == "partition"
    assert GraphSettings(compat="released").leave_out == ()
    with pytest.raises(ValueError, match="no `key=value`"):
        GraphSettings(leave_out=("boundary",))
    model = ModelSettings(compat="released")
    assert (model.type_attention, model.edge_dim, model.objects_max) == ("sum", False, 10)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{name: a, classes: [{name: x, colour: '#000000'}]}", "at least two classes"),
        ("{name: a, kind: regression, classes: [{name: x, colour: '#000000'}]}", "has no classes"),
        (
            "{name: a, classes: [{name: x, colour: '#000000'}, {name: x, colour: '#000001'}]}",
            "class names must differ",
        ),
        (
            "{name: a, background: z, classes: [{name: x, colour: '#000000'}, {name: y, colour: '#000001'}]}",
            "background 'z' is not one of the classes x, y",
        ),
        ("{name: 'A B', kind: regression}", "'name' = 'A B'"),
        ("{name: a, classes: [{name: x, colour: red}, {name: y, colour: '#000001'}]}", "colour"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(tmp_path: Path, task: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(TaskSettings, kind="tasks", config=write(tmp_path / "task.yaml", task))
    assert said in str(caught.value)
    assert "task.yaml" in str(caught.value)


@given(st.text(max_size=30).filter(lambda text: not text.startswith(("bands", "graph", "grid"))))
def test_any_assignment_of_an_unknown_key_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(BuildSettings, assignments=[text])
    assert len(str(caught.value)) > len(text)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stac_dates", "2023-13-01", "no day of the calendar"),
        ("stac_dates", "2023-02-30/2023-03-01", "2023-02-30 is no day"),
        ("stac_dates", "2023-06/2023-05", "2023-06 comes after 2023-05"),
        ("stac_dates", "May 2023", "days are written as"),
        ("overpass_url", "overpass.example.org", "begins with https://"),
    ],
)
def test_dates_and_addresses_of_fetch(key: str, value: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve(FetchSettings, options={key: value})
    assert resolve(FetchSettings, options={"stac_dates": "2023/2023-05-01"}).stac_dates == "2023/2023-05-01"


@pytest.mark.parametrize("said", ["bands=4,3,2", "bands=[4,3,2]"])
def test_bands_are_a_list_with_and_without_brackets(said: str) -> None:
    assert resolve(BuildSettings, assignments=[said]).bands == (4, 3, 2)
    with pytest.raises(UsageError, match="counted from 1"):
        resolve(BuildSettings, assignments=["bands=0,1"])
