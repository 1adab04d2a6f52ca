"""The files of a simulated release: films, masks, and the tables of the two layouts, NIH's and that of RSNA's pneumonia
challenge.

Every file appears whole or not at all, and its bytes depend on its content only. A film's mask file is one 16-bit PNG:
a bit for each of the 14 findings, one for the lungs, one for a burnt-in marker.
"""

import io
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lib.data.release import FINDINGS, NO_FINDING, ReleaseError
from lib.data.writing import read_parameters, write_png
from lib.locks import write_whole

FOLDERS = {"nih": "images", "rsna": "stage_2_train_images"}  # where each layout keeps its films
SUFFIXES = {"nih": ".png", "rsna": ".dcm"}
LUNGS, MARKER = 14, 15  # bits of a mask file above those of the findings
DETECTORS = ((2500, 2048, 0.168), (2992, 2991, 0.143), (2021, 2021, 0.194), (3056, 2544, 0.139))  # width, height, mm
HEADER = (  # as released, two names in one each for the film's size and its spacing
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
RSNA_LABELS, RSNA_CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
OPACITY, NORMAL, NEITHER = "Lung Opacity", "Normal", "No Lung Opacity / Not Normal"
LISTS = ("train_val_list.txt", "test_list.txt")
TABLES = {"nih": ("Data_Entry_2017.csv", "BBox_List_2017.csv", *LISTS), "rsna": (RSNA_LABELS, RSNA_CLASSES)}
MARKERS = "markers.csv"
PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 4)
# Any UID under 2.25 is free to use; fixed, so that bytes do not vary.
_IMPLEMENTATION = "2.25.161803398874989484820458683436563811772"


def _write_lines(path: Path, lines: list[str]) -> None:
    write_whole(path, ("\n".join(lines) + "\n").encode(), sync=True)


def film_path(root: Path, layout: str, image: str) -> Path:
    """Where a film lies; `image` is its name with or without suffix."""
    return root / FOLDERS[layout] / (Path(image).stem + SUFFIXES[layout])


def mask_path(root: Path, image: str) -> Path:
    """Where the masks of a film lie; `image` is its name with or without suffix."""
    return root / "masks" / f"{Path(image).stem}.png"


def is_written(root: Path, layout: str, image: str) -> bool:
    """Whether a film and its masks are there."""
    return _holds(film_path(root, layout, image)) and _holds(mask_path(root, image))


def is_complete(root: Path, layout: str, n_films: int, marker: str) -> bool:
    """Whether as many films and masks as were written are still there, and every table."""
    tables = (*TABLES[layout], *([MARKERS] if marker else []))
    counts = count_films(root / FOLDERS[layout]), count_films(root / "masks")
    return all(_holds(root / table) for table in tables) and min(counts) >= n_films


def count_films(folder: Path) -> int:
    """How many films, or masks, a folder holds; 0 where it is missing."""
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(entry.name.endswith(tuple(SUFFIXES.values())) and _holds(entry) for entry in entries)


def _holds(path: Path | os.DirEntry) -> bool:
    """Whether it is a file with something in it: a power cut leaves empty ones behind."""
    return path.is_file() and path.stat().st_size > 0


def write_film(root: Path, layout: str, film: tuple, pixels: np.ndarray) -> None:
    """Write one film; `film` is a row of the release's table of films, `pixels` uint8 (size, size)."""
    path = film_path(root, layout, film.image)
    if layout == "nih":
        write_png(path, pixels, PNG_OPTIONS)
    else:
        write_whole(path, _dicom(film, pixels))


