"""Scans on the disk: what is read, in which geometry, and what is refused."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

from monai_conres.files import write_label_map
from monai_conres.scans import ScanSettings
from monai_conres.volumes import (
    HEADER,
    LoadScand,
    check_same_grid,
    find_files,
    find_series,
    load_label,
    load_volume,
    read_grid,
    voxel_sizes,
)
from tests.nih import ORIGIN, SPACING, write_series

SIZE = (4, 5, 6)
AFFINE = np.array([[0, -2.0, 0, 17], [1.5, 0, 0, -8], [0, 0, 3.0, 9], [0, 0, 0, 1]])
SHEARED = AFFINE + np.array([[0, 0, 0.6, 0], [0] * 4, [0] * 4, [0] * 4])


def write(file: Path, sform=AFFINE, qform=None, *, codes=(1, 0), unit="mm", pixdim=None, values=0.0, size=SIZE) -> Path:
    """A NIfTI file with the forms, codes (of sform and qform), unit and pixdim of an inconsistent header."""
    header = nib.Nifti1Header()
    for form, set_form in ((qform, header.set_qform), (sform, header.set_sform)):
        if form is not None:
            set_form(form, code=1)
    image = nib.Nifti1Image(np.full(size, values, np.float32), None, header)
    image.header.set_xyzt_units(unit)
    content = bytearray(image.to_bytes())
    header = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)[0]  # nibabel repairs what it saves
    header["sform_code"], header["qform_code"] = codes
    header["pixdim"][1:4] = (1.5, 2.0, 3.0) if pixdim is None else pixdim
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    return file


def moved(affine: np.ndarray, *shift: float) -> np.ndarray:
    return affine + np.array([[0, 0, 0, number] for number in (*shift, 0)])


def turned(degrees: float) -> np.ndarray:
    """AFFINE, turned around the patient's long axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ AFFINE


# NIfTI: what a header may say


ACCEPTED = {
    "sform": {},
    "sform of a template": {"codes": (4, 0)},
    "qform": {"sform": None, "qform": AFFINE, "codes": (0, 1)},
    "neither": {"codes": (0, 0)},
    "neither, but numbers in both": {"qform": moved(AFFINE, 9, 9, 9), "codes": (0, 0)},
    "both": {"qform": AFFINE, "codes": (1, 1)},
    "both, 0.05 voxels apart": {"qform": moved(AFFINE, 0.1, 0, 0), "codes": (2, 1)},
    "a qform that does not count": {"qform": moved(AFFINE, 50, 0, 0), "codes": (1, 0)},
    "sheared": {"sform": SHEARED, "pixdim": np.linalg.norm(SHEARED[:3, :3], axis=0)},
    "micrometres": {"unit": "micron"},
    "micrometres in a qform": {"sform": None, "qform": AFFINE, "codes": (0, 1), "unit": "micron"},
    "meters": {"unit": "meter"},
    "no unit": {"unit": "unknown"},
    "one slice": {"size": (4, 5, 1)},
    "two dimensions": {"size": (4, 5)},
}


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_geometry_is_that_of_the_header(tmp_path, arguments):
    file = write(tmp_path / "scan.nii.gz", **arguments)
    expected = nib.load(file).affine
    expected[:3] *= {"micron": 0.001, "meter": 1000}.get(arguments.get("unit"), 1)
    grid, volume = read_grid(file), load_volume(file)
    np.testing.assert_allclose(grid.affine, expected, rtol=1e-6)
    np.testing.assert_allclose(volume.affine, expected, rtol=1e-6)
    assert volume.shape == (1, *grid.shape) == (1, *(*arguments.get("size", SIZE), 1)[:3])
    assert volume.dtype == torch.float32


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_label_map_has_the_header_of_the_scan(tmp_path, arguments):
    file = write(tmp_path / "scan.nii.gz", **arguments)
    scan = load_volume(file)
    write_label_map(tmp_path / "mask.nii.gz", torch.ones(1, *scan.shape[1:]), scan)
    before, after = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("scan", "mask"))
    names = ["qform_code", "sform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d"]
    names += ["qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"]
    for name in names:
        np.testing.assert_array_equal(after.header[name], before.header[name], err_msg=name)
    np.testing.assert_array_equal(after.header["pixdim"][:4], before.header["pixdim"][:4])
    assert after.shape == scan.shape[1:]
    check_same_grid([file, tmp_path / "mask.nii.gz"])


