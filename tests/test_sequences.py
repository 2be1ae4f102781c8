"""Which sequence the name of a file says it is."""

import pytest

from ddmd.io.sequences import SEQUENCES, is_other_modality, sequence_of, stem

NAMES = {
    "flair": """BraTS20_Training_001_flair BraTS-GLI-00001-000-t2f sub-01_FLAIR sub-01_acq-3D_FLAIR
        sub-02_ses-1_run-1_FLAIR sub-x_FLAIR_brain sub-01_space-T1w_FLAIR sub-01_acq-darkfluid_T2w
        sub-01_acq-dwi_FLAIR flair FLAIR t2_flair T2-FLAIR ax_t2_flair AX_FLAIR_FS 3DFLAIR sag_3d_flair_cube
        dark-fluid darkfluid tirm t2_tirm_tra_dark-fluid t2_tirm_dark-fluid space_dark-fluid t2_space_dark-fluid
        t2_spc_da-fl_sag t2_space_flair t2_tra_flair_p2 flair_to_t1 FLAIR_brain flair_n4 flair_3d_tra_p2 swi_study_p3_flair""",
    "t1ce": """BraTS20_Training_001_t1ce BraTS-GLI-00001-000-t1c sub-01_ses-2_ce-GAD_T1w sub-01_ce-gadovist_T1w
        ce-GAD_T1w T1ce t1c t1-post t1_gd t1gd t1_km T1+C t1_mprage_gd t1_mprage_post_contrast mprage_post
        t1_ce_brain""",
    "t2": """BraTS20_Training_001_t2 BraTS-GLI-00001-000-t2w sub-01_T2w sub-01_acq-tse_T2w sub-01_space-FLAIR_T2w
        t2 T2w t2_tse_tra t2_brain t2_to_flair ax_t2 T2_TSE t2_space""",
    "t1": """BraTS20_Training_001_t1 BraTS-GLI-00001-000-t1n sub-01_T1w sub-01_ce-none_T1w t1 T1w t1_mprage_sag
        mprage mprage_sag t1_flair t1-FLAIR T1_in_flair t1_pre_contrast t1_precontrast 3DT1 ax_t1_se t1_postop
        t1_post_op""",
    "other": """t2star T2starw sub-01_T2starw T2_star t2* t2s t2-star_tra t2gre T2_GRE t2_fl2d_tra_hemo PDw
        sub-01_PDw ax_pd pd_tse_tra t2_tse_pd sub-01_PDT2 swi t2_swi_3d SWI_mag tof_3d bold sub-1_task-rest_bold
        asl dwi ep2d_diff_tra sub-01_dir-AP_epi adc magnitude sub-01_magnitude1 phase fieldmap sub-01_T1map
        sub-01_T2map t1_map sub-01_UNIT1 CT pet sub-01_part-phase_FLAIR sub-01_acq-T2star_T2w""",
    None: "x scan image head brain patient_12 patientT1 at2lanta t1_t2_brain lesion_on_flair_grid",
}


@pytest.mark.parametrize(("expected", "name"), [(s, n) for s, names in NAMES.items() for n in names.split()])
def test_name_gives_the_sequence_or_another_modality(expected, name):
    for path in (f"{name}.nii.gz", f"folder_flair/{name.upper()}.NII", f"/t1/{name}.hdr.gz"):
        assert sequence_of(path) == (expected if expected in SEQUENCES else None)
        assert is_other_modality(path) == (expected == "other")


def test_stem_has_no_extension_of_an_image():
    for extension in (
        "nii",
        "nii.gz",
        "nii.bz2",
        "nii.zst",
        "hdr",
        "img",
        "hdr.gz",
        "img.gz",
        "mgz",
        "nrrd",
        "NII.GZ",
    ):
        assert stem(f"folder/a.b_flair.{extension}") == "a.b_flair"
    assert stem("a.gz") == "a.gz"


@pytest.mark.parametrize("number", ["2", "02", "12", "3"])
@pytest.mark.parametrize("separator", "-_. ")
def test_a_patients_number_is_no_word_of_the_name(number, separator):
    for word, sequence in (
        ("FLAIR", "flair"),
        ("t2f", "flair"),
        ("T1", "t1"),
        ("t1c", "t1ce"),
        ("t2w", "t2"),
    ):
        name = separator.join(("patient", number, word)) + ".nii.gz"
        assert sequence_of(name) == sequence, name
    assert sequence_of(f"patient{separator}{number}{separator}t1{separator}2{separator}flair.nii.gz") == "t1"
    assert sequence_of(f"patient{separator}{number}{separator}dwi{separator}2{separator}flair.nii.gz") is None
