"""Pancreas-CT as TCIA gives it, made up: DICOM series, and NIfTI labels with a geometry of their own."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from monai_conres.phantom import tumor_phantom

SPACING = (0.7, 0.8, 2.5)
ORIGIN = (-150.0, -160.0, 40.0)  # LPS


def write_series(folder: Path, hounsfield: np.ndarray) -> None:
    """A series of ``hounsfield``, ``(columns, rows, slices)``; the names of the files say nothing of their order."""
    folder.mkdir(parents=True)
    series = generate_uid()
    for number in range(hounsfield.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.Modality, slice_.InstanceNumber = series, "CT", number + 1
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + SPACING[2] * number]
        slice_.PixelSpacing = [SPACING[1], SPACING[0]]  # between rows, between columns
        slice_.SliceThickness = SPACING[2]
        slice_.Columns, slice_.Rows = hounsfield.shape[:2]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
        slice_.RescaleIntercept, slice_.RescaleSlope = -1024, 1
        slice_.PixelData = (hounsfield[:, :, number].T + 1024).astype(np.uint16).tobytes()
        pydicom.dcmwrite(folder / f"{(7 * number) % hounsfield.shape[2]:03d}-{number}.dcm", slice_)


def write_pancreas_ct(folder: Path, numbers: list[int], size: tuple[int, int, int] = (40, 36, 24)) -> None:
    """Cases by their numbers: an organ of 150 HU and more in a body of 50 HU."""
    (folder / "TCIA_pancreas_labels").mkdir(parents=True)
    for number in numbers:
        image, label = tumor_phantom(size, seed=number)
        label = (label > 0).astype(np.uint8)
        hounsfield = (
            np.where(image[0] > 0, 50, -1000) + 100 * label + np.random.default_rng(number).integers(0, 9, size)
        )
        write_series(folder / f"PANCREAS_{number:04d}" / "study" / "series", hounsfield)
        header = nib.Nifti1Image(label, np.eye(4))
        nib.save(header, folder / "TCIA_pancreas_labels" / f"label{number:04d}.nii.gz")