@pytest.mark.parametrize("name", [name for name in ACCEPTED if name not in ("sheared", "two dimensions")])
def test_itk_puts_the_label_map_on_the_scan(tmp_path, name):
    """SimpleITK refuses a sheared scan itself."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    file = write(tmp_path / "scan.nii.gz", **ACCEPTED[name])
    scan = load_volume(file)
    write_label_map(tmp_path / "mask.nii.gz", torch.ones(1, *scan.shape[1:]), scan)
    before, after = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("scan", "mask"))
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(after, get)(), getattr(before, get)(), rtol=1e-6, atol=1e-9)


def test_label_map_on_other_voxels_has_their_geometry(tmp_path):
    """A resampled or turned prediction does not lie on the voxels of the file."""
    scan = load_volume(write(tmp_path / "scan.nii.gz", codes=(4, 0), unit="micron"))
    for affine in (np.diag([1.0, 1.0, 2.0, 1.0]), SHEARED):
        like = MetaTensor(torch.zeros(1, 7, 8, 9), affine=torch.from_numpy(affine), meta={HEADER: scan.meta[HEADER]})
        write_label_map(tmp_path / "mask.nii.gz", torch.ones(1, 7, 8, 9), like)
        written = nib.load(tmp_path / "mask.nii.gz")
        np.testing.assert_allclose(written.affine, affine, atol=1e-6)
        assert (int(written.header["sform_code"]), written.header.get_xyzt_units()[0]) == (4, "mm")
        read_grid(tmp_path / "mask.nii.gz")  # qform and sform agree


REFUSED = {
    "forms 24 mm apart": ({"qform": moved(AFFINE, 24, 0, 0), "codes": (1, 1)}, r"by sform and qform.*12 voxels.*sform"),
    "forms turned": ({"qform": turned(30), "codes": (1, 1)}, "by sform and qform"),
    "forms mirrored": ({"qform": AFFINE @ np.diag([-1, 1, 1, 1]), "codes": (2, 1)}, "by sform and qform"),
    "forms 0.2 voxels apart": ({"qform": moved(AFFINE, 0, 0, 0.6), "codes": (1, 1)}, r"up to 0\.2 voxels"),
    "a sheared sform and a qform": (
        {"sform": SHEARED, "qform": AFFINE, "codes": (1, 1), "pixdim": np.linalg.norm(SHEARED[:3, :3], axis=0)},
        "by sform and qform",
    ),
    "other pixdim": ({"pixdim": (3.0, 2.0, 3.0)}, r"one voxel size, got \[1\.5, 2\.0, 3\.0\] .* and \[3\.0"),
    "no pixdim": ({"codes": (0, 0), "pixdim": (1.5, 2.0, 0.0)}, "one voxel size"),
    "an unknown code": ({"codes": (9, 0)}, r"codes of sform and qform from 0 to 5, got \[9, 0\]"),
    "flat": ({"sform": AFFINE @ np.diag([1, 1, 0, 1])}, "an affine of three axes"),
    "NaN": ({"sform": AFFINE * np.nan}, "an affine of three axes"),
    "one axis": ({"size": (4,)}, "a volume"),
    "time and channels": ({"size": (4, 5, 6, 2, 2)}, r"a volume, .*got the shape \(4, 5, 6, 2, 2\)"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_contradictory_headers_are_refused(tmp_path, arguments, message):
    file = write(tmp_path / "scan.nii.gz", **arguments)
    for read in (read_grid, load_volume, lambda file: LoadScand("image")({"image": file})):
        with pytest.raises(ValueError, match=rf"expected .*{message}.* in the header of .*scan\.nii\.gz; repair"):
            read(file)


def test_unit_of_a_header_must_exist(tmp_path):
    file = write(tmp_path / "scan.nii")
    content = bytearray(file.read_bytes())
    content[123] = 5  # xyzt_units
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a unit of mm, meters or micrometres, got the code 5 in the header of"):
        read_grid(file)


@pytest.mark.parametrize("ending", ["mgz", "png", "nrrd"])
def test_other_formats_are_refused_by_name(tmp_path, ending):
    file = tmp_path / f"scan.{ending}"
    nib.save(nib.MGHImage(np.zeros(SIZE, np.float32), np.eye(4)), tmp_path / "scan.mgz")
    shutil.copy(tmp_path / "scan.mgz", file) if ending != "mgz" else None
    with pytest.raises(ValueError, match=rf"NIfTI file, cannot read .*scan\.{ending} .*convert the scan to \.nii\.gz"):
        load_volume(file)


def test_every_real_pair_is_accepted(real_data):
    pairs = [(image, image.parent.parent / "labelsTr" / image.name) for image in real_data.glob("*/imagesTr/*.nii.gz")]
    pairs += [(file, file.with_name(file.name.replace("_flair", "_seg"))) for file in real_data.rglob("*_flair.nii.gz")]
    assert len(pairs) == 336
    for pair in pairs:
        check_same_grid(pair)


# voxels


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_voxels_are_those_of_nibabel(tmp_path, kind):
    stored = np.random.default_rng(0).integers(0, 200, (*SIZE, 2)).astype(kind)
    image = nib.Nifti1Image(stored, AFFINE, nib.Nifti1Header(endianness=">" if str(kind).startswith(">") else "<"))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(np.moveaxis(volume.numpy(), 0, -1), nib.load(tmp_path / "scan.nii.gz").get_fdata())
    expected = LoadImage(reader="NibabelReader", ensure_channel_first=True)(tmp_path / "scan.nii.gz")
    torch.testing.assert_close(volume.as_tensor(), expected.as_tensor(), rtol=0, atol=0)
    np.testing.assert_array_equal(volume.affine, expected.affine)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e30, np.finfo(np.float32).min, 1e20, 1e9])
def test_voxels_without_data_are_refused(tmp_path, value):
    values = np.zeros(SIZE, np.float32)
    values[1, 2, 3] = value
    file = write(tmp_path / "scan.nii.gz", values=values)
    message = r"finite numbers in .*scan\.nii\.gz, below 1e\+09 in size, got .* in 1 voxels; give voxels without data"
    for read in (load_volume, lambda file: LoadScand("label")({"label": file})):
        with pytest.raises(ValueError, match=message):
            read(file)
    load_volume(write(file, values=-32768.0))


@pytest.mark.parametrize("kind", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_voxels_must_be_single_numbers(tmp_path, kind):
    nib.save(nib.Nifti1Image(np.zeros(SIZE, kind), AFFINE), tmp_path / "scan.nii")
    with pytest.raises(ValueError, match=r"cannot read .*scan\.nii .*one number in each voxel"):
        load_volume(tmp_path / "scan.nii")


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, ending, share):
    values = np.random.default_rng(0).normal(size=SIZE)
    file = write(tmp_path / f"scan.{ending}", values=values)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"cannot read .*scan\.nii.*fetch it again"):
        load_volume(file)


def test_label_has_one_channel_and_known_values(tmp_path):
    file = write(tmp_path / "label.nii.gz", values=4)
    assert load_label(file, {0, 4}).shape == (1, *SIZE)
    with pytest.raises(ValueError, match=r"the values \[0, 1\] in .*label\.nii\.gz, got \[4\.0\]"):
        load_label(file, {0, 1})
    with pytest.raises(ValueError, match=r"one channel in .*label\.nii\.gz, got 2"):
        load_label(write(file, size=(*SIZE, 2)), {0})


@pytest.mark.parametrize("value", [0.99999, 1.0009, 2.9999])
def test_label_of_scaled_numbers_is_read_as_whole_ones(tmp_path, value):
    """A plain conversion to whole numbers makes 0 of 0.99999."""
    file = write(tmp_path / "label.nii.gz", values=value)
    assert load_label(file).unique().tolist() == load_label(file, {1, 3}).unique().tolist() == [round(value)]
    assert LoadScand(["image", "label"])({"image": file, "label": file})["label"].unique().tolist() == [round(value)]
    assert load_volume(file).unique().tolist() == [np.float32(value)]


@pytest.mark.parametrize("value", [-1, 256])
def test_label_of_more_than_eight_bits_is_refused(tmp_path, value):
    """As 8-bit numbers they would be other classes."""
    file = write(tmp_path / "label.nii.gz", values=value)
    with pytest.raises(ValueError, match=rf"the values 0 to 255 in .*label\.nii\.gz, got \[{value}\.0\]"):
        LoadScand("label")({"label": file})


@pytest.mark.parametrize("value", [0.5, 1.01, 254.9])
def test_resampled_label_is_refused_wherever_it_is_loaded(tmp_path, value):
    file = write(tmp_path / "label.nii.gz", values=value)
    scans = ScanSettings(channels=["T1"], patch_size=[4, 4, 4], classes={"a": [1]}, activation="sigmoid")
    for load in (
        lambda: load_label(file),
        lambda: LoadScand("label")({"label": file}),
        lambda: scans.preprocessing(label=True)({"image": file, "label": file}),
    ):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            load()
        error = str(caught.value.__cause__ if type(caught.value) is RuntimeError else caught.value)
        assert re.search(rf"whole numbers in the label .*label\.nii\.gz, got {value:g}; .*nearest neighbor", error)


@pytest.mark.parametrize(("name", "right"), [("scan.nii", "scan.nii.gz"), ("scan.nii.gz", "scan.nii")])
def test_wrong_ending_of_a_compressed_file_is_named(tmp_path, name, right):
    write(tmp_path / right).rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"cannot read .*{name} .*; it is .*compressed.*rename it to {right}\.$"):
        load_volume(tmp_path / name)


def test_scale_of_the_voxels_must_be_finite(tmp_path):
    file = write(tmp_path / "scan.nii")
    content = bytearray(file.read_bytes())
    np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)["scl_slope"][0] = np.inf
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a finite scale of the voxels, got inf and .* in the header of .*scan\.nii"):
        read_grid(file)


def test_channels_of_one_image_may_differ_by_rounding(tmp_path):
    """MONAI's loader refuses affines that differ by 1e-7."""
    files = [write(tmp_path / "a.nii", values=1), write(tmp_path / "b.nii", moved(AFFINE, 1e-4, 0, 0), values=2)]
    volume = load_volume(files)
    assert volume.amax((1, 2, 3)).tolist() == [1, 2]
    np.testing.assert_array_equal(volume.affine, AFFINE)
    with pytest.raises(ValueError, match=r"same affine in .*a\.nii and .*c\.nii, got corners that lie up to 0\.5"):
        load_volume([*files, write(tmp_path / "c.nii", moved(AFFINE, 1, 0, 0))])


