import io
import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLosslessSV1, RLELossless

from lib.data import open_data
from lib.data import store as store_module
from lib.data.decoding import decode_film, read_films
from lib.data.release import BOX_COLUMNS, CLASSES, FILM_COLUMNS, ReleaseError, task_boxes, task_targets
from lib.data.rsna import DETAILS, FILMS, LABELS, NEITHER, NORMAL, OPACITY, draw_splits, read_rsna
from lib.data.store import StoreError, open_store

SIZE = 64


def film(i: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (size, size), np.uint8)


def dicom(
    pixels: np.ndarray, kind="MONOCHROME2", *, bits=0, syntax=ExplicitVRLittleEndian, stream=b"", **elements
) -> bytes:
    """A DICOM file of one frame; `stream` is the compressed pixels of an encapsulated syntax."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    file = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture
    meta.MediaStorageSOPInstanceUID, file.SOPInstanceUID, file.Modality = "1.2.3", "1.2.3", "CR"
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, kind
    file.BitsAllocated = 8 * pixels.dtype.itemsize
    file.BitsStored = bits or file.BitsAllocated
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(file, name, value)
    file.PixelData = encapsulate([stream]) if stream else pixels.tobytes()
    file["PixelData"].VR = "OW" if file.BitsAllocated > 8 else "OB"
    file["PixelData"].is_undefined_length = bool(stream)
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def decode(data: bytes, size: int = SIZE) -> np.ndarray:
    return decode_film(data, size, ".dcm")


# ---- pixels


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_eight_bit_films_keep_their_values_whatever_the_header_proposes(syntax):
    assert (decode(dicom(film(0), syntax=syntax)) == film(0)).all()
    windowed = dicom(film(0), syntax=syntax, WindowCenter=100, WindowWidth=20, RescaleSlope=2, RescaleIntercept=-1024)
    assert (decode(windowed) == film(0)).all()
    assert (decode_film(dicom(film(0)), SIZE, ".DCM") == film(0)).all()


def test_monochrome1_and_a_negative_slope_are_turned_round():
    assert (decode(dicom(film(1), "MONOCHROME1")) == 255 - film(1)).all()
    assert (decode(dicom(film(1), RescaleSlope=-1, RescaleIntercept=255)) == 255 - film(1)).all()
    assert (decode(dicom(film(1), "MONOCHROME1", RescaleSlope=-0.5, RescaleIntercept=0)) == film(1)).all()


def test_a_dicom_film_is_resized_as_the_png_of_the_same_pixels():
    for side, size in ((128, 64), (96, 40), (64, 100), (512, 32)):
        png = cv2.imencode(".png", film(2, side))[1].tobytes()
        assert (decode(dicom(film(2, side)), size) == decode_film(png, size)).all()
    deep = np.random.default_rng(0).integers(0, 65536, (96, 96)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    assert (decode(dicom(deep), 40) == decode_film(cv2.imencode(".png", deep)[1].tobytes(), 40)).all()


def test_a_jpeg_film_as_rsna_stores_them():
    smooth = cv2.GaussianBlur(film(3, 128), (0, 0), 4)
    stream = cv2.imencode(".jpg", smooth)[1].tobytes()
    out = decode(dicom(smooth, syntax=JPEGBaseline8Bit, stream=stream), 128)
    assert np.abs(out.astype(int) - cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_GRAYSCALE)).max() <= 1
    assert np.abs(out.astype(int) - smooth).max() <= 12


def slow_grey(pixels, kind, bits, slope=1.0, intercept=0.0, window=None, function="LINEAR") -> np.ndarray:
    """Pixel by pixel, from DICOM PS3.3 C.7.6.3 and C.11.2.1."""
    values = [[slope * int(v) + intercept for v in row] for row in pixels]
    least, most = min(map(min, values)), max(map(max, values))
    out = np.empty(pixels.shape)
    for y, row in enumerate(values):
        for x, v in enumerate(row):
            if window is None:
                shade = (v - least) / (most - least)
            else:
                centre, width = window
                if function == "LINEAR":
                    below, above = v <= centre - 0.5 - (width - 1) / 2, v > centre - 0.5 + (width - 1) / 2
                    shade = 0 if below else 1 if above else (v - (centre - 0.5)) / (width - 1) + 0.5
                else:
                    below, above = v <= centre - width / 2, v > centre + width / 2
                    shade = 0 if below else 1 if above else (v - centre) / width + 0.5
            out[y, x] = 255 * (1 - shade if kind == "MONOCHROME1" else shade)
    return out


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize(
    ("window", "function"),
    [
        (None, "LINEAR"),
        ((600, 900), "LINEAR"),
        ((600.5, 2), "LINEAR"),
        ((600, 900), "LINEAR_EXACT"),
        ((9000, 50), "LINEAR"),
    ],
)
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (0.5, -100), (-1.25, 4000)])
def test_deep_films_against_a_loop(kind, dtype, window, function, slope, intercept):
    low = -2048 if dtype == np.int16 else 0
    pixels = (np.random.default_rng(5).integers(0, 4096, (16, 16)) * 0.6 + 100 + low).astype(dtype)
    elements = {"RescaleSlope": slope, "RescaleIntercept": intercept}
    if window:
        elements |= {"WindowCenter": window[0], "WindowWidth": window[1], "VOILUTFunction": function}
    out = decode(dicom(pixels, kind, bits=12, **elements), 16)
    assert np.abs(out - slow_grey(pixels, kind, 12, slope, intercept, window, function)).max() <= 0.51


def test_of_several_windows_the_first_is_used():
    pixels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    windows = ((600, 900), ([600, 3000], [900, 100]))
    one, two = (dicom(pixels, bits=12, WindowCenter=centre, WindowWidth=width) for centre, width in windows)
    assert (decode(one, 16) == decode(two, 16)).all() and (decode(one, 16) != decode(dicom(pixels, bits=12), 16)).any()


def test_odd_depths_constant_films_and_stray_bits():
    six = (np.arange(64 * 64).reshape(64, 64) % 64).astype(np.uint8)
    assert (decode(dicom(six, bits=6)) == np.floor(six * (255 / 63) + 0.5)).all()
    signed = (film(6).astype(int) - 128).astype(np.int8)
    assert (decode(dicom(signed)) == film(6)).all()
    assert (decode(dicom(np.full((64, 64), 700, np.uint16), bits=12)) == 0).all()
    stray = np.full((64, 64), 100, np.uint16)
    stray[0], stray[1] = 4095, 0
    stray[2] = 4095 + 4096  # beyond the 12 stored bits
    assert set(np.unique(decode(dicom(stray, bits=12)))) == {0, 6, 255}


WHOLE, DEEP, COLOUR = dicom(film(7)), film(7).astype(np.uint16), np.dstack([film(7)] * 3)
JPEG = cv2.imencode(".jpg", film(7))[1].tobytes()
WHOLE_JPEG = dicom(film(7), syntax=JPEGBaseline8Bit, stream=JPEG)


def with_table(name: str, **elements) -> bytes:
    return dicom(DEEP, bits=12, **{name: [Dataset()]}, **elements)


UNREADABLE = {
    "empty.dcm": (b"", "is empty"),
    "text.dcm": (b"<html>not found</html>" * 20, "not a DICOM"),
    "png.dcm": (cv2.imencode(".png", film(7))[1].tobytes(), "not a DICOM"),
    "preamble.dcm": (WHOLE[:132], "truncated"),
    "header.dcm": (WHOLE[:300], "truncated"),
    "half.dcm": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "lastbyte.dcm": (WHOLE[:-1], "truncated"),
    "halfjpeg.dcm": (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], "truncated"),
    "halfstream.dcm": (dicom(film(7), syntax=JPEGBaseline8Bit, stream=JPEG[: len(JPEG) // 2]), "truncated"),
    "othersize.dcm": (dicom(film(7, 32), syntax=JPEGBaseline8Bit, stream=JPEG), "damaged"),
    "colour.dcm": (dicom(COLOUR, "RGB", SamplesPerPixel=3, PlanarConfiguration=0), "RGB, 3 values each"),
    "palette.dcm": (dicom(film(7), "PALETTE COLOR"), "PALETTE COLOR"),
    "frames.dcm": (dicom(np.vstack([film(7)] * 2), Rows=64, NumberOfFrames=2), "2 frames"),
    "oblong.dcm": (dicom(film(7)[:50].copy()), r"not square \(64 x 50\)"),
    "lossless.dcm": (dicom(film(7), syntax=JPEGLosslessSV1, stream=JPEG), "compressed as JPEG Lossless.*decompress it"),
    "deep.dcm": (dicom(film(7).astype(np.uint32)), "32 bits"),
    "slope.dcm": (dicom(film(7), RescaleSlope=0), "slope"),
    "steep.dcm": (dicom(DEEP, RescaleSlope="1e307"), "rescaled by 1e\\+307"),
    "nothing.dcm": (dicom(film(7)[:0, :0]), "truncated|no pixels"),
    "width.dcm": (dicom(DEEP, WindowCenter=5, WindowWidth=1), "no width"),
    "sigmoid.dcm": (dicom(DEEP, WindowCenter=5, WindowWidth=9, VOILUTFunction="SIGMOID"), "window is SIGMOID"),
    "modality.dcm": (with_table("ModalityLUTSequence"), "look-up table"),
    "voi.dcm": (with_table("VOILUTSequence"), "look-up table"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unreadable_films_say_why(name, tmp_path):
    data, reason = UNREADABLE[name]
    with pytest.raises(ValueError, match=reason):
        decode(data)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        read_films([tmp_path / name], SIZE)


def test_a_table_that_a_window_replaces_is_no_obstacle():
    plain = dicom(DEEP, bits=12, WindowCenter=100, WindowWidth=80)
    assert (decode(with_table("VOILUTSequence", WindowCenter=100, WindowWidth=80)) == decode(plain)).all()


@pytest.mark.parametrize(
    "whole", [WHOLE, WHOLE_JPEG, dicom(film(7), syntax=RLELossless, stream=b"\1" + bytes(63) + b"\0" * 99)]
)
@pytest.mark.filterwarnings("ignore")
def test_damage_raises_nothing_but_value_errors(whole):
    rng, refused = np.random.default_rng(0), 0
    for i in range(400):
        data = bytearray(whole)
        for at in rng.integers(132, min(len(data), 600), 1 + i % 4):
            data[at] = rng.integers(256)
        try:
            assert decode(bytes(data), 16).shape == (16, 16)
        except ValueError:
            refused += 1
    assert refused > 0


# ---- the release

# Twelve patients with pneumonia, of which b00 has three boxes and b01 two; 24 without, half of them normal.
POSITIVE = [f"b{i:02d}" for i in range(12)]
NEGATIVE = [f"a{i:02d}" for i in range(24)]
HEADER = "patientId,x,y,width,height,Target"
BOXES = [f"{p},{100 + i}.0,152.5,213.0,379.0,1" for i, p in enumerate(POSITIVE)]
BOXES += ["b00,10,20,30,40,1", "b00,500,20,30,40,1", "b01,10,20,30,40,1"]
ROWS = [*BOXES, *(f"{p},,,,,0" for p in NEGATIVE)]
CLASS_ROWS = [f"{row.split(',')[0]},{OPACITY}" for row in BOXES]
CLASS_ROWS += [f"{p},{NORMAL if i % 2 else NEITHER}" for i, p in enumerate(NEGATIVE)]


def write(
    root: Path,
    rows=ROWS,
    classes=CLASS_ROWS,
    header=HEADER,
    class_header="patientId,class",
    films=(*POSITIVE, *NEGATIVE),
) -> Path:
    """A release of empty films; `classes` None leaves that file out."""
    (root / FILMS).mkdir(parents=True)
    (root / LABELS).write_text("\n".join([header, *rows, ""]))
    if classes is not None:
        (root / DETAILS).write_text("\n".join([class_header, *classes, ""]))
    for name in films:
        (root / FILMS / f"{name}.dcm").touch()
    return root


def read(root: Path, **changes):
    return read_rsna(root, **({"validation_fraction": 0.25, "seed": 0, "test_fraction": 0.2} | changes))


def test_a_sound_release(tmp_path):
    root = write(tmp_path / "r")
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    release = read(root)
    films = release.films
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    assert list(films.columns) == [*FILM_COLUMNS, "detail"] and list(release.boxes.columns) == list(BOX_COLUMNS)
    assert films["patient"].tolist() == [*POSITIVE, *NEGATIVE]
    assert films["image"].tolist() == [f"{p}.dcm" for p in films["patient"]]
    assert films.index.tolist() == list(range(36)) and len(release.problems) == 0
    assert films["age"].isna().all() and films["age"].dtype == float and (films["follow_up"] == 0).all()
    assert (films["sex"] + films["view"] == "").all()
    assert all(Path(path).is_file() for path in films["path"])
    assert [Path(path).name for path in films["path"]] == list(films["image"])
    expected = {OPACITY: "Pneumonia", NORMAL: "No Finding", NEITHER: ""}
    assert films["labels"].tolist() == [expected[detail] for detail in films["detail"]]
    assert films["detail"].value_counts()[NORMAL] == 12


def test_a_patient_with_several_boxes_is_one_film_with_all_of_them(tmp_path):
    boxes = read(write(tmp_path / "r")).boxes
    assert len(boxes) == 15 and set(boxes["class"]) == {"Pneumonia"} and boxes["image"].value_counts().max() == 3
    corners = boxes[boxes["image"] == "b00.dcm"][["x1", "y1", "x2", "y2"]].to_numpy().tolist()
    assert corners == [[100, 152.5, 313, 531.5], [10, 20, 40, 60], [500, 20, 530, 60]]


def test_targets_and_boxes_of_tasks(tmp_path):
    release = read(write(tmp_path / "r"))
    assert release.classes == CLASSES and release.targets.shape == (36, 15)
    assert (release.targets.sum(1) == (release.films["labels"] != "")).all()
    targets, names = task_targets(release.targets, "pneumonia")
    assert names == ["Pneumonia"] and targets.dtype == np.uint8 and targets[:, 0].tolist() == [1] * 12 + [0] * 24
    binary, _ = task_targets(release.targets, "binary")
    assert binary[:, 0].tolist() == (release.films["detail"] != NORMAL).astype(int).tolist()
    mixed = release.boxes.assign(**{"class": ["Mass", *release.boxes["class"][1:]]})
    assert task_boxes(mixed, "pneumonia").equals(release.boxes[1:].reset_index(drop=True))
    assert task_boxes(mixed, "digits").equals(mixed) and set(task_boxes(mixed, "binary")["class"]) == {"Unhealthy"}
    with pytest.raises(ValueError, match="'digits' needs a release of 10 classes"):
        task_targets(release.targets, "digits")


# ---- split


@pytest.mark.parametrize("seed", range(4))
def test_the_split_is_by_patient_and_has_both_targets_everywhere(tmp_path, seed):
    films = read(write(tmp_path / "r"), seed=seed).films
    assert films["patient"].is_unique
    for positive, sizes in ((True, {"test": 2, "val": 2, "train": 8}), (False, {"test": 5, "val": 5, "train": 14})):
        assert films["split"][films["labels"].eq("Pneumonia") == positive].value_counts().to_dict() == sizes


def test_the_split_depends_on_the_seed_and_on_neither_the_order_of_rows_nor_missing_films(tmp_path):
    def splits(root, **changes):
        return read(root, **changes).films.set_index("patient")["split"].sort_index()

    first = splits(write(tmp_path / "a"))
    turned = splits(write(tmp_path / "b", rows=ROWS[::-1], classes=CLASS_ROWS[5:] + CLASS_ROWS[:5]))
    assert first.equals(turned) and first.equals(splits(tmp_path / "a"))
    assert not first.equals(splits(tmp_path / "a", seed=1))
    fewer = splits(write(tmp_path / "c", films=[*POSITIVE, *NEGATIVE[:-1]]), on_missing="skip")
    assert (fewer != first.drop(NEGATIVE[-1])).sum() <= 2
    assert first.equals(splits(write(tmp_path / "d", classes=None)))


def test_draw_splits_has_every_label_everywhere_down_to_three_films():
    names = [f"n{i}" for i in range(203)]
    labels = np.array(["rare"] * 3 + ["common"] * 200)
    for fraction in (0.001, 0.3, 0.999):
        splits = draw_splits(names, labels, test_fraction=fraction, validation_fraction=fraction, seed=0)
        assert sorted(splits[:3]) == ["test", "train", "val"] and set(splits[3:]) == {"train", "val", "test"}
    splits = draw_splits(names, labels, test_fraction=0.1, validation_fraction=0.2, seed=0)
    assert [(splits[3:] == name).sum() for name in ("test", "val", "train")] == [20, 36, 144]
    with pytest.raises(ValueError, match="label rare has 2 films"):
        draw_splits(names[1:], labels[1:], test_fraction=0.1, validation_fraction=0.1, seed=0)


@pytest.mark.parametrize("name", ["validation_fraction", "test_fraction", "on_missing"])
def test_parameters_are_checked(tmp_path, name):
    for value in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=name):
            read(tmp_path, **{name: value})


# ---- what is missing


def test_missing_films(tmp_path):
    root = write(tmp_path / "r", films=[*POSITIVE[1:], *NEGATIVE[1:], "stranger"])
    with pytest.raises(ReleaseError, match=r"2 of the 36 patients.*no film.*b00\.dcm, a00\.dcm.*skip_bad_films"):
        read(root)
    release = read(root, on_missing="skip")
    assert len(release.films) == 34 and len(release.boxes) == 12
    kinds = release.problems.groupby("kind")["item"].apply(list).to_dict()
    left_out = {"film missing": ["b00.dcm", "a00.dcm"], "box left out": ["b00.dcm"]}
    assert kinds == left_out | {"film without a label": ["stranger.dcm"]}


def test_all_films_or_all_classes_missing(tmp_path):
    root = write(tmp_path / "r", films=["stranger"])
    for choice in ("error", "skip"):
        with pytest.raises(ReleaseError, match=f"36 of the 36 patients .* no film in .*{FILMS}.*cannot help where all"):
            read(root, on_missing=choice)
    root = write(tmp_path / "s", classes=[f"stranger,{NORMAL}"])
    with pytest.raises(ReleaseError, match=f"36 of the 36 patients .* not in {DETAILS}.*cannot help where all"):
        read(root, on_missing="skip")


@pytest.mark.parametrize("kind", ["dangling", "looping", "device", "pipe", "folder"])
def test_only_regular_files_are_films(tmp_path, kind):
    root = write(tmp_path / "r", films=[*POSITIVE[1:], *NEGATIVE])
    path = root / FILMS / "b00.dcm"
    targets = {"dangling": "nowhere", "looping": path, "device": "/dev/zero"}
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir}.get(kind, lambda: path.symlink_to(targets[kind]))()
    with pytest.raises(ReleaseError, match=r"1 of the 36 patients.*no film.*b00\.dcm.*a link must lead"):
        read(root)
    assert read(root, on_missing="skip").problems["item"].tolist() == ["b00.dcm", "b00.dcm"]  # the film and its boxes


def test_the_suffix_may_be_in_capitals(tmp_path):
    root = write(tmp_path / "r")
    expected = read(root).films
    (root / FILMS / "b00.dcm").rename(root / FILMS / "b00.DCM")
    films = read(root).films
    assert films["path"][0] == str(root / FILMS / "b00.DCM")
    assert films.drop(columns="path").equals(expected.drop(columns="path"))
    (root / FILMS / "b00.dcm").touch()
    release = read(root)
    assert release.films["path"][0] == str(root / FILMS / "b00.dcm")
    assert release.problems[["kind", "item"]].to_numpy().tolist() == [["film found twice", FILMS]]


def test_names_that_are_no_text_beside_the_films(tmp_path):
    root = write(tmp_path / "r")
    Path(os.fsdecode(os.fsencode(root / FILMS) + b"/\xff\x1b.dcm")).touch()
    assert read(root).problems["item"].tolist() == [r"\udcff\x1b.dcm"]


@pytest.mark.parametrize("file", [LABELS, DETAILS])
def test_lists_are_regular_files_of_sound_rows(tmp_path, file):
    path = write(tmp_path / "r") / file
    lines = path.read_bytes().split(b"\n")
    for line, message in (
        (b'"' + lines[1], "a quote is not closed in its row"),
        (b"b\0" + lines[1], "a cell has a character that is not utf-8 or cannot be seen"),
        (lines[1] + b"x" * 1001, "a cell has 1,0"),
    ):
        path.write_bytes(b"\n".join([lines[0], line, *lines[2:5], b'"b00"', *lines[6:]]))
        with pytest.raises(ReleaseError, match=f"{file} is not a readable csv in utf-8, row 2: {message}"):
            read(path.parent)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ReleaseError, match=f"{file} is a folder, a pipe or a device"):
        read(path.parent)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ReleaseError, match="is not a folder"):
        read(tmp_path / "nowhere")
    root = write(tmp_path / "r")
    (root / FILMS).rename(root / "films")
    with pytest.raises(ReleaseError, match=f"no folder {FILMS}"):
        read(root)
    (root / LABELS).write_text(HEADER)
    with pytest.raises(ReleaseError, match=f"{LABELS} has no rows"):
        read(root)
    (root / LABELS).unlink()
    with pytest.raises(ReleaseError, match=f"holds no {LABELS}"):
        read(root)


def test_without_detailed_classes_no_film_is_known_to_be_normal(tmp_path):
    release = read(write(tmp_path / "r", classes=None))
    assert release.problems["kind"].tolist() == ["no detailed classes"] and set(release.films["detail"]) == {""}
    assert release.films["labels"].value_counts().to_dict() == {"": 24, "Pneumonia": 12}


def test_patients_in_one_csv_only(tmp_path):
    root = write(tmp_path / "r", classes=[*CLASS_ROWS[:-1], f"stranger,{NORMAL}"])
    with pytest.raises(ReleaseError, match=rf"1 of the 36 patients of .*{LABELS} are not in {DETAILS}: a23"):
        read(root)
    release = read(root, on_missing="skip")
    assert release.films["detail"].iloc[-1] == "" and release.films["labels"].iloc[-1] == ""
    expected = [["class without a label", "stranger.dcm"], ["no detailed class", "a23.dcm"]]
    assert release.problems[["kind", "item"]].to_numpy().tolist() == expected


@pytest.mark.parametrize("kept", [2, 0])
def test_too_few_patients_to_divide(tmp_path, kept):
    root = write(tmp_path / "r", films=[*POSITIVE[:kept], *NEGATIVE])
    with pytest.raises(ReleaseError, match=f"{kept} patients have Target 1 and a film"):
        read(root, on_missing="skip")


def test_a_split_that_unreadable_films_empty(tmp_path):
    release = read(write(tmp_path / "r"))
    with pytest.raises(ReleaseError, match="films left out .unreadable. the val split is empty"):
        release.without(release.films["image"][release.films["split"] == "val"], "unreadable")


# ---- what is wrong


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b00,1,1,5,5,2", "row 2: Target '2' of b00 is neither 0 nor 1"),
        ("b00,1,1,5,5,", "row 2: Target '' of b00"),
        ("b00,,,,,1", "row 2: b00 has Target 1, but no box"),
        ("b00,1,1,5,,1", "row 2: the box 1, 1, 5,  of b00 is not four numbers"),
        ("b00,1,1,5,wide,1", "row 2.*not four numbers"),
        ("b00,1,1,0,5,1", "row 2: the box 1, 1, 0, 5 of b00 has no area"),
        ("b00,nan,1,5,5,1", "row 2.*no area"),
        ("b00,1024,1,5,5,1", "row 2.*outside its film"),
        ("b00,-9,1,5,5,1", "row 2.*outside its film"),
        ("b00,1,1,1e308,5,1", "row 2.*larger than two films"),
        ("b00,1,1,1_0,5,1", "row 2.*not four numbers"),
        ("b00,1,1,\uff15,5,1", "row 2.*not four numbers"),
        ("a00,1,1,5,5,0", r"row 2: a00 has a box \(1, 1, 5, 5\), but Target 0"),
        ("b00,,,,,0", "row 14: b00 has Target 1, but Target 0 in row 2"),
        ("../b00,1,1,5,5,1", r"row 2: patientId '\.\./b00' is not the name of a film"),
        (",1,1,5,5,1", "row 2: patientId ''"),
        ("..,1,1,5,5,1", r"row 2: patientId '\.\.' is not the name of a film"),
        ("b\tb,1,1,5,5,1", r"row 2: patientId 'b\\tb' is not the name of a film"),
        ("B01,1,1,5,5,1", "row 3: patientId 'b01' and 'B01' in row 2 are one in two spellings"),
        ("b00,1,1,5,5," + "1" * 900, "row 2: Target '1{78}… of b00"),
        ("b00,1,1,5,5", "row 2 has 5 cells, not 6"),
    ],
)
def test_wrong_rows_of_the_labels(tmp_path, row, message):
    with pytest.raises(ReleaseError, match=message) as caught:
        read(write(tmp_path / "r", rows=[row, *ROWS[1:]]))
    assert LABELS in str(caught.value) and "Correct or remove" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"b00,{NORMAL}x", "row 2: unknown class 'Normalx' of b00; the classes are 'Lung Opacity', 'Normal'"),
        (f"b00,{NORMAL}", "row 2: b00 is 'Normal', but has Target 1"),
        (f"a00,{OPACITY}", "row 2: a00 is 'Lung Opacity', but has Target 0"),
        (f"a00,{NORMAL}", f"row 17: a00 is '{NEITHER}', but 'Normal' in row 2"),
        ("b00", "row 2 has 1 cells, not 2"),
    ],
)
def test_wrong_rows_of_the_detailed_classes(tmp_path, row, message):
    with pytest.raises(ReleaseError, match=message) as caught:
        read(write(tmp_path / "r", classes=[row, *CLASS_ROWS[1:]]))
    assert DETAILS in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            HEADER.replace("Target", "label"),
            "unknown columns 'label' and no columns 'Target' in its first line; the columns are patientId, x, y",
        ),
        (HEADER + ",notes", "unknown columns 'notes' in its first line"),
        (HEADER.removesuffix(",Target"), "no columns 'Target'"),
        (HEADER + ",x", "a column twice"),
    ],
)
def test_unknown_columns(tmp_path, header, message):
    with pytest.raises(ReleaseError, match=f"{LABELS} has {message}"):
        read(write(tmp_path / "r", header=header))


def test_unknown_columns_of_the_detailed_classes(tmp_path):
    with pytest.raises(ReleaseError, match=f"{DETAILS} has unknown columns 'label' and no columns 'class'"):
        read(write(tmp_path / "r", class_header="patientId,label"))


def test_columns_in_another_order_byte_order_marks_and_line_ends(tmp_path):
    expected = read(write(tmp_path / "a"))
    root = write(tmp_path / "b")
    turned = [",".join([cells[5], *cells[:5]]) for cells in (line.split(",") for line in [HEADER, *ROWS])]
    (root / LABELS).write_bytes(("\ufeff" + "\r\n".join(turned)).encode())
    release = read(root)
    assert release.boxes.equals(expected.boxes)
    assert release.films.drop(columns="path").equals(expected.films.drop(columns="path"))


def test_rows_that_are_repaired(tmp_path):
    rows = ["b02,1000,-10,100,30,1", "b02,5,5,9,9,1", "b02,5,5,9,9,1", *ROWS, ROWS[-1]]
    release = read(write(tmp_path / "r", rows=rows))
    corners = release.boxes[["x1", "y1", "x2", "y2"]][release.boxes["image"] == "b02.dcm"].to_numpy().tolist()
    assert corners == [[1000, 0, 1024, 20], [5, 5, 14, 14], [102, 152.5, 315, 531.5]]
    expected = [["box clipped", "b02.dcm"], ["box repeated", "b02.dcm"], ["row repeated", "a23.dcm"]]
    assert release.problems[["kind", "item"]].to_numpy().tolist() == expected


# ---- store


def with_films(root: Path, bad: dict[str, bytes]) -> Path:
    write(root)
    for i, patient in enumerate([*POSITIVE, *NEGATIVE]):
        data = bad.get(patient, dicom(film(i), "MONOCHROME1" if i % 2 else "MONOCHROME2"))
        (root / FILMS / f"{patient}.dcm").write_bytes(data)
    return root


def test_the_store_of_dicom_films(tmp_path):
    release = read(with_films(tmp_path / "r", {}))
    stores = [open_store(release, tmp_path / f"s{workers}", SIZE, workers=workers) for workers in (1, 2)]
    for i in range(36):
        assert (stores[0].images[i] == (255 - film(i) if i % 2 else film(i))).all()
    assert (stores[0].images == stores[1].images).all() and stores[0].films.equals(release.films)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_films_are_named_or_listed(tmp_path):
    bad = {"b03": WHOLE[: len(WHOLE) // 2], "a07": WHOLE_JPEG[:-300], "a09": b"\x89PNG"}
    release = read(with_films(tmp_path / "r", bad))
    faults = r"b03\.dcm: it is truncated.*a07\.dcm: it is truncated.*a09\.dcm: it is not a DICOM"
    with pytest.raises(StoreError, match=f"3 of 36 films are unreadable: .*{faults}"):
        open_store(release, tmp_path / "s", SIZE, workers=1)
    store = open_store(release, tmp_path / "s", SIZE, workers=1, on_unreadable="skip")
    assert store.unreadable == ["b03.dcm", "a07.dcm", "a09.dcm"] and store.images.shape == (33, SIZE, SIZE)
    kept = release.without(store.unreadable)
    assert kept.films.equals(store.films) and len(kept.boxes) == 14 and len(kept.targets) == 33


# ---- the door


def study_of(root: Path, release: str, **changes) -> SimpleNamespace:
    parameters = {"release": release, "data_root": "", "folder": root, "release_folder": root / "release"}
    parameters |= {"store_folder": root / "store", "store_size": 32, "validation_fraction": 0.25}
    parameters |= {"skip_bad_films": False, "phantom_films": 32, "phantom_size": 64, "phantom_seed": 0}
    parameters |= {"phantom_floor": 0.035, "phantom_marker": "", "phantom_prevalence": 1.0}
    return SimpleNamespace(**(parameters | changes))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_open_data_reads_an_rsna_release(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK", 64)  # one task, so that no process is started
    root = with_films(tmp_path / "r", {"b03": WHOLE[:900]})
    study = study_of(tmp_path, "rsna", release_folder=root, data_root=str(root), skip_bad_films=True)
    release, store = open_data(study)
    assert release.films.equals(store.films) and len(store.images) == len(release.targets) == 35
    assert release.problems.iloc[-1].tolist() == ["film left out", "b03.dcm", "unreadable"]


def test_open_data_writes_the_phantom_in_this_layout(tmp_path):
    study = study_of(tmp_path, "phantom_rsna")
    for _ in range(2):  # written and built, then reused
        release, store = open_data(study)
        assert release.films.equals(store.films) and store.images.shape == (32, 32, 32) and len(release.problems) == 0
    positive = release.films["labels"] == "Pneumonia"
    assert set(release.boxes["image"]) == set(release.films["image"][positive])
    assert set(release.films["detail"]) == {OPACITY, NORMAL, NEITHER}
    assert release.boxes[["x2", "y2"]].to_numpy().max() > 64  # pixels of 1024, whatever the size of the phantom's films
    assert set(release.films["split"]) == {"train", "val", "test"} and store.images.std() > 10


def test_open_data_knows_its_releases(tmp_path):
    with pytest.raises(ValueError, match="release is 'mnist'.*'phantom_rsna'"):
        open_data(study_of(tmp_path, "mnist"))
