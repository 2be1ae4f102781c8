"""The shell: exit codes, what is printed, what is written, what is refused before any work."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest
import typer
from typer.testing import CliRunner

from ddmd.cli import app, console
from ddmd.cli.cohort_options import CohortSettings
from ddmd.cli.options import device_name
from ddmd.inference.detector import Detector
from ddmd.io.results import read_result
from ddmd.models import checkpoint
from tests.volumes import head, tiny_system, write, write_slices

runner = CliRunner()


@pytest.fixture
def tiny(tmp_path) -> str:
    path = tmp_path / "tiny.safetensors"
    checkpoint.save(tiny_system(), path)
    return str(path)


@pytest.fixture
def flair(tmp_path, rng) -> str:
    return write(tmp_path / "p1_flair.nii.gz", *head(rng))


def _run(*args):
    result = runner.invoke(app, [str(a) for a in args])
    return result.exit_code, " ".join(result.output.split())


def test_one_volume_is_detected_and_everything_named(tiny, flair, tmp_path):
    code, text = _run(
        "detect", flair, "-o", tmp_path / "out", "--weights", tiny, "--samples", 2, "--steps", 1
    )
    assert code == 0, text
    for name in (
        "lesion_mask.nii.gz",
        "probseg",
        "uncertainty",
        "inter_discrepancy",
        "_overlay.png",
        "_lesions.tsv",
    ):
        assert name in text
    assert "score" in text
    assert nib.load(tmp_path / "out" / "p1_desc-lesion_mask.nii.gz").shape == (40, 48, 12)
    code, text = _run("detect", flair, "-o", tmp_path / "out", "--weights", tiny)
    assert code == 2
    assert "--overwrite" in text
    code, text = _run("detect", flair, "-o", tmp_path / "out", "--weights", tiny, "--overwrite", "--quiet")
    assert (code, text) == (0, "")


def test_a_folder_goes_on_after_a_bad_volume(tiny, tmp_path, rng):
    for name in ("a", "b", "c"):
        (tmp_path / "in" / name).mkdir(parents=True)
        write(tmp_path / "in" / name / "flair.nii.gz", *head(rng))
    (tmp_path / "in" / "b" / "flair.nii.gz").write_bytes(b"not an image at all")
    code, text = _run("detect", tmp_path / "in", "-o", tmp_path / "out", "--weights", tiny, "--steps", 1)
    assert code == 1
    assert "b: " in text
    assert "not a NIfTI file" in text
    assert "1 of 3 volumes failed" in text
    assert text.count("not a NIfTI file") == 1
    written = sorted(p.name.split("_")[0] for p in (tmp_path / "out").glob("*_mask.nii.gz"))
    assert written == ["a", "c"]
    assert not list((tmp_path / "out").glob(".partial*"))


def test_sequences_on_other_grids_are_refused_then_resampled(tiny, tmp_path, rng):
    values, affine = head(rng)
    write(tmp_path / "flair.nii.gz", values, affine)
    write(
        tmp_path / "t1.nii.gz",
        values[::2].copy(),
        affine @ [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    )
    args = (
        "detect",
        tmp_path / "flair.nii.gz",
        tmp_path / "t1.nii.gz",
        "-o",
        tmp_path / "out",
        "--weights",
        tiny,
    )
    code, text = _run(*args)
    assert code == 1
    assert "different grids" in text
    assert "--resample" in text
    assert _run(*args, "--resample")[0] == 0


@pytest.mark.parametrize(("extra", "message"), [
    (["--threshold", "2"], "--threshold is 2.0"), (["--steps", "0"], "steps is 0"), (["--samples", "0"], "samples is 0"),
    (["--sampler", "magic"], "sampler is 'magic'"), (["--device", "tpu"], "device is 'tpu'"),
    (["--sequence", "pd"], "--sequence is 'pd'"), (["--weights", "nothing"], "no such weights"),
    (["--maps", "mask,lesion"], "--maps has 'lesion'"), (["--skull", "no"], "--skull is 'no'"),
    (["--bias", "yes"], "--bias is 'yes'"), (["--threads", "0"], "--threads is 0"),
])  # fmt: skip
def test_bad_usage_exits_with_two_and_writes_nothing(tiny, flair, tmp_path, extra, message):
    args = [
        "detect",
        flair,
        "-o",
        tmp_path / "out",
        *([] if "--weights" in extra else ["--weights", tiny]),
        *extra,
    ]
    code, text = _run(*args)
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_refused_before_the_work(tiny, flair, tmp_path):
    (tmp_path / "file").write_text("")
    code, text = _run("detect", flair, "-o", tmp_path / "file", "--weights", tiny)
    assert code == 2
    assert "is a file" in text
    assert _run("detect", flair)[0] == 2
    assert _run("detect", "-o", tmp_path / "out")[0] == 2


def test_a_missing_file_fails_like_an_unreadable_one(tiny, tmp_path):
    (tmp_path / "bad_flair.nii.gz").write_bytes(b"not an image at all")
    for name in ("nothing_flair.nii", "bad_flair.nii.gz"):
        code, text = _run("detect", tmp_path / name, "-o", tmp_path / "out", "--weights", tiny)
        assert code == 1
        assert text.count(name) == 1, "named, and once"
        assert not (tmp_path / "out").exists()


def test_info_names_every_op_and_its_backend():
    from ddmd.ops import OPS

    code, text = _run("info")
    assert code == 0
    assert all(op in text for op in OPS)
    assert "torch" in text


def test_a_command_that_loads_triton_ends_without_a_word():
    pytest.importorskip("triton", reason="Triton is not installed")
    script = (
        "import gc, sys; from ddmd.cli import entry; sys.argv = ['ddmd', 'info']\n"
        "from ddmd.cli import app\n"
        "def loaded(): app(standalone_mode=False); gc.freeze(); assert 'triton' in sys.modules\n"
        "entry.run(loaded)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_is_light_and_touches_no_gpu():
    script = (
        "import sys, ddmd; ddmd.detect; ddmd.Detector; import torch, json;"
        "heavy = [m for m in ('matplotlib', 'monai', 'typer', 'nilearn', 'accelerate', 'sklearn', 'triton.compiler')"
        " if m in sys.modules]; print(json.dumps([heavy, torch.cuda.is_initialized()]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False]


def _shell(*args, **kwargs):
    environment = {**os.environ, **kwargs.pop("env", {})}
    command = [sys.executable, "-m", "ddmd", *map(os.fspath, args)]
    return subprocess.run(command, capture_output=True, env=environment, **kwargs)


COMMANDS = ("detect", "bids", "report", "info", "phantom", "train", "evaluate")


def test_help_version_and_completion_come_without_torch():
    script = (
        "import sys\n"
        "from ddmd.cli import main\n"
        "sys.argv = ['ddmd', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = [m for m in ('torch', 'nibabel', 'scipy', 'numpy') if m in sys.modules]\n"
        "print(code, heavy)"
    )
    for args in (["--help"], ["-h"], *([name, "-h"] for name in COMMANDS), ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "0 []", args
        assert not set("<{") & set(done.stdout), "no Python types, and no braces"
    assert "--show-completion" in _run("--help")[1]


@pytest.mark.parametrize(("line", "words"), [
    ("ddmd de", {"detect"}), ("ddmd detect --sk", {"--skull", "--skip-existing"}), ("ddmd bids --participant", {"--participant-label"}),
])  # fmt: skip
def test_the_shell_completes_commands_and_options(line, words):
    variables = {
        "_DDMD_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - 1),
    }
    script = "import sys\nsys.argv = ['ddmd']\nfrom ddmd.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        check=False,
    )
    assert set(done.stdout.split()) == words, done.stderr


def test_detecting_imports_no_module_that_it_does_not_need(tiny, flair, tmp_path):
    """Of a NIfTI file: no pictures' library, compiler, web client or DICOM reader; the collector works as usual."""
    script = (
        "import gc, sys\n"
        "from ddmd.cli import main\n"
        "sys.argv = ['ddmd', 'detect', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = [m for m in HEAVY if m in sys.modules]\n"
        "print(code, heavy, gc.isenabled(), file=sys.stderr)"
    )
    heavy = (
        "matplotlib", "monai", "nilearn", "sklearn", "skimage", "pandas", "pydicom", "highdicom", "requests",
        "ray", "triton", "diffusers", "sympy", "torch._dynamo", "torch._inductor", "torch.onnx",
        "scipy.stats", "scipy.optimize", "scipy.signal", "scipy.sparse", "deepbet", "rich", "cc3d",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy!r}\n{script}", flair, "-o", tmp_path / "out", "--quiet",
         "--weights", tiny],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "0 [] True"