@pytest.mark.parametrize("other", [moved(AFFINE, 50, 0, 0), turned(30), AFFINE @ np.diag([1, -1, 1, 1])])
def test_scans_and_labels_load_only_from_one_grid(tmp_path, other):
    case = {"image": write(tmp_path / "scan.nii.gz"), "label": write(tmp_path / "label.nii.gz", other)}
    scans = ScanSettings(channels=["T1"], patch_size=[8, 8, 8], classes={"core": [1]}, activation="softmax")
    with pytest.raises(ValueError, match=r"same affine in .*scan\.nii\.gz and .*label\.nii\.gz"):
        LoadScand(["image", "label"])(case)
    with pytest.raises(RuntimeError) as caught:
        scans.preprocessing(label=True)(case)
    assert "same affine in" in str(caught.value.__cause__)
    write(tmp_path / "label.nii.gz", size=(4, 5, 7))
    with pytest.raises(ValueError, match=r"same size in .*\(4, 5, 6\) and \(4, 5, 7\)"):
        LoadScand(["image", "label"])(case)


def test_missing_image_of_nnunet_is_found_by_its_name(tmp_path):
    write(tmp_path / "case_0000.nii.gz")
    with pytest.raises(ValueError, match=r"case\.nii\.gz, found none; there is case_0000\.nii\.gz: nnU-Net adds _0000"):
        load_volume(tmp_path / "case.nii.gz")
    write(tmp_path / "other.nii.gz")
    with pytest.raises(ValueError, match=r"other_0000\.nii\.gz, found none; there is other\.nii\.gz"):
        read_grid(tmp_path / "other_0000.nii.gz")
    with pytest.raises(ValueError, match=r"no\.nii\.gz, found none; check its name"):
        read_grid(tmp_path / "no.nii.gz")


