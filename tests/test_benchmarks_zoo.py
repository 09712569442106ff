"""benchmarks.zoo: small networks run in processes of their own, some of which cannot be pruned."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import render, zoo
from benchmarks.zoo import __main__ as runner
from benchmarks.zoo import examine
from prunax import structured

OF_OTHERS = """
from benchmarks import zoo

def nothing_inside():
    return zoo.Network(lambda w, x: x @ w["kernel"], {"kernel": zoo.normal(6, 3)}, (zoo.normal(2, 6),))

def without_a_package():
    import no_such_package

def broken():
    raise KeyError("no such layer")

def endless():
    def fn(params, x):
        while True:
            pass
    return zoo.Network(fn, {"kernel": zoo.normal(6, 3)}, (zoo.normal(2, 6),))

NETWORKS = {f.__name__: f for f in (nothing_inside, without_a_package, broken, endless)}
"""


def records(folder):
    return {r["name"]: r for r in json.loads((folder / "zoo.json").read_text())["records"]}


def test_a_run_of_the_zoo(tmp_path, monkeypatch, capsys):
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "others.py").write_text(OF_OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    arguments = f"--sources haiku equinox of.others --out {tmp_path}".split()
    some = "haiku/MLP equinox/MLP */nothing* */without* */broken".split()
    runner.main([*arguments, "--only", *some])

    found = records(tmp_path)
    assert list(found) == "haiku/MLP equinox/MLP of.others/nothing_inside of.others/broken".split()
    for name in ("haiku/MLP", "equinox/MLP"):
        assert runner.is_right(found[name]) and runner.is_calibrated(found[name])
        assert not runner.reasons(found[name])
        assert 0.25 < found[name]["left"] < 0.5 and found[name]["change"] > 0.1
        assert found[name]["zeros"] == pytest.approx(0.5, abs=0.01)
    refused = found["of.others/nothing_inside"]
    assert "produces an axis that may shrink" in refused["pruned"]
    assert refused["wanda"] == "passed" and not runner.is_wrong(refused)
    assert found["of.others/broken"]["failed"] == "cannot be built: KeyError: 'no such layer'"
    assert "Left out of.others" in capsys.readouterr().out

    # What is there is not done again; time is limited.
    runner.main([*arguments, "--limit-seconds", "1", "--only", "*/endless", *some])
    again = records(tmp_path)
    assert again.pop("of.others/endless")["failed"] == "took more than 1 s of CPU"
    assert again == found

    tables = render.all_tables(tmp_path)
    assert "| all | 5 | 2 | 0 |" in tables["zoo"]
    assert "| equinox/MLP | 2,986 |" in tables["zoo/networks"]
    assert "| took more than 1 s of CPU | all | 1 | of.others/endless |" in tables["zoo/failures"]
    with pytest.raises(SystemExit):
        runner.main([*arguments, "--only", "nothing like it"])


def test_what_is_wrong_is_called_wrong():
    right = dict(pruned="passed", finite=True, left=0.3, difference=1e-7, wanda="passed")
    assert runner.is_right(right) and not runner.reasons(right)
    for mistake in (dict(finite=False), dict(left=1.0), dict(difference=1e-4)):
        assert runner.is_wrong(right | mistake), mistake
        ((what, _),) = runner.reasons(right | mistake)
        assert what == "channels"


def test_masked_params_by_hand():
    params = {"up": np.ones((2, 4)), "bias": np.ones(4), "down": np.ones((4, 3))}

    def fn(p, x):
        return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]

    (group,) = [g for g in structured.axis_groups(fn, params, jnp.ones((1, 2))) if not g.frozen]
    masked = examine.masked(params, {group: np.array([0, 3])})
    np.testing.assert_array_equal(masked["up"], [[1, 0, 0, 1]] * 2)
    np.testing.assert_array_equal(masked["bias"], [1, 0, 0, 1])
    np.testing.assert_array_equal(masked["down"], [[1] * 3, [0] * 3, [0] * 3, [1] * 3])
    assert params["up"].all()  # untouched


def test_difference_is_relative_to_the_largest_value():
    ours, theirs = [np.array([1.0, 2.0]), np.array([7])], [np.array([1.0, 4.0]), np.array([8])]
    assert examine.difference(ours, theirs) == 0.5
    assert examine.difference([np.ones(2)], [np.ones(3)]) == np.inf


def test_random_weights_are_nowhere_zero_and_variances_positive():
    tree = {"bn": {"var": np.ones(50, np.float32)}, "bias": np.zeros(50, np.float32), "n": 3}
    filled = zoo.random(tree)
    assert (filled["bn"]["var"] > 0).all() and filled["bias"].all() and filled["n"] == 3