COLLECTOR = """
import contextlib, gc, sys
from ddmd.cli import main, startup
gc.set_threshold(900, 7, 8)
quick, seen = startup.quick_imports, set()
@contextlib.contextmanager
def seen_after():
    with quick():
        yield
    assert gc.get_freeze_count() > 0
    seen.add(gc.get_threshold())
startup.quick_imports = seen_after
try: main()
except SystemExit: pass
print(seen, gc.get_threshold(), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [
    ["detect", "{flair}", "-o", "{out}", "--weights", "{tiny}", "-q"], ["info"], ["report", "{out}"],
    ["evaluate", "{out}", "-o", "{out}"], ["train", "{out}", "-o", "{out}"], ["phantom", "{flair}"],
    ["bids", "{folder}", "{out}", "group"],
], ids=lambda arguments: arguments[0])  # fmt: skip
def test_the_garbage_collector_works_as_before_after_the_imports(tiny, flair, tmp_path, arguments):
    places = {"flair": flair, "tiny": tiny, "out": tmp_path / "out", "folder": tmp_path}
    done = subprocess.run(
        [sys.executable, "-c", COLLECTOR, *(a.format(**places) for a in arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "{(900, 7, 8)} (900, 7, 8)"


def test_pydicom_is_hidden_from_nibabel_alone():
    script = (
        "from ddmd.cli import startup\n"
        "startup.begin()\n"
        "import nibabel\n"
        "assert not nibabel.nifti1.have_dicom\n"
        "import pydicom, pydicom.encaps\n"
        "print(callable(pydicom.dcmread), callable(pydicom.encaps.generate_frames))"
    )
    pytest.importorskip("pydicom")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


LARGE_TENSOR = """
import resource
from ddmd.cli import startup
startup.begin()
import torch
torch.empty(1 << 24, dtype=torch.float32, device="cpu").fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(1 << 24, dtype=torch.float32, device="cpu").fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_large_tensors_take_large_pages_unless_the_user_says_otherwise():
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.exists() or "[never]" in choice.read_text():
        pytest.skip("this system has no transparent huge pages")
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    faults = []
    for said in ({}, {"THP_MEM_ALLOC_ENABLE": "0"}):
        command = [sys.executable, "-c", LARGE_TENSOR]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**environment, **said}
        )
        faults.append(int(done.stdout))
    if "[always]" not in choice.read_text():
        assert faults[1] > (1 << 26) // 4096 // 2, "64 MiB of small pages"
    assert faults[0] < (1 << 26) // 4096 // 4


