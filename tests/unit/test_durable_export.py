import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from psq.durable.checkpoint import write_checkpoint
from psq.durable.difference import Difference, diff
from psq.durable.export import export_safetensors
from psq.errors import StateError

X = np.arange(600_000, dtype=np.float32)
META = {
    "parameters": {
        "fc.weight": {"shape": [500, 700], "pieces": [["x", 0, 350_000]]},
        "fc.bias": {"shape": [7], "pieces": [["x", 599_993, 599_995], ["y", 0, 5]]},
        "scalar": {"shape": [], "pieces": [["x", 400_000, 400_001]]},
        "none": {"shape": [0, 3], "pieces": []},
        "codes": {"shape": [4], "pieces": [["codes", 1, 5]]},
    },
    "export": {"version": "7"},
}
ARRAYS = {"x": X, "y": -np.arange(5, dtype=np.float32), "codes": np.arange(9, dtype=np.uint8)}


def test_plain_torch_loads_what_was_exported_by_name(tmp_path):
    path = write_checkpoint(tmp_path, 7, ARRAYS, META)
    out = tmp_path / "w.safetensors"
    assert export_safetensors(path, out) == out.stat().st_size
    loaded = load_file(out)
    assert torch.equal(loaded["fc.weight"], torch.from_numpy(X[:350_000]).reshape(500, 700))
    assert loaded["fc.bias"].tolist() == [599_993, 599_994, 0, -1, -2, -3, -4]
    assert loaded["scalar"].shape == ()
    assert loaded["scalar"].item() == 400_000
    assert loaded["none"].shape == (0, 3)
    assert loaded["codes"].tolist() == [1, 2, 3, 4]
    with safe_open(out, "numpy") as opened:
        assert opened.metadata() == {"version": "7"}


def test_a_damaged_checkpoint_replaces_no_weights(tmp_path):
    path = write_checkpoint(tmp_path, 7, ARRAYS, META)
    out = tmp_path / "w.safetensors"
    out.write_bytes(b"old")
    data = bytearray((path / "arrays-00000.bin").read_bytes())
    data[2_399_999] ^= 1  # of x, and in no parameter
    (path / "arrays-00000.bin").write_bytes(data)
    with pytest.raises(StateError, match="array 'x' is not what was written"):
        export_safetensors(path, out)
    assert out.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "told",
    [
        {"shape": [3], "pieces": [["x", 0, 2]]},
        {"shape": [2], "pieces": [["x", 599_999, 600_001]]},
        {"shape": [2], "pieces": [["x", 2, 0]]},
        {"shape": [1], "pieces": [["z", 0, 1]]},
        {"shape": [2], "pieces": [["x", 0, 1], ["codes", 0, 1]]},
        {"shape": [-1], "pieces": []},
        {"pieces": []},
        [],
    ],
)
def test_parameters_that_cannot_be_are_refused(tmp_path, told):
    path = write_checkpoint(tmp_path, 7, ARRAYS, {"parameters": {"w": told}})
    with pytest.raises(StateError, match="says of parameter 'w' cannot be"):
        export_safetensors(path, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_checkpoint_without_parameters_says_so(tmp_path):
    path = write_checkpoint(tmp_path, 7, ARRAYS, {})
    with pytest.raises(StateError, match="its meta has no 'parameters'"):
        export_safetensors(path, tmp_path / "w")


def test_equal_checkpoints_do_not_differ(tmp_path):
    arrays = {"x": np.array([np.nan, 1, np.inf])}
    a = write_checkpoint(tmp_path, 1, arrays, {"v": 1})
    assert diff(a, write_checkpoint(tmp_path, 2, arrays, {"v": 1})) == []


def test_what_differs_is_counted_and_measured(tmp_path):
    x = X.copy()
    x[[0, 300_000, 599_999]] += [1, np.inf, -8]
    zero = {"z": np.array([0.0, np.nan]), "half": np.ones(3, np.float16)}
    a = write_checkpoint(tmp_path, 1, {"x": X, "only": X[:1], "y": X[:2], **zero}, {"v": 1, "w": 2})
    zero = {"z": np.array([-0.0, np.nan]), "half": np.array([1, 2, 1], np.float16)}
    b = write_checkpoint(tmp_path, 1, {"x": x, "y": X[:3], "new": X[:1], **zero}, {"v": 2, "w": 2})
    assert diff(a, b) == [
        Difference("v", "meta"),
        Difference("x", "values", 3, 600_000, 8.0),
        Difference("only", "only in a"),
        Difference("y", "kind"),
        Difference("z", "values", 1, 2, 0.0),
        Difference("half", "values", 1, 3, 1.0),
        Difference("new", "only in b"),
    ]
