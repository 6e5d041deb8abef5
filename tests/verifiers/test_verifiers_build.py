"""From a configuration to a verifier: kinds, settings, whose code may run, and what importing costs."""

import subprocess
import sys

import pytest

from tutelage.errors import ConfigError, MissingExtra
from tutelage.types import Task, Trajectory, Verifier
from tutelage.verifiers import KINDS, LastNumberVerifier, PythonVerifier, build_verifier
from tutelage.verifiers.locate import locate_function

MINIMAL = {"regex": {"pattern": "x"}, "python": {"function": "mine.py:judge"}}


def said(completion):
    return Trajectory(id="x", task_id="t", task_hash="h", spans=(), completion=completion)


def mine(folder, code="def judge(task, completion, trajectory): return completion == task['answer']"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(code)
    return folder


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_builds_and_is_a_verifier(kind, tmp_path):
    verifier: Verifier = build_verifier(
        kind, {**MINIMAL.get(kind, {}), "workers": 1, "limits": {"time_s": 2}}, root=mine(tmp_path)
    )
    assert verifier.name and verifier.version
    assert verifier.judge(Task(id="t", messages=()), []) == []
    assert verifier.pool.pids() == []
    assert verifier.pool.limits.time_s == 2


def test_unknown_kinds_and_settings_name_the_nearest():
    with pytest.raises(ConfigError, match="unknown verifier 'last_numbr' \\(did you mean 'last_number'\\?\\)"):
        build_verifier("last_numbr")
    with pytest.raises(ConfigError) as e:
        build_verifier("regex", {"patern": "x", "limits": {"time": 3}})
    assert len(e.value.problems) == 3
    assert "no setting 'patern' (did you mean 'pattern'?)" in e.value.problems[0]
    assert "no limit 'time' (did you mean 'time_s'?)" in e.value.problems[1]
    assert "needs the setting 'pattern'" in e.value.problems[2]
    with pytest.raises(ConfigError, match="no setting 'options'"):
        build_verifier("last_number", {"options": {}})


def test_a_function_is_a_kind(tmp_path):
    root = mine(tmp_path)
    with build_verifier("mine.py:judge", {"workers": 1}, root=root) as v:
        got = v.judge(Task(id="t", messages=(), answer="7"), [said("7"), said("8")])
    assert [x.is_accepted for x in got] == [True, False]
    assert v.name == "python:mine.py:judge"


def test_modules_of_the_project_are_found_without_running_them(tmp_path):
    package = tmp_path / "src" / "acme" / "deep"
    mine(package)
    (package / "__init__.py").write_text("raise SystemExit('ran')")
    (package.parent / "__init__.py").write_text("")
    assert PythonVerifier(function="acme.deep.mine:judge", root=tmp_path).file == package / "mine.py"
    (package / "__init__.py").write_text("from acme.helper import VALUE")
    (package.parent / "helper.py").write_text("VALUE = 3")
    with build_verifier("acme.deep.mine:judge", {"workers": 1}, root=tmp_path) as v:
        assert v.judge(Task(id="t", messages=(), answer="7"), [said("7")])[0].is_accepted


def test_neighbouring_files_can_be_imported(tmp_path):
    mine(tmp_path, "import helper\ndef judge(task, completion, trajectory): return helper.ok(completion)")
    (tmp_path / "helper.py").write_text("def ok(x): return x == '7'")
    with build_verifier("mine.py:judge", {"workers": 1}, root=tmp_path) as v:
        assert v.judge(Task(id="t", messages=()), [said("7")])[0].is_accepted


def test_code_from_outside_is_named_and_asked_for(tmp_path):
    project, other = tmp_path / "project", mine(tmp_path / "other")
    project.mkdir()
    (project / "link.py").symlink_to(other / "mine.py")
    mine(project / ".venv" / "lib" / "site-packages")
    outside = [
        (str(other / "mine.py"), other / "mine.py"),
        ("../other/mine.py", other / "mine.py"),
        ("link.py", other / "mine.py"),
        (".venv/lib/site-packages/mine.py", project / ".venv/lib/site-packages/mine.py"),
    ]
    for source, file in outside:
        with pytest.raises(ConfigError, match=r"allow_code_outside: true .*allow_outside_code=True") as e:
            build_verifier(f"{source}:judge", root=project)
        assert f"{file} is not in {project}" in str(e.value)
        build_verifier(f"{source}:judge", {"allow_outside_code": True}, root=project)
    with pytest.raises(ConfigError, match=r"allow_code_outside: true .*allow_outside_code=True"):
        build_verifier("json.decoder:scanstring", root=project)


def test_what_is_not_there_is_said(tmp_path):
    root = mine(tmp_path)
    for function, message in [
        ("mine.py", '"module:function" or "path.py:function", got'),
        ("mine.py:", "got 'mine.py:'"),
        ("other.py:judge", "there is no 'other.py'"),
        ("no.such.module:judge", "there is no 'no.such.module'"),
        ("mine.py:jugde", "defines no 'jugde' \\(did you mean 'judge'\\?\\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            locate_function(function, root)
    mine(tmp_path, "def judge(:")
    with pytest.raises(ConfigError, match="is no Python"):
        locate_function("mine.py:judge", root)
    mine(tmp_path, "try:\n    from json import loads as judge\nexcept ImportError:\n    pass")
    assert locate_function("mine.py:judge", root).file == tmp_path / "mine.py"


def test_the_version_follows_the_code(tmp_path):
    first = PythonVerifier(function="mine.py:judge", root=mine(tmp_path)).version
    assert PythonVerifier(function="mine.py:judge", root=tmp_path).version == first
    assert PythonVerifier(function="mine.py:judge", root=mine(tmp_path, "def judge(*a): return True")).version != first


@pytest.mark.parametrize(("kind", "module"), [("math_verify", "math_verify"), ("reasoning_gym", "reasoning_gym")])
def test_a_missing_extra_is_named_at_once(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'tutelage\[(math|gym)\]'"):
        build_verifier(kind)


def test_importing_is_light_and_workers_import_nothing_of_the_caller():
    heavy = ["torch", "transformers", "numpy", "sympy", "math_verify", "reasoning_gym", "pydantic", "pyarrow"]
    code = f"import sys, tutelage.verifiers; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_worker_is_no_copy_of_the_caller(tmp_path):
    code = (
        "import sys\ndef judge(*a): return not {'tutelage', 'pytest', 'torch'} & {m.split('.')[0] for m in sys.modules}"
    )
    with build_verifier("mine.py:judge", {"workers": 1}, root=mine(tmp_path, code)) as v:
        assert v.judge(Task(id="t", messages=()), [said("x")])[0].is_accepted


def test_tasks_without_a_gold_answer_are_found_before_sampling():
    v = LastNumberVerifier()
    good = Task(id="a", messages=(), answer="#### 7")
    v.check([good])
    bad = [Task(id="b", messages=()), Task(id="c", messages=(), answer="none")]
    with pytest.raises(
        Exception, match="cannot judge 2 of the tasks; the first is 'b': its gold answer None holds no number"
    ):
        v.check([good, *bad])