def test_devices_have_the_names_people_use():
    names = {
        "gpu": "cuda",
        "gpu:1": "cuda:1",
        "2": "cuda:2",
        "cuda:0": "cuda:0",
        "GPU": "cuda",
        "cpu": "cpu",
        "auto": "auto",
    }
    assert {name: device_name(name) for name in names} == names
    assert device_name("gpuX") == "gpux"


@pytest.mark.parametrize("failure", [
    MemoryError(), RuntimeError("CUDA out of memory\nmany\nlines"), UnicodeEncodeError("utf-8", "\udce9", 0, 1, "no"),
    KeyError("x"), RecursionError("deep"), ZeroDivisionError("division by zero"),
], ids=lambda e: type(e).__name__)  # fmt: skip
def test_any_exception_in_a_case_is_that_cases_failure(tiny, tmp_path, rng, monkeypatch, failure):
    for name in "abc":
        (tmp_path / "in" / name).mkdir(parents=True)
        write(tmp_path / "in" / name / "flair.nii.gz", *head(rng))
    detect = Detector.detect

    def broken(self, prepared, **options):
        if prepared.volume.name == "b":
            raise failure
        return detect(self, prepared, **options)

    monkeypatch.setattr(Detector, "detect", broken)
    code, text = _run("detect", tmp_path / "in", "-o", tmp_path / "out", "--weights", tiny, "--steps", 1)
    assert code == 1
    assert f"error: b: {type(failure).__name__}" in text
    assert str(tmp_path / "in" / "b" / "flair.nii.gz") in text
    assert "Traceback" not in text
    assert sorted(p.name[0] for p in (tmp_path / "out").glob("*_result.json")) == ["a", "c"]
    code, text = _run(
        "detect", tmp_path / "in", "-o", tmp_path / "new", "--weights", tiny, "--steps", 1, "--debug"
    )
    assert (code, "Traceback" in text) == (1, True)
    os.environ.pop("DDMD_DEBUG", None)