def test_distances_need_perpendicular_axes(tmp_path):
    file = write(tmp_path / "scan.nii.gz", **ACCEPTED["sheared"])
    for volume in (load_volume(file), read_grid(file)):
        with pytest.raises(ValueError, match=r"perpendicular axes for distances in mm.*scan\.nii\.gz; resample"):
            voxel_sizes(volume)
    assert voxel_sizes(load_volume(write(file, turned(30)))) == [1.5, 2.0, 3.0]
    np.testing.assert_allclose(voxel_sizes(load_volume(write(file, unit="micron"))), (1.5e-3, 2e-3, 3e-3))


# DICOM


def change(folder: Path, function) -> None:
    """Change the headers of a series; the function gets a dataset and its number."""
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        if function(dataset, int(dataset.InstanceNumber) - 1) is not False:
            dataset.save_as(file)
        else:
            file.unlink()


@pytest.fixture
def series(tmp_path) -> tuple[Path, np.ndarray]:
    hounsfield = np.random.default_rng(0).integers(-1000, 1000, (7, 6, 12))
    write_series(tmp_path / "series", hounsfield)
    return tmp_path / "series", hounsfield


def set_tag(name: str, value):
    return lambda dataset, number: setattr(dataset, name, value(number) if callable(value) else value)


def remove(name: str):
    return lambda dataset, number: delattr(dataset, name)