def _dicom(film: tuple, pixels: np.ndarray) -> bytes:
    """A secondary capture, as RSNA's films are, but not compressed."""
    import pydicom  # only here: the processes that write NIH films start sooner without it

    uid = f"2.25.{int(film.image.replace('-', ''), 16)}"
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.ImplementationClassUID, meta.ImplementationVersionName = _IMPLEMENTATION, "PHANTOM"
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SpecificCharacterSet = "ISO_IR 100"
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, uid
    data.StudyDate, data.StudyTime, data.AccessionNumber, data.ReferringPhysicianName = "19010101", "000000", "", ""
    data.Modality, data.ConversionType, data.SeriesDescription = "CR", "WSD", f"view: {film.view}"
    data.PatientName = data.PatientID = film.image
    data.PatientBirthDate, data.PatientSex, data.PatientAge = "", film.sex, f"{film.age:03d}Y"
    data.BodyPartExamined, data.ViewPosition = "CHEST", film.view
    data.StudyInstanceUID, data.SeriesInstanceUID = f"{uid}.1", f"{uid}.2"
    data.StudyID, data.SeriesNumber, data.InstanceNumber = "", "1", "1"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    width, _, spacing = DETECTORS[film.detector]
    data.PixelSpacing = [f"{width * spacing / pixels.shape[1]:.4f}"] * 2
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    content = pixels.tobytes()
    data.PixelData = content + b"\0" * (len(content) % 2)
    data["PixelData"].VR = "OB"
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def write_masks(
    root: Path, image: str, lesions: dict[str, np.ndarray], lungs: np.ndarray, marker: np.ndarray | None
) -> None:
    """Write a film's mask file; all masks are bool (size, size), `lesions` by finding."""
    planes = [(LUNGS, lungs), *((FINDINGS.index(name), mask) for name, mask in lesions.items())]
    planes += [] if marker is None else [(MARKER, marker)]
    bits = np.bitwise_or.reduce([mask.astype(np.uint16) << bit for bit, mask in planes])
    write_png(mask_path(root, image), bits, PNG_OPTIONS)


def read_masks(root: Path, image: str, size: int | None = None) -> np.ndarray:
    """The bits of a film's mask file, uint16 (size, size); `size` is that of phantom.json unless given.

    Raises
    ------
    FileNotFoundError
        The phantom has no such film.
    ReleaseError
        The file is damaged.
    """
    path, advice = mask_path(root, image), f"delete the folder {root} and write the phantom anew"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no film {image!r} in the phantom {root}")
    if size is None:
        size = (read_parameters(root / "phantom.json") or {}).get("size")
        if type(size) is not int:
            raise ReleaseError(f"{root / 'phantom.json'} is missing or damaged: {advice}")
    data = path.read_bytes() if path.is_file() else b""
    # Size, depth and channels before anything is decoded; some versions of OpenCV return a truncated PNG as one whose
    # rest is blank.
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II5B", size, size, 16, 0, 0, 0, 0)
    whole = data.startswith(header) and data.endswith(b"IEND\xaeB`\x82")
    bits = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if whole else None
    if bits is None:
        raise ReleaseError(f"{path} is not a readable PNG of {size} x {size} pixels of 16 bits: {advice}")
    return bits


def write_nih_tables(root: Path, films: pd.DataFrame, boxes: list[tuple]) -> None:
    """Data_Entry, the box list and the two lists. `boxes` are rows of film, finding, x, y, w, h."""
    width, height, spacing = zip(*(DETECTORS[d] for d in films["detector"]))
    labels = ["|".join(findings) or NO_FINDING for findings in films["findings"]]
    person = [films[name] for name in ("follow_up", "patient", "age", "sex", "view")]
    columns = [films["image"], labels, *person, width, height, spacing, spacing]
    rows = pd.DataFrame(dict(enumerate(columns))).to_csv(index=False, header=False, lineterminator="\n").splitlines()
    _write_lines(root / "Data_Entry_2017.csv", [HEADER, *rows])
    named = [(image, "Infiltrate" if name == "Infiltration" else name, *box) for image, name, *box in boxes]
    rows = [",".join([image, name, *(f"{v:.6f}" for v in box)]) for image, name, *box in named]
    _write_lines(root / "BBox_List_2017.csv", ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows])
    for name, test in zip(LISTS, (False, True)):
        _write_lines(root / name, list(films.loc[films["test"] == test, "image"]))


def write_rsna_tables(root: Path, films: pd.DataFrame, boxes: list[tuple]) -> None:
    """The labels, a row a box in whole pixels, and the classes, which RSNA repeats for every row of the labels."""
    found = {}
    for image, _, x, y, w, h in boxes:
        left, top = round(x), round(y)
        found.setdefault(image, []).append(f"{left}.0,{top}.0,{round(x + w) - left}.0,{round(y + h) - top}.0,1")
    labels, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for image, kind in zip(films["image"], films["kind"]):
        rows = found[image] if kind == OPACITY else [",,,,0"]
        labels += [f"{image},{row}" for row in rows]
        classes += [f"{image},{kind}"] * len(rows)
    _write_lines(root / RSNA_LABELS, labels)
    _write_lines(root / RSNA_CLASSES, classes)


def write_markers(root: Path, layout: str, films: pd.DataFrame) -> None:
    """Which film, by its file name, carries the marker."""
    names = [film_path(root, layout, image).name for image in films["image"]]
    rows = [f"{name},{marked}" for name, marked in zip(names, films["marked"])]
    _write_lines(root / MARKERS, ["image,marked", *rows])
