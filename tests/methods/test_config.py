"""Settings: every problem at once, the nearest known key, and every shipped config loads."""

from pathlib import Path
from typing import Any

import pytest

from tutelage.cli.runs import demo_settings
from tutelage.errors import ConfigError
from tutelage.methods import METHODS
from tutelage.methods.config import RunConfig, load_config
from tutelage.methods.handover import rl_settings
from tutelage.methods.settings import Settings

ROOT = Path(__file__).parents[2]
SFT = {"method": "sft", "data": {"path": "x.jsonl"}}
NEEDED = {
    "tasks": {"kind": "reasoning_gym", "name": "chain_sum"},
    "verifier": {"kind": "exact"},
    "data": {"path": "x.jsonl"},
    "teacher": {"name": "x"},
}


def stage(method: str, **sections: Any) -> Any:
    """The stage's settings, with what the method cannot do without."""
    fields = METHODS[method].settings.model_fields
    asks = method != "sft"  # the others ask questions or may
    needed = {n: v for n, v in NEEDED.items() if n in fields and (fields[n].is_required() or (asks and n != "data"))}
    return load_config({"method": method, **needed, **sections})[0].stages[0]


def preset_sections() -> list[tuple[str, str]]:
    """Every method with each of its sections that has a default."""
    fields = [(m, n, f) for m, method in METHODS.items() for n, f in method.settings.model_fields.items()]
    return [(m, n) for m, n, f in fields if isinstance(f.get_default(call_default_factory=True), Settings)]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("**/*.yaml")), ids=lambda p: p.name)
def test_every_example_config_loads(path: Path) -> None:
    config, folder = load_config(path)
    assert config.stages and folder == path.parent


def test_the_demo_config_loads() -> None:
    config, _ = load_config(demo_settings())
    assert config.stages[0].method == "rejection_sampling"


def test_unknown_keys_name_the_nearest_known_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: sft\ndata:\n  path: x\n  pth: y\ntrain:\n  learning_rate: 1e-5\nsede: 3\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    text = str(error.value)
    assert 'unknown key "data.pth" (did you mean "data.path"?)  in run.yaml:4' in text
    assert 'unknown key "train.learning_rate" (did you mean "train.lr"?)  in run.yaml:6' in text
    assert 'unknown key "sede" (did you mean "seed"?)  in run.yaml:7' in text
    assert len(error.value.problems) == 3


def test_missing_and_wrong_values_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"method": "sft", "train": {"epochs": 0}, "seed": "many"})
    text = str(error.value)
    assert '"data" is missing: Demonstrations.' in text
    assert '"train.epochs": input should be greater than or equal to 1, got 0' in text
    assert '"seed"' in text and "'many'" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "method is missing: which of"),
        ({"method": "stf"}, r"method 'stf' is unknown \(did you mean 'sft'\?\)"),
        ({"stages": []}, "stages must name at least one stage"),
        ({"stages": [SFT, SFT]}, "stage names must differ: 'sft' is there 2 times"),
        (SFT | {"evaluation": {"n": 4, "ks": [1, 8]}}, r"asks for pass@8 but evaluation.n is 4: raise n"),
        (
            {"method": "rejection_sampling", "tasks": {"kind": "gsm8k"}, "verifier": {"kind": "last_number"}},
            "tasks.kind=gsm8k needs tasks.path",
        ),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(settings)


def test_command_line_wins_over_file_and_reads_numbers() -> None:
    config, _ = load_config(SFT, ["train.lr=1e-5", "seed=7", "model.lora.r=4", "data.overlong=drop"])
    stage = config.stages[0]
    assert stage.train.lr == 1e-5 and config.seed == 7 and config.model.lora.r == 4 and stage.data.overlong == "drop"
    plan, _ = load_config({"stages": [SFT]}, ["stages.0.train.epochs=5"])
    assert plan.stages[0].train.epochs == 5
    with pytest.raises(ConfigError, match="have the form key=value"):
        load_config(SFT, ["train.lr"])
    with pytest.raises(ConfigError, match=r"stages has 1 entries; '3' is none of them"):
        load_config({"stages": [SFT]}, ["stages.3.train.epochs=5"])