def test_the_same_command_goes_on_where_it_was(tiny, tmp_path, rng):
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        write(tmp_path / "in" / name / "flair.nii.gz", *head(rng))
    good = (tmp_path / "in" / "b" / "flair.nii.gz").read_bytes()
    (tmp_path / "in" / "b" / "flair.nii.gz").write_bytes(good[:100])
    command = ("detect", tmp_path / "in", "-o", tmp_path / "out", "--weights", tiny, "--steps", 1)
    assert _run(*command)[0] == 1
    first = (tmp_path / "out" / "a_result.json").stat().st_mtime_ns
    (tmp_path / "in" / "b" / "flair.nii.gz").write_bytes(good)
    code, text = _run(*command)
    assert code == 0
    assert "a: done before" in text
    assert (tmp_path / "out" / "a_result.json").stat().st_mtime_ns == first
    assert read_result("b", tmp_path / "out") is not None
    for options in ((), ("--skip-existing",)):
        code, text = _run(*command, "--seed", 1, *options)
        assert code == 2, "other options give another result"
        assert "--overwrite" in text
    write(tmp_path / "in" / "a" / "flair.nii.gz", *head(rng))
    assert _run(*command)[0] == 2, "nothing is replaced unasked"
    code, text = _run(*command, "--skip-existing")
    assert code == 0
    assert "a: done before" not in text, "another image gives another result"
    assert "b: done before" in text
    assert (tmp_path / "out" / "a_result.json").stat().st_mtime_ns > first
    assert _run(*command, "--overwrite")[0] == 0


