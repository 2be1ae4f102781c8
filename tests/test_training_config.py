"""What a configuration of a training run promises: recipes, mistakes in one line, names of 0.1."""

from pathlib import Path

import pytest

import ddmd.training
from ddmd.training.config import read_config


@pytest.mark.parametrize(
    "path", sorted((Path(ddmd.training.__file__).parent / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_configurations_read_and_hold_the_same_patients_out(path):
    config = read_config(path)
    assert config.labels == ("pixel" if path.stem in ("flair-pixel-labels", "supervised") else "image")
    left_out = {"brats2013-pat0005", "brats2013-pat0006", "ms-patient26", "healthy-kirby113"}
    assert left_out <= set(config.holdout)
    split_seed = config.seed if config.split_seed is None else config.split_seed
    assert (split_seed, config.validation, config.test) == (0, 0.1, 0.2), "the split of the runs before"


GOOD = """
name = "tiny"
labels = "image"
seed = 0
size = 64
checkpoint_minutes = 0.1
[[data]]
root = "data/lgg"
name = "lgg"
[autoencoder]
width = 8
[autoencoder_stage]
steps = 12
batch = 4
[denoiser]
noise_width = 16
mirrored = true
[denoiser_stage]
steps = 20
batch = 6
rounds = [0.3, 0.6]
share_normal = 0.12
"""


MISTAKES = {  # what is replaced, by what, and the entry that the message names
    "name leaves the folder": ('"tiny"', '"../../escaped"', "name"),
    "name is a path": ('"tiny"', '"/escaped"', "name"),
    "name has a folder": ('"tiny"', '"a/b"', "name"),
    "name has a backslash": ('"tiny"', "'a\\\\b'", "name"),
    "name is hidden": ('"tiny"', '".tiny"', "name"),
    "name has a line": ('"tiny"', '"tiny\\n"', "name"),
    "name is empty": ('"tiny"', '""', "name"),
    "name is a number": ('"tiny"', "3", "name"),
    "labels": ('"image"', '"voxel"', "labels"),
    "steps is text": ("steps = 12", "steps = 'x'", "steps"),
    "steps is a fraction": ("steps = 12", "steps = 1.5", "steps"),
    "steps is true": ("steps = 12", "steps = true", "steps"),
    "steps is 0": ("steps = 12", "steps = 0", "steps is 0 in AutoencoderStage"),
    "batch is 0": ("batch = 4", "batch = 0", "batch"),
    "batch is negative": ("batch = 4", "batch = -1", "batch"),
    "batch is huge": ("batch = 4", "batch = 1000000000", "batch"),
    "size is text": ("size = 64", "size = 'x'", "size"),
    "size is 0": ("size = 64", "size = 0", "size"),
    "size is 72": ("size = 64", "size = 72", "size is 72; allowed are multiples of 16"),
    "seed is negative": ("seed = 0", "seed = -1", "seed"),
    "data is a table": ("[[data]]", "[data]", "data"),
    "data is a number": ('[[data]]\nroot = "data/lgg"\nname = "lgg"', "data = 3", "data"),
    "width is 0": ("width = 8", "width = 0", r"\[autoencoder\] width is 0"),
    "width is huge": ("width = 8", "width = 1000000", r"\[autoencoder\] width is 1000000"),
    "noise_width is 0": ("noise_width = 16", "noise_width = 0", "noise_width"),
    "widths are 3": ("noise_width = 16", "widths = [8, 8, 8]", "widths"),
    "rounds is a number": ("[0.3, 0.6]", "0.3", "rounds"),
    "rounds is text": ("[0.3, 0.6]", "['x']", "rounds"),
    "rounds is nan": ("[0.3, 0.6]", "[nan]", "rounds"),
    "rounds fall": ("[0.3, 0.6]", "[0.6, 0.3]", "rounds"),
    "limits fall": ("[0.3, 0.6]", "[0.3, 0.6]\npseudo_mask_limits = [0.9, 0.1]", "pseudo_mask_limits"),
    "kinds are 6": ("[autoencoder]", "[painter]\nkinds = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]\n[autoencoder]", "kinds"),
    "kinds are 0": ("[autoencoder]", "[painter]\nkinds = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]\n[autoencoder]", "kinds"),
    "a size falls": ("[autoencoder]", "[painter]\nlarge_mm = [9.0, 3.0]\n[autoencoder]", "large_mm"),
    "a size is 0": ("[autoencoder]", "[painter]\nlarge_mm = [0.0, 3.0]\n[autoencoder]", "large_mm"),
    "rounds are equal": ("[0.3, 0.6]", "[0.3, 0.3]", "rounds"),
    "an angle in degrees": ("[autoencoder]", "[painter]\nterritory_width = [8.0, 45.0]\n[autoencoder]", "territory_width"),
    "places are more than all": ("[autoencoder]", "[painter]\nperiventricular = 0.7\njuxtacortical = 0.4\n[autoencoder]", "periventricular"),
    "a chance is 2": ("[autoencoder]", "[painter]\nfaint = 2.0\n[autoencoder]", "faint"),
    "an entry of the painter is not known": ("[autoencoder]", "[painter]\nspeed = 3\n[autoencoder]", "speed not known"),
    "a share is negative": ("share_normal = 0.12", "share_normal = -1.0", "share_normal"),
    "a share is nan": ("share_normal = 0.12", "share_normal = nan", "share_normal"),
    "all shares are 0": ("share_normal = 0.12", "share_normal = 0.0\nshare_painted = 0.0\nshare_painted_beside = 0.0\nshare_masked = 0.0", "share"),
    "root is a number": ('root = "data/lgg"', "root = 3", "root"),
    "weight is nan": ('name = "lgg"', "weight = nan", "weight"),
    "weight is 0": ('name = "lgg"', "weight = 0.0", "weight"),
    "an entry is not known": ("seed = 0", "seed = 0\nspeed = 3", "speed not known"),
    "an entry of a section is not known": ("width = 8", "width = 8\nspeed = 3", "speed not known"),
    "a section is a number": ("[autoencoder]\nwidth = 8", "", None),
    "validation is 2": ("seed = 0", "validation = 2.0", "validation"),
    "nobody is left": ("seed = 0", "validation = 0.5\ntest = 0.5", "validation and test"),
    "holdout is text": ("seed = 0", "holdout = 'x'", "holdout"),
    "sequences is text": ("seed = 0", "sequences = 'flair'", "sequences"),
    "mm is 0": ("seed = 0", "mm = 0.0", "mm"),
    "precision": ("seed = 0", "precision = 'x'", "precision"),
    "checkpoint_minutes is text": ("checkpoint_minutes = 0.1", "checkpoint_minutes = 'x'", "checkpoint_minutes"),
    "learning_rate is nan": ("batch = 4", "learning_rate = nan", "learning_rate"),
    "learning_rate is huge": ("batch = 4", "learning_rate = 1e30", "learning_rate"),
    "samples is 0": ("[autoencoder]", "[sampling]\nsamples = 0\n[autoencoder]", "samples"),
    "sampler": ("[autoencoder]", "[sampling]\nsampler = 'x'\n[autoencoder]", "sampler"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_configuration_are_named_in_one_line(tmp_path, old, new, named):
    path = tmp_path / "bad.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    if named is None:
        read_config(path)
        return
    with pytest.raises(ValueError, match=named) as raised:
        read_config(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"= 3", b"\0", b"\xff\xfe", b"a = " + b"[" * 5000, None, b""], ids=range(6)
)
def test_what_is_no_toml_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match="not TOML|data") as raised:
        read_config(path)
    assert str(raised.value).startswith(str(path))


def test_entries_of_0_1_keep_working_with_a_warning(tmp_path):
    path = tmp_path / "old.toml"
    old = "normal = 0.1\npainted = 0.2\ncarved = 0.3\nover = 0.4\nmasked = 0.5\nbag = 0.0\ndoubt = false"
    path.write_text(("workers = 0\n" + GOOD).replace("share_normal = 0.12", old))
    with pytest.warns(FutureWarning, match="carved is now share_transplanted"):
        stage = read_config(path).denoiser_stage
    assert (stage.share_normal, stage.share_painted, stage.share_transplanted) == (0.1, 0.2, 0.3)
    assert (stage.share_painted_beside, stage.share_masked) == (0.4, 0.5)
    assert (stage.bag_weight, stage.teacher_uncertainty) == (0.0, False)


def test_edges_need_rounds_of_image_level_labels(tmp_path):
    path = tmp_path / "edges.toml"
    good = GOOD.replace("share_normal = 0.12", "share_normal = 0.12\nfollow_edges = true", 1)
    path.write_text(good)
    assert read_config(path).denoiser_stage.follow_edges
    for wrong in (good.replace('"image"', '"pixel"'), good.replace("[0.3, 0.6]", "[]")):
        assert wrong != good
        path.write_text(wrong)
        with pytest.raises(ValueError, match="follow_edges") as raised:
            read_config(path)
        assert "\n" not in str(raised.value)
