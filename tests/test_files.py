import json

import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import from_plain, plain, read_arrays, read_json, write_json, write_whole


def test_json_is_whole_or_as_before(tmp_path):
    file = tmp_path / "numbers.json"
    write_json(file, {"a": [1.5, None, "é"]})
    assert json.loads(file.read_text()) == {"a": [1.5, None, "é"]}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(file, {"a": bad})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [1.5, None, "é"]}


def test_numbers_survive_json_and_what_is_not_finite_becomes_none():
    values = [1.5, np.nan, np.inf, -np.inf]
    assert plain(np.array(values)) == [1.5, None, None, None]
    assert plain(jnp.array([values, values])) == 2 * [[1.5, None, None, None]]
    np.testing.assert_array_equal(from_plain(json.loads(json.dumps(plain(values)))), [1.5, *3 * [np.nan]])
    for number, kind in ((3, int), (np.int32(3), int), (jnp.float32(0.5), float), (True, bool)):
        assert plain(number) == number and type(plain(number)) is kind
    assert plain(float("nan")) is None and plain(jnp.float32(jnp.inf)) is None


@pytest.mark.parametrize("text", ['{"a": 1', "", "[1]", "\xff"])
def test_json_that_is_damaged_or_no_object_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "numbers.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"numbers.json: not (readable as JSON|a JSON object)") as raised:
        read_json(file)
    assert "\n" not in str(raised.value)


def test_arrays_read_back_or_are_refused_in_one_line(tmp_path):
    file = tmp_path / "arrays.npz"
    write_whole(file, lambda stream: np.savez_compressed(stream, a=np.arange(100.0)))
    np.testing.assert_array_equal(read_arrays(file)["a"], np.arange(100.0))
    whole = file.read_bytes()
    changed = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    entry = whole.index(b"PK\x01\x02")  # in the archive's directory
    encrypted = whole[: entry + 8] + b"\x01" + whole[entry + 9 :]
    method = whole[: entry + 10] + b"\x63" + whole[entry + 11 :]  # of no compression that there is
    for damaged in (b"", b"text", whole[:-7], whole[: len(whole) // 2], changed, encrypted, method):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match="arrays.npz: not a readable .npz of plain arrays"):
            read_arrays(file)
    np.savez(file, a=np.array([{}], dtype=object))  # would need pickle
    with pytest.raises(UsageError, match="not a readable .npz of plain arrays"):
        read_arrays(file)