def test_maps_are_chosen_and_json_is_one_line_a_case(tiny, flair, tmp_path):
    result = runner.invoke(
        app,
        [
            "detect",
            "-i",
            flair,
            "-o",
            str(tmp_path / "out"),
            "--weights",
            tiny,
            "--maps",
            "mask, labels",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    said = json.loads(line)
    assert said["Name"] == "p1"
    assert set(said["Files"]) == {"mask", "labels", "lesions", "overlay", "result"}
    assert all(Path(path).is_file() for path in said["Files"].values())
    facts = json.loads(runner.invoke(app, ["info", "--json"]).stdout)
    assert set(facts["ops"]["noise"]) == {"cpu", "cuda", "reasons"}
    assert "flair-image-labels" in facts["weights"]


@pytest.mark.parametrize(
    "name", ["a[/b]", "a[red]b", "p$^$", "a\nb", os.fsdecode(b"p\xe9ter"), "-x", "\u202exyz", "\x1b[31mred"]
)
def test_names_are_shown_safely_and_written(tiny, tmp_path, rng, name):
    folder = tmp_path / "in [x]"
    folder.mkdir()
    path = folder / f"{name}_flair.nii.gz"
    path.parent.mkdir(exist_ok=True)  # a[/b] has a folder in it
    write(tmp_path / "plain.nii.gz", *head(rng))
    (tmp_path / "plain.nii.gz").rename(path)
    args = ["detect", "--weights", tiny, "--steps", "1", "--output"]
    done = runner.invoke(app, [*args, str(tmp_path / "o [bold]"), "--", str(path)])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert str(tmp_path / "o [bold]") in done.stdout
    assert len(list((tmp_path / "o [bold]").glob("*_result.json"))) == 1
    path.write_bytes(b"")
    done = runner.invoke(app, [*args, str(tmp_path / "other"), "--", str(path)])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert console.printable(path) in line


def test_any_encoding_of_the_terminal_takes_the_output(tiny, tmp_path, rng):
    path = write(tmp_path / "患者_flair.nii.gz", *head(rng))
    done = _shell(
        "detect",
        path,
        "-o",
        tmp_path / "out",
        "--weights",
        tiny,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_a_closed_pipe_is_no_error(tiny, flair, tmp_path):
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ddmd", "detect", flair, "-o", str(tmp_path / "out"), "--weights", tiny]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")
    assert read_result("p1", tmp_path / "out") is not None


HEEDS_SIGNALS = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup or in the background, where they
signal.signal(signal.SIGINT, signal.default_int_handler)  # are ignored, and what is ignored is inherited
"""
SAVES_UNTIL_A_SIGNAL = (
    HEEDS_SIGNALS
    + """
import os, select, sys
from ddmd.io import atomic
came, wakes = os.pipe()
os.set_blocking(wakes, False)
signal.set_wakeup_fd(wakes)
create = atomic._create
def slow(path, content=b""):
    mode = create(path, content)
    if "journal" not in path.name:
        print("writing", flush=True)
        select.select([came], [], [], 30)
    return mode
atomic._create = slow
sys.argv = ["ddmd", *sys.argv[1:]]
from ddmd.cli import main
main()
"""
)


@pytest.mark.parametrize(("number", "word"), [
    (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP"), (signal.SIGINT, "interrupted"),
])  # fmt: skip
def test_a_signal_while_saving_leaves_nothing_half_done(tiny, flair, tmp_path, number, word):
    command = [
        sys.executable,
        "-c",
        SAVES_UNTIL_A_SIGNAL,
        "detect",
        flair,
        "-o",
        str(tmp_path / "out"),
        "--weights",
        tiny,
        "-q",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("writing")  # of several threads
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = err.splitlines()
    assert word in line
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert not left or read_result("p1", tmp_path / "out") is not None, "all or nothing"
    assert not any(name.startswith(".") for name in left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("when", ["startup.end = late", "atexit.register(late)"])
def test_a_signal_at_the_very_end_is_not_swallowed(number, when):
    script = (
        "import atexit, os, sys, time\n"
        "from ddmd.cli import main, startup\n"
        f"def late(): os.kill(os.getpid(), {int(number)}); time.sleep(0.01)\n"
        f"{when}\n"
        "sys.argv = ['ddmd', '--version']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", HEEDS_SIGNALS + script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (-number, "")


STOPPED_TRAINING = """
import os, sys
number = int(sys.argv.pop(1))
from ddmd.training import loop
train_step = loop.train_step
def stopped(model, optimizer, batch, stage):
    if stage.step == 1:
        os.kill(os.getpid(), number)
    return train_step(model, optimizer, batch, stage)
loop.train_step = stopped
sys.argv[0] = "ddmd"
from ddmd.cli import main
main()
"""
TINY_TRAINING = """
name = "tiny"
size = 64
test = 0.25
validation = 0.0
[[data]]
root = "set"
[autoencoder]
members = 2
width = 4
code = 2
[denoiser]
widths = [8, 8, 8, 8]
noise_width = 8
mirrored = true
[autoencoder_stage]
steps = 3
batch = 4
[denoiser_stage]
steps = 3
batch = 2
rounds = []
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_that_a_signal_stops_exits_with_its_number_and_goes_on_later(tmp_path, rng, number):
    pytest.importorskip("accelerate", reason="the extra ddmd[train] is not installed")
    pytest.importorskip("tensorboard", reason="the extra ddmd[train] is not installed")
    write_slices(tmp_path / "set", rng, 4)
    (tmp_path / "tiny.toml").write_text(TINY_TRAINING)
    arguments = ["train", "tiny.toml", "-o", "run"]
    command = [sys.executable, "-c", STOPPED_TRAINING, str(int(number)), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert "stopped at step 2 of autoencoders_a" in done.stderr
    assert not list(tmp_path.glob("run/*.safetensors.partial"))
    assert _shell(*arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run" / "tiny.safetensors").is_file()


def test_detect_and_bids_share_their_options():
    group = typer.main.get_command(app)
    options = {
        name: {o for p in group.commands[name].params for o in p.opts if o.startswith("--")}
        for name in ("detect", "bids")
    }
    assert options["detect"] - options["bids"] == {
        "--output",
        "--input",
        "--sequence",
        "--brain",
        "--dicom-seg",
    }
    assert options["bids"] - options["detect"] == {"--participant-label", "--session-label"}
    assert len(options["detect"] & options["bids"]) == len(dataclasses.fields(CohortSettings))


def test_a_command_without_its_extra_names_it(tmp_path, flair):
    script = (
        "import sys\n"
        "for name in ('accelerate', 'tensorboard', 'monai', 'sklearn', 'nilearn'): sys.modules[name] = None\n"
        "sys.argv = ['ddmd', *sys.argv[1:]]\n"
        "from ddmd.cli import main\nmain()"
    )
    (tmp_path / "c.toml").write_text("")
    for args, extra in (
        (["train", str(tmp_path / "c.toml"), "-o", str(tmp_path / "run")], "ddmd[train]"),
        (["evaluate", str(tmp_path), "-o", str(tmp_path / "evaluation")], "ddmd[evaluate]"),
        (["phantom", str(tmp_path / "phantom")], "ddmd[phantom]"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], capture_output=True, text=True, check=False
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert extra in line


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams_cost_nothing(tiny, flair, tmp_path, closed):
    out = tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "ddmd",
        "detect",
        flair,
        "-o",
        str(out),
        "--weights",
        tiny,
        "--samples",
        "1",
    ]
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_result("p1", out) is not None


def test_more_threads_than_a_machine_has_are_refused(tiny, flair, tmp_path):
    for threads in (0, -1, 257, 100_000):
        code, text = _run("detect", flair, "-o", tmp_path, "--weights", tiny, "--threads", threads)
        assert (code, "allowed are 1 to 256" in text) == (2, True), text


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect", "FLAIR", "-o", ""], ["detect", "", "-o", "out"], ["detect", "FLAIR", "--output="], ["report", ""],
        ["evaluate", "FLAIR", "-o", ""], ["", "out", "participant"], ["bids", "in", "", "participant"],
    ],
    ids=str,
)  # fmt: skip
def test_an_empty_argument_is_not_the_working_directory(flair, tmp_path, monkeypatch, arguments):
    """As a shell gives it for a variable that is not set."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write("here_flair.nii.gz", *(nib.load(flair).get_fdata(), nib.load(flair).affine))
    code, text = _run(*(flair if a == "FLAIR" else a for a in arguments))
    assert code == 2
    assert "an argument is empty" in text
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["here_flair.nii.gz"]


@pytest.mark.parametrize("wrong", [["--spacing", 0], ["--spacing", "nan"], ["--seed", -1]], ids=str)
def test_wrong_options_of_a_phantom_are_bad_usage(tmp_path, wrong):
    code, text = _run("phantom", tmp_path / "out", *wrong)
    assert code == 2
    assert "allowed" in text
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert _run("phantom", tmp_path / "file")[0] == 2


def test_numbers_of_parts_of_thousands_of_digits_are_bad_usage(flair, tmp_path):
    code, text = _run("detect", flair, "-o", tmp_path / "out", "--part", "9" * 5000 + "/1")
    assert code == 2
    assert "write i/n" in text