def test_series_is_read_by_position(series):
    folder, hounsfield = series
    volume = load_volume(folder)
    np.testing.assert_array_equal(volume[0], hounsfield)
    x, y, z = np.array(ORIGIN) + np.array([3, 5, 7]) * SPACING
    np.testing.assert_allclose((volume.affine.numpy() @ [3, 5, 7, 1])[:3], [-x, -y, z])
    change(folder, remove("InstanceNumber"))
    np.testing.assert_array_equal(load_volume(folder)[0], hounsfield)
    assert read_grid(folder).shape == (7, 6, 12)


def test_instance_numbers_choose_the_direction(series):
    folder, hounsfield = series
    expected = load_volume(folder)
    change(folder, set_tag("InstanceNumber", lambda number: 12 - number))
    volume = load_volume(folder)
    np.testing.assert_array_equal(volume[0], hounsfield[..., ::-1])
    np.testing.assert_allclose(volume.affine.numpy() @ [1, 2, 0, 1], expected.affine.numpy() @ [1, 2, 11, 1])
    shuffled = np.random.default_rng(1).permutation(10) + 1
    change(folder, set_tag("InstanceNumber", lambda number: int([0, *shuffled, 11][11 - number])))
    np.testing.assert_array_equal(load_volume(folder)[0], hounsfield)  # as MONAI does not


