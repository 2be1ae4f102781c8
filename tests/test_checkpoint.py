"""Weights files: written and read alike, and every file that cannot be used refused by name before it does harm."""

import copy
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ddmd.inference.detector import Detector
from ddmd.io.volume import VolumeError
from ddmd.models import checkpoint
from ddmd.models.checkpoint import WeightsError
from tests.volumes import head, tiny_system

NAN = float("nan")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(tiny_system(), path)
    return path


def parts_of(path):
    """Header and tensors of a file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header, body):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def described(tiny, path, change):
    """The tiny weights with another description: a text, or what `change` makes of the values."""
    header, body = parts_of(tiny)
    values = json.loads(header["__metadata__"]["ddmd"])
    text = change if isinstance(change, str) else json.dumps(change(values) or values)
    header["__metadata__"]["ddmd"] = text
    return write(path, header, body)


def data(image):
    return np.asanyarray(image.dataobj)


def test_saved_weights_load_as_they_were(tmp_path, rng):
    system, (values, affine) = tiny_system(), head(rng)
    checkpoint.save(system, tmp_path / "tiny.safetensors", torch.float32)
    loaded = Detector.load(tmp_path / "tiny.safetensors", "cpu", "float32")
    for name, part in system.parts().items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, loaded.system.parts()[name].state_dict()[key])
    one, other = (d.detect(values, affine=affine) for d in (Detector(system), loaded))
    difference = np.abs(data(one.probability) - data(other.probability)).max()
    assert difference < 1e-5, "more than another layout of the weights rounds"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]
    assert len(loaded.weights_sha256) == 64


@pytest.mark.parametrize(("amx", "avx512", "wanted"), [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32),
])  # fmt: skip
def test_precision_is_what_the_processor_multiplies(monkeypatch, amx, avx512, wanted):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert checkpoint.pick_dtype("auto", torch.device("cpu")) is wanted
    assert checkpoint.pick_dtype("float32", torch.device("cpu")) is torch.float32
    for wrong in ("half", None, 3, [], torch.float32):
        with pytest.raises(ValueError, match="precision is .*; allowed are auto, float32, bfloat16"):
            checkpoint.pick_dtype(wrong, torch.device("cpu"))


def test_files_that_are_no_weights_are_refused(tmp_path, tiny):
    for missing in ("ddmd-heavy", "no/such/file.safetensors", "a" * 5000, "nul\0", tmp_path):
        with pytest.raises(WeightsError, match="no such weights"):
            checkpoint.load(missing)
    torch.save({"a": torch.ones(2)}, tmp_path / "pickled.pt")
    with pytest.raises(WeightsError, match=r"pickled.pt: not a safetensors file .* never loaded"):
        checkpoint.load(tmp_path / "pickled.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(WeightsError, match="bare.safetensors: lacks its description"):
        checkpoint.load(tmp_path / "bare.safetensors")
    with safe_open(tiny, "pt") as file:
        description = file.metadata()["ddmd"]
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors", {"ddmd": description})
    with pytest.raises(WeightsError, match="other.safetensors: of another architecture"):
        checkpoint.load(tmp_path / "other.safetensors")
    newer = described(tiny, tmp_path / "newer.safetensors", lambda d: d | {"format": 99, "added": 1})
    with pytest.raises(WeightsError, match=r"newer.safetensors: format 99 is newer"):
        checkpoint.load(newer)


HUGE = (10**9, 10**12, 10**30, 10**400)
WRONG = {
    ("schedule", "steps"): (0, -1, *HUGE, "x", 1.5, None, True),
    ("schedule", "kind"): ("x", None, []),
    ("schedule", "prediction"): ("x", 3),
    ("autoencoder", "width"): (0, -1, 3, 10**6, *HUGE, "x", 1.5, None, True),
    ("autoencoder", "members"): (0, -1, 10**6, "x"),
    ("autoencoder", "code"): (0, -1, 10**7),
    ("autoencoder", "sequences"): (0, 2, 10**7),
    ("denoiser",): (None, 3, [], {"x": 1}),
    ("denoiser", "widths"): (0, None, [], [8] * 3, [10**6] * 4, [8, 8, 8, "x"], [8, 8, 8, 28]),
    ("denoiser", "noise_width"): (0, 10**6, "x", 28),
    ("denoiser", "context"): (-1, 10**6, None),
    ("denoiser", "mirrored"): (0, "x", None),
    ("grid",): (None, 3, {"mm": 1.0, "multiple": 16, "x": 1}),
    ("grid", "mm"): (0, -1, 1e-3, 1e-9, 1e9, NAN, float("inf"), "x", None, True, 10**400),
    ("grid", "multiple"): (0, -16, 1, 3, 24, 10**6, 10**12, "x"),
    ("sampling",): (None, {"x": 1}, {"samples": 0}),
    ("sampling", "samples"): (0, -1, *HUGE, "x", 1.5, True),
    ("sampling", "steps"): (0, -5, 10**6, *HUGE, "x", 2.5),
    ("sampling", "sampler"): ("x", None, []),
    ("sampling", "eta"): (-1, 1e9, NAN, "x"),
    ("sampling", "stop"): (-1, 1, 2, NAN, "x"),
    ("threshold",): (0, 1, -1, 2, NAN, "x", None, True),
    ("threshold_chosen",): (3, None, "", "a" * 2000),
    ("min_lesion_ml",): (-1, NAN, "x", 1e9),
    ("min_peak",): (2, NAN, "x"),
    ("min_relative_contrast",): (2, -0.1, NAN, "x"),
    ("large_lesion_ml",): (-1, NAN, "x", 1e9),
    ("outline_share",): (0, 1.1, NAN, "x"),
    ("through_plane_mm",): (-1, 1e9, NAN, float("inf"), "x", None, 1e5),
    ("discrepancy_scale",): (NAN, 1e30, "x", None, -1),
    ("use_inter",): ("x", 3, None),
    ("system",): ("x", None, [], {}),
    ("sequences",): ([], ["flair", "flair"], "flair", None, ["t1", "flair"], 3, [3], ["../x"], ["f"] * 9),
    ("format",): (0, -1, "x", None, 1.5),
    ("name",): (3, None, "", "../../x", "<script>", "a" * 100_000, "[/red]", "a\nb", ".hidden"),
    ("training",): (None, 3, "x", []),
    ("evil",): (1,),
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, values in WRONG.items() for v in values],
                         ids=lambda x: ".".join(x) if isinstance(x, tuple) else repr(x)[:20])  # fmt: skip
def test_a_description_out_of_range_is_refused_naming_file_and_key(tiny, tmp_path, path, value):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    file = described(tiny, tmp_path / "wrong.safetensors", change)
    with pytest.raises(WeightsError, match="wrong.safetensors: ") as refused:
        checkpoint.load(file)
    assert path[-1] in str(refused.value)
    assert len(str(refused.value)) < len(str(file)) + 300


@pytest.mark.parametrize("text", [
    "", "null", "[]", "3", '"x"', "{}", '{"name":1}', "[" * 100_000, "NaN", "1e999", "9" * 10_000,
    '{"x": "' + "a" * 50_000_000 + '"}',
], ids=lambda text: text[:12])  # fmt: skip
def test_text_that_is_no_description_is_refused(tiny, tmp_path, text):
    with pytest.raises(WeightsError, match="wrong.safetensors: ") as refused:
        checkpoint.load(described(tiny, tmp_path / "wrong.safetensors", text))
    assert len(str(refused.value)) < 400


def test_more_parameters_than_are_allowed_are_refused_before_they_are_allocated(tiny, tmp_path):
    def change(values):
        values["denoiser"]["widths"] = [4096] * 4

    with pytest.raises(WeightsError, match="parameters; allowed are 200,000,000"):
        checkpoint.load(described(tiny, tmp_path / "wrong.safetensors", change))


def test_headers_that_lie_are_refused(tiny, tmp_path):
    raw, path = tiny.read_bytes(), tmp_path / "wrong.safetensors"
    for length in (0, 1, 7, 2**31, 2**63 - 1, 2**64 - 1, 10**9, 100_000_001, 2**24):
        path.write_bytes(struct.pack("<Q", length) + raw[8:])
        with pytest.raises(WeightsError, match="wrong.safetensors: not a safetensors file"):
            checkpoint.load(path)
    for cut in (0, 4, 8, 100, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(WeightsError, match="wrong.safetensors: "):
            checkpoint.load(path)
    header, body = parts_of(tiny)
    first, second = [key for key in header if key != "__metadata__"][:2]
    for change in (
        {"dtype": "F32"}, {"dtype": "Q9"}, {"dtype": "I16"}, {"dtype": "BOOL"}, {"dtype": None}, {"shape": [-1]},
        {"shape": [2**40]}, {"shape": [2**33, 2**33]}, {"shape": None}, {"shape": ["x"]}, {"shape": [1.5]},
        {"data_offsets": [-1, 10]}, {"data_offsets": [0, 2**50]}, {"data_offsets": header[second]["data_offsets"]},
    ):  # fmt: skip
        mutant = copy.deepcopy(header)
        mutant[first].update(change)
        with pytest.raises(WeightsError, match="wrong.safetensors: "):
            checkpoint.load(write(path, mutant, body))
    for metadata in (None, [], {"ddmd": 3}, {"ddmd": None}, {}):
        with pytest.raises(WeightsError, match="wrong.safetensors: "):
            checkpoint.load(write(path, header | {"__metadata__": metadata}, body))


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_refused_naming_the_tensor(tiny, tmp_path, value, rng):
    header, body = parts_of(tiny)
    names = [key for key in header if key != "__metadata__"]
    for name in rng.choice(names, 5, replace=False):
        first, last = header[name]["data_offsets"]
        values = np.frombuffer(body[first:last], np.float16).copy()
        values[rng.integers(len(values))] = value
        path = write(tmp_path / "wrong.safetensors", header, body[:first] + values.tobytes() + body[last:])
        with pytest.raises(
            WeightsError, match=rf"wrong.safetensors: tensor {name} has 1 of .* NaN or infinite"
        ):
            checkpoint.load(path, precision="float32")
    system = tiny_system()
    system.denoiser.to_output.weight[0, 0, 0, 0] = value
    with pytest.raises(WeightsError, match=r"out.safetensors: tensor denoiser.to_output.weight"):
        checkpoint.save(system, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_weight_that_overflows_in_the_files_type_or_in_the_networks_is_refused(tmp_path):
    system = tiny_system()
    system.denoiser.to_output.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(WeightsError, match="to_output"):
        checkpoint.save(system, tmp_path / "half.safetensors")
    system.denoiser.to_output.weight[0, 0, 0, 0] = 3.4e38  # finite in float32 alone
    checkpoint.save(system, tmp_path / "single.safetensors", torch.float32)
    with pytest.raises(WeightsError, match=r"in torch.bfloat16: tensor denoiser.to_output.weight"):
        checkpoint.load(tmp_path / "single.safetensors", precision="bfloat16")


def test_weights_of_the_largest_values_are_computed_or_refused_naming_the_case(tiny, tmp_path, rng):
    header, body = parts_of(tiny)
    path = write(tmp_path / "large.safetensors", header, b"\xff\x7b" * (len(body) // 2))
    values, affine = head(rng)
    for precision in ("float32", "bfloat16"):
        detector = Detector.load(path, "cpu", precision)
        try:
            found = detector.detect(values, affine=affine)
        except VolumeError as error:
            assert "are not finite" in str(error)  # noqa: PT017
        else:
            for image in (found.probability, found.uncertainty, found.inter_discrepancy):
                assert np.isfinite(data(image)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_damaged_header_is_loaded_or_refused_in_one_line(tiny, tmp_path, changes):
    raw = bytearray(tiny.read_bytes())
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    for place, value in changes:
        raw[int(place * length)] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(bytes(raw))
    try:
        checkpoint.load(path)
    except WeightsError as error:
        assert "damaged.safetensors" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


def test_shipped_weights_say_of_themselves_what_is_allowed():
    for name in checkpoint.available():
        assert checkpoint.describe(checkpoint.find(name)).system == "ddmd"


@pytest.mark.parametrize("where", ["tensors", "description"])
def test_a_key_that_is_there_twice_is_refused(tiny, tmp_path, where):
    header, body = parts_of(tiny)
    if where == "tensors":
        name = next(name for name in header if name != "__metadata__")
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
        text += " " * (-len(text) % 8)
        path = tmp_path / "twice.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
    else:
        text = header["__metadata__"]["ddmd"]
        path = described(tiny, tmp_path / "twice.safetensors", text[:-1] + ', "threshold": 0.9}')
    with pytest.raises(WeightsError, match=r"twice\.safetensors: .*is there twice"):
        checkpoint.load(path, "cpu", "float32")


@pytest.mark.parametrize("name", checkpoint.available())
def test_shipped_weights_are_named_as_their_files(name):
    assert checkpoint.describe(checkpoint.find(name)).name == name


@pytest.mark.parametrize("name", sorted(checkpoint.EARLIER))
def test_weights_of_the_release_before_load_by_their_names_with_a_warning(name):
    with pytest.warns(
        FutureWarning, match=f"those of 0.1.*{checkpoint.EARLIER[name]}.*calibration of today's"
    ):
        path = checkpoint.find(name)
    assert checkpoint.describe(path).name == name
    assert name not in checkpoint.available()
    assert path.read_bytes() != checkpoint.find(checkpoint.EARLIER[name]).read_bytes()