@pytest.mark.parametrize(("method", "section"), preset_sections())
def test_naming_one_key_of_a_section_leaves_the_rest_of_the_methods_own(method: str, section: str) -> None:
    preset = getattr(stage(method), section)
    for key, value in preset.model_dump().items():
        assert getattr(stage(method, **{section: {key: value}}), section) == preset, key


def test_a_section_given_in_part_keeps_what_makes_the_method() -> None:
    raft = stage("raft", keep={"drop_truncated": False}).keep
    assert (raft.drop_truncated, raft.best_of, raft.cap, raft.distinct) == (False, 1, None, None)
    star = stage("star", rollout={"max_new_tokens": 64}, train={"lr": 1e-5})
    assert (star.rollout.max_new_tokens, star.rollout.n, star.rollout.temperature) == (64, 1, 0.0)
    assert (star.train.lr, star.train.updates, star.train.updates_growth) == (1e-5, 40, 1.2)
    assert stage("rft", keep={"cap": 9}).keep.order == "farthest"
    settings, _ = load_config({"method": "grpo", **{n: NEEDED[n] for n in ("tasks", "verifier")}}, ["train.lr=1e-5"])
    assert (settings.stages[0].train.batch_size, settings.stages[0].train.betas) == (None, (0.9, 0.99))
    imitation = stage("raft", until="graduation", then="rl", rl={"train": {"lr": 1e-5}})
    assert (rl_settings(imitation).train.batch_size, rl_settings(imitation).train.schedule) == (None, "constant")


def test_a_section_within_a_section_keeps_its_own_default_too() -> None:
    class Inner(Settings):
        a: int = 1
        """a"""
        b: int = 2
        """b"""

    class Middle(Settings):
        inner: Inner = Inner(b=3)
        c: int = 4
        """c"""

    class Outer(Settings):
        middle: Middle = Middle(inner=Inner(a=5))

    assert Outer(middle={"inner": {"b": 6}}).middle == Middle(inner=Inner(a=5, b=6))  # type: ignore[arg-type]
    assert Outer(middle={"c": 7}).middle == Middle(inner=Inner(a=5), c=7)  # type: ignore[arg-type]
    assert Outer(middle=Middle(c=7)).middle.inner == Inner(b=3), "a whole section is taken as it is"


def test_an_override_of_a_yaml_alias_changes_one_of_the_two(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("stages:\n- {method: sft, name: a, data: &data {path: x}}\n- {method: sft, name: b, data: *data}\n")
    config, _ = load_config(path, ["stages.1.data.limit=3"])
    assert [s.data.limit for s in config.stages] == [None, 3]


def test_a_missing_config_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*run.yaml"):
        load_config(tmp_path / "rum.yaml")


def test_settings_are_frozen() -> None:
    config, _ = load_config(SFT)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def nested(model: type, field: Any) -> list[type]:
    """The settings a field holds, if any; a mapping to the model's own kind is a leaf."""
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return [k for k in kinds if isinstance(k, type) and hasattr(k, "model_fields") and k is not model]


def keys(model: type, prefix: str = "") -> set[str]:
    out = set()
    for name, field in model.model_fields.items():
        inner = nested(model, field)
        out |= keys(inner[0], f"{prefix}{name}.") if inner else {prefix + name}
    return out


def test_every_setting_says_what_it_is() -> None:
    def undocumented(model: type, prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = nested(model, field)
            if inner:
                found += undocumented(inner[0], f"{prefix}{name}.")
            elif not field.description and name != "method":
                found.append(prefix + name)
        return found

    missing = undocumented(RunConfig, "") + [k for m in METHODS.values() for k in undocumented(m.settings, "")]
    assert missing == []