OBLIQUE = [0.8, 0.6, 0, 0, 0, -1]  # as written by many scanners: more than 16 characters a number
LONG = "0.8000000000000000444\\0.5999999999999999778\\0\\0\\0\\-1"


@pytest.mark.parametrize("orientation", [OBLIQUE, LONG])
def test_oblique_series_lies_where_its_headers_say(series, orientation):
    folder, hounsfield = series
    normal = np.cross(OBLIQUE[:3], OBLIQUE[3:])

    def turn(dataset, number):
        if isinstance(orientation, str):
            element = pydicom.dataelem.DataElement("ImageOrientationPatient", "LO", orientation.split("\\"))
            element.VR = "DS"
            dataset[0x00200037] = element
        else:
            dataset.ImageOrientationPatient = orientation
        dataset.ImagePositionPatient = [f"{value:.10f}"[:16] for value in np.array(ORIGIN) + 2.5 * number * normal]

    change(folder, turn)
    volume = load_volume(folder)
    i, j, k = 3, 5, 7
    place = ORIGIN + i * SPACING[0] * np.array(OBLIQUE[:3]) + j * SPACING[1] * np.array(OBLIQUE[3:]) + k * 2.5 * normal
    np.testing.assert_allclose((volume.affine.numpy() @ [i, j, k, 1])[:3], place * [-1, -1, 1], atol=1e-6)
    assert volume[0, i, j, k] == hounsfield[i, j, k]
    assert voxel_sizes(volume) == pytest.approx(SPACING)


def test_tilted_gantry_gives_a_sheared_affine(series, tmp_path):
    folder, _ = series
    change(folder, set_tag("ImagePositionPatient", lambda n: [ORIGIN[0], ORIGIN[1] + 0.5 * n, ORIGIN[2] + 2.5 * n]))
    volume = load_volume(folder)
    np.testing.assert_allclose(volume.affine[:3, 2], [0, -0.5, 2.5], atol=1e-6)
    write_label_map(tmp_path / "mask.nii.gz", torch.ones(volume.shape), volume)
    np.testing.assert_allclose(nib.load(tmp_path / "mask.nii.gz").affine, volume.affine, atol=1e-4)
    check_same_grid([folder, tmp_path / "mask.nii.gz"])
    with pytest.raises(ValueError, match="perpendicular axes"):
        voxel_sizes(volume)


def test_single_slice_takes_its_thickness(series):
    folder, hounsfield = series
    change(folder, lambda dataset, number: number == 4)
    assert load_volume(folder).shape == (1, 7, 6, 1)
    np.testing.assert_array_equal(load_volume(folder)[0], hounsfield[..., 4:5])
    assert voxel_sizes(load_volume(folder)) == list(SPACING)
    change(folder, remove("SliceThickness"))
    with pytest.raises(ValueError, match="has nothing as SliceThickness"):
        load_volume(folder)


def repeat_a_slice(folder: Path) -> None:
    file = sorted(folder.iterdir())[3]
    shutil.copy(file, folder / "again.dcm")


def add_other_series(folder: Path) -> None:
    write_series(folder / "other", np.zeros((7, 6, 3), int))
    for file in (folder / "other").iterdir():
        shutil.move(file, folder / f"other-{file.name}")
    (folder / "other").rmdir()


def add_broken_file(folder: Path) -> None:
    (folder / "broken.dcm").write_bytes(b"")


POSITION = "ImagePositionPatient"
BROKEN = {
    "2 of 12 slices missing": (
        lambda dataset, number: number not in (4, 8),
        r"the gaps between the 10 slices are 2\.5",
    ),
    "uneven gaps": (set_tag(POSITION, lambda n: [*ORIGIN[:2], 2.5 * n + 0.4 * (n % 3)]), "the gaps between the 12"),
    "a slice to the side": (
        set_tag(POSITION, lambda n: [ORIGIN[0] + (n == 5), ORIGIN[1], 2.5 * n]),
        "the gaps between",
    ),
    "two slices at one place": (set_tag(POSITION, lambda n: [*ORIGIN[:2], 2.5 * max(n, 1)]), "at the same position"),
    "all slices at one place": (set_tag(POSITION, list(ORIGIN)), "at the same position"),
    "no position": (remove(POSITION), "has nothing as ImagePositionPatient"),
    "no orientation": (remove("ImageOrientationPatient"), "has nothing as ImageOrientationPatient"),
    "half a position": (set_tag(POSITION, [1, 2]), r"has \[1\.0, 2\.0\] as ImagePositionPatient"),
    "no pixel spacing": (remove("PixelSpacing"), "has nothing as PixelSpacing"),
    "two pixel spacings": (set_tag("PixelSpacing", lambda n: [0.8, 0.7 + 0.1 * (n == 3)]), "differ in PixelSpacing"),
    "two orientations": (
        set_tag("ImageOrientationPatient", lambda n: [1, 0, 0, 0, 1, 0] if n else [0, 1, 0, 1, 0, 0]),
        "differ in ImageOrientationPatient",
    ),
    "an orientation that is none": (set_tag("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "ImageOrientationPatient"),
    "a slope in some slices": (
        lambda dataset, number: delattr(dataset, "RescaleSlope") if number == 3 else None,
        "some of the files lack RescaleSlope or RescaleIntercept",
    ),
    "a slope without intercept": (remove("RescaleIntercept"), "lack RescaleSlope or RescaleIntercept"),
    "a file cut before its image": (
        lambda dataset, number: delattr(dataset, "Rows") if number == 11 else None,
        r"has no Rows",
    ),
    "several frames": (set_tag("NumberOfFrames", 3), r"has several frames \(enhanced DICOM\)"),
    "colors": (set_tag("SamplesPerPixel", 3), "has colors"),
    "a slice twice": (repeat_a_slice, "at the same position"),
    "two series": (add_other_series, "the 15 files have 2 different values of SeriesInstanceUID"),
    "a broken file": (add_broken_file, r"broken\.dcm \(InvalidDicomError"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_incomplete_series_are_refused(series, damage, message):
    folder, _ = series
    if damage.__name__ in ("repeat_a_slice", "add_other_series", "add_broken_file"):
        damage(folder)
    else:
        change(folder, damage)
    for read in (read_grid, load_volume, lambda folder: LoadScand("image")({"image": folder})):
        with pytest.raises(ValueError, match=rf"(?s)expected .*{folder.name}.*{message}"):
            read(folder)


def test_slices_of_a_series_need_no_ending(series):
    folder, hounsfield = series
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"IM{number}")
    np.testing.assert_array_equal(load_volume(folder)[0], hounsfield)
    (folder / "LICENSE").write_text("text")
    (folder / "._IM0").write_bytes(b"of a Mac")
    report = pydicom.dcmread(folder / "IM0")
    report.file_meta.MediaStorageSOPClassUID = pydicom.uid.BasicTextSRStorage
    del report.Rows
    report.save_as(folder / "SR")
    message = r"Found 12 DICOM slices in .*series; left out LICENSE \(no DICOM file\), SR \(no image\)\."
    with pytest.warns(UserWarning, match=message):
        load_volume(folder)
    (folder.parent / "scan.nii.gz").touch()
    assert find_series(folder.parent) == [folder]
    with pytest.raises(ValueError, match=r"found no DICOM image; give one of the folders below it: .*/series\."):
        load_volume(folder.parent)


def test_real_series_are_read_as_monai_does(real_data):
    folders = sorted(path for path in (real_data / "DICOM_sample").glob("*/*") if path.is_dir())
    assert len(folders) == 3
    for folder in folders:
        volume, expected = load_volume(folder), LoadImage(reader="PydicomReader", ensure_channel_first=True)(folder)
        torch.testing.assert_close(volume.as_tensor(), expected.as_tensor(), rtol=0, atol=0)
        np.testing.assert_allclose(volume.affine, expected.affine)


# grids


@pytest.mark.parametrize(
    ("shape", "other", "message"),
    [
        (SIZE, np.eye(4), None),
        ((4, 5, 7), np.eye(4), r"same size in .*a.nii and .*b.nii, got \(4, 5, 6\) and \(4, 5, 7\)"),
        (SIZE, np.diag([-1, 1, 1, 1]), "same affine in .*a.nii and .*b.nii, got corners .* up to 6 voxels"),
        (SIZE, np.diag([1, 1, 1.1, 1]), "corners that lie up to 0.5 voxels apart"),
    ],
)
def test_check_same_grid_compares_the_places_of_voxels(tmp_path, shape, other, message):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    for name, size, own in (("a.nii", SIZE, affine), ("b.nii", shape, affine @ other)):
        nib.save(nib.Nifti1Image(np.zeros(size, np.uint8), own), tmp_path / name)
    files = [tmp_path / "a.nii", tmp_path / "b.nii"]
    if message is None:
        check_same_grid(files)
    else:
        with pytest.raises(ValueError, match=message):
            check_same_grid(files)


def test_check_same_grid_allows_a_tenth_of_a_voxel(tmp_path):
    for name, shift in (("a.nii", 0.0), ("b.nii", 0.19), ("c.nii", 0.21)):
        affine = np.diag([2.0, 3.0, 4.0, 1.0])
        affine[0, 3] = shift  # mm; a voxel has 2
        nib.save(nib.Nifti1Image(np.zeros(SIZE, np.uint8), affine), tmp_path / name)
    check_same_grid([tmp_path / "a.nii", tmp_path / "b.nii"])
    with pytest.raises(ValueError, match=r"a.nii and .*c.nii, got corners that lie up to 0.105 voxels apart"):
        check_same_grid([tmp_path / "a.nii", tmp_path / "b.nii", tmp_path / "c.nii"])


# folders


def test_find_files_leaves_out_hidden_ones(tmp_path):
    for name in ("scan.nii", "._scan.nii", ".scan.nii"):  # macOS leaves such files on other file systems
        (tmp_path / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "scan.nii").touch()
    assert find_files(tmp_path, "*.nii") == [tmp_path / "scan.nii"]


def test_find_files_follows_each_link_once(tmp_path):
    """A data set may consist of links to cases elsewhere."""
    for folder in ("elsewhere/case1", "elsewhere/case2", "data/case3"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "scan.nii.gz").touch()
        (tmp_path / folder / "notes.txt").touch()
    (tmp_path / "data" / "case1").symlink_to(tmp_path / "elsewhere" / "case1")
    (tmp_path / "data" / "case2").symlink_to(tmp_path / "elsewhere" / "case2")
    (tmp_path / "data" / "case2" / "back").symlink_to(tmp_path / "data")
    expected = [tmp_path / "data" / case / "scan.nii.gz" for case in ("case1", "case2", "case3")]
    assert find_files(tmp_path / "data", "*.nii*") == expected


def test_series_without_a_decoder_is_not_called_broken(tmp_path, monkeypatch):
    write_series(tmp_path / "series", np.zeros((6, 5, 3)))
    for file in (tmp_path / "series").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(100)])
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(file)
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", property(lambda decoder: False))
    with pytest.raises(ValueError, match=r"JPEG Lossless.*install 'pylibjpeg\[all\]', or convert"):
        load_volume(tmp_path / "series")
