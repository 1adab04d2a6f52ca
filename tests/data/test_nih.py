import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib.data import reading
from lib.data import release as data
from lib.data.nih import read_names, read_release
from lib.data.release import (
    BOX_COLUMNS,
    CLASSES,
    FINDINGS,
    ReleaseError,
    film_boxes,
    shuffled_targets,
    task_boxes,
    task_targets,
)

ENTRY_2017 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
ENTRY_2020 = ENTRY_2017.rstrip(",")
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def entry(patient: int, visit: int, labels: str, age: str = "58") -> str:
    return f"{patient:08d}_{visit:03d}.png,{labels},{visit},{patient},{age},M,PA,2682,2749,0.143,0.143"


def image_of(line: str) -> str:
    return line.split(",")[0]


# Patients 1 to 8 are train_val (16 films), 9 and 10 test (4 films).
LABELS = [
    "Infiltration", "No Finding", "Effusion|Mass", "No Finding", "Mass", "Effusion", "No Finding",
    "Infiltration|Effusion", "Nodule", "Mass",
]  # fmt: skip
ENTRIES = [entry(patient, visit, LABELS[(patient + visit) % 10]) for patient in range(1, 11) for visit in range(2)]
TRAIN_VAL = [image_of(line) for line in ENTRIES[:16]]
TEST = [image_of(line) for line in ENTRIES[16:]]
BOXES = ["00000009_000.png,Mass,100.5,200,50,60.25", "00000010_000.png,Infiltrate,0,0,1024,1024"]


def write(
    root: Path,
    entries=ENTRIES,
    train_val=TRAIN_VAL,
    test=TEST,
    boxes=BOXES,
    header=ENTRY_2020,
    name="Data_Entry_2017.csv",
    end="\n",
    mark="",
    films=None,
) -> Path:
    """A release of empty films; None leaves a file out."""
    root.mkdir(exist_ok=True)

    def put(file, lines):
        (root / file).write_bytes((mark + "".join(line + end for line in lines)).encode())

    put(name, [header, *entries])
    for file, lines in (("train_val_list.txt", train_val), ("test_list.txt", test)):
        if lines is not None:
            put(file, lines)
    if boxes is not None:
        put("BBox_List_2017.csv", [BOX_HEADER, *boxes])
    for i, film in enumerate(sorted({image_of(line) for line in entries}) if films is None else films):
        folder = root / ("images" if films is None else f"images_{i % 3 + 1:03d}/images")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / film).touch()
    return root


def kinds(release) -> set[str]:
    return set(release.problems["kind"]) - {"class without positives"}


# ---- what is read


def test_a_sound_release(tmp_path):
    release = read_release(write(tmp_path / "r"))
    films = release.films
    assert list(films.columns) == list(data.FILM_COLUMNS)
    assert list(release.boxes.columns) == list(BOX_COLUMNS)
    assert list(films["image"]) == [image_of(line) for line in ENTRIES]
    assert isinstance(films.index, pd.RangeIndex) and len(films) == 20
    assert set(films["split"][:16]) == {"train", "val"} and set(films["split"][16:]) == {"test"}
    assert films["age"].dtype == float and (films["age"] == 58).all()
    assert films["follow_up"].tolist() == [0, 1] * 10
    assert films["patient"][18] == "10" and films["sex"][0] == "M" and films["view"][0] == "PA"
    assert all(os.path.isabs(path) and os.path.exists(path) for path in films["path"])
    assert kinds(release) == {"label alias"}
    assert release.boxes.iloc[0].tolist() == ["00000009_000.png", "Mass", 100.5, 200.0, 150.5, 260.25]
    assert release.boxes.iloc[1].tolist() == ["00000010_000.png", "Infiltration", 0.0, 0.0, 1024.0, 1024.0]


def test_classes_are_alphabetical():
    assert list(CLASSES) == sorted(CLASSES) and len(CLASSES) == 15 and CLASSES[10] == "No Finding"
    assert len(FINDINGS) == 14


def test_targets_against_a_loop(tmp_path):
    release = read_release(write(tmp_path / "r"))
    assert release.targets.dtype == np.uint8
    for labels, row in zip(release.films["labels"], release.targets, strict=True):
        assert row.tolist() == [int(name in labels.split("|")) for name in CLASSES]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("header", "age"),
    [
        (ENTRY_2017, "058Y"),
        (ENTRY_2020, "58"),
        (ENTRY_2020.replace("Gender", "Sex"), "58.0"),
        (f"{ENTRY_2020},", "058y"),
    ],
)
def test_both_generations_line_ends_and_byte_order_marks(tmp_path, header, age, end, mark):
    tail = "," if header.endswith(",") else ""
    entries = [line.replace(",58,", f",{age},") + tail for line in ENTRIES]
    files = {"entries": entries, "header": header, "end": end, "mark": mark, "name": "Data_Entry_2017_v2020.csv"}
    release = read_release(write(tmp_path / "r", **files))
    assert (release.films["age"] == 58).all() and len(release.boxes) == 2 and (release.films["view"] == "PA").all()


def test_ages_in_other_units_and_impossible_ones(tmp_path):
    ages = ["006M", "010D", "414", "", "old", *["58"] * 5, "-3", "nan", "1e400", "9" * 400, "\uff15\uff18", *["58"] * 5]
    entries = [line.replace(",58,", f",{age},") for line, age in zip(ENTRIES, ages, strict=True)]
    release = read_release(write(tmp_path / "r", entries=entries))
    assert release.films["age"][0] == 0.5 and release.films["age"][1] == pytest.approx(10 / 365.25)
    assert release.films["age"][2:5].isna().all() and release.films["age"][10:15].isna().all()
    assert (release.problems["kind"] == "age impossible").sum() == 8


def test_numbered_folders(tmp_path):
    release = read_release(write(tmp_path / "r", films=[image_of(line) for line in ENTRIES]))
    folders = {Path(path).parent.parent.name for path in release.films["path"]}
    assert folders == {"images_001", "images_002", "images_003"}


def test_a_film_in_two_folders_is_taken_from_the_first(tmp_path):
    root = write(tmp_path / "r")
    (root / "images_001").mkdir()
    (root / "images_001" / TRAIN_VAL[0]).touch()
    release = read_release(root)
    assert release.films["path"][0] == str(root / "images" / TRAIN_VAL[0])
    assert "film found twice" in kinds(release)


def test_films_as_jpeg_or_in_capitals_under_the_stem(tmp_path):
    root = write(tmp_path / "r")
    expected = read_release(root).films
    suffixes = [".jpg", ".jpeg", ".JPG", ".PNG"]
    for name, suffix in zip(TRAIN_VAL, suffixes):
        (root / "images" / name).rename((root / "images" / name).with_suffix(suffix))
    release = read_release(root)
    assert [Path(path).suffix for path in release.films["path"]] == suffixes + [".png"] * 16
    assert release.films.drop(columns="path").equals(expected.drop(columns="path")) and kinds(release) == {
        "label alias"
    }


def test_of_several_files_of_one_stem_png_goes_before_jpg_before_jpeg(tmp_path):
    root = write(tmp_path / "r")
    for name in (TRAIN_VAL[0], TRAIN_VAL[1]):
        for suffix in (".jpg", ".jpeg", ".PNG"):
            (root / "images" / name).with_suffix(suffix).touch()
    (root / "images" / TRAIN_VAL[1]).unlink()
    (root / "images" / TRAIN_VAL[1]).with_suffix(".PNG").unlink()
    (root / "images_001").mkdir()
    (root / "images_001" / TRAIN_VAL[2]).with_suffix(".jpg").touch()
    release = read_release(root)
    stem = str(root / "images" / TRAIN_VAL[1]).removesuffix(".png")
    assert release.films["path"][:3].tolist() == [
        str(root / "images" / TRAIN_VAL[0]), f"{stem}.jpg", str(root / "images" / TRAIN_VAL[2])
    ]  # fmt: skip
    notes = release.problems.query("kind == 'film found twice'")
    assert notes["item"].tolist() == ["images", "images_001"]
    assert notes["detail"][0].startswith("4 files") and notes["detail"][1].startswith("1 films")


@pytest.mark.parametrize("kind", ["dangling", "looping", "device", "pipe", "folder"])
def test_only_regular_files_are_films(tmp_path, kind):
    root = write(tmp_path / "r")
    film, other = root / "images" / TRAIN_VAL[0], root / "images" / TRAIN_VAL[1]
    film.unlink()
    other.rename(root / "elsewhere.png")
    other.symlink_to(root / "elsewhere.png")
    targets = {"dangling": "nowhere", "looping": film, "device": "/dev/zero"}
    {"pipe": lambda: os.mkfifo(film), "folder": film.mkdir}.get(kind, lambda: film.symlink_to(targets[kind]))()
    with pytest.raises(
        ReleaseError, match="1 of 20 films are missing from images .*00000001_000.png.*a link must lead"
    ):
        read_release(root)
    release = read_release(root, on_missing="skip")
    assert release.problems.query("kind == 'film missing'")["item"].tolist() == [TRAIN_VAL[0]]
    assert release.films["path"][0] == str(other)


def test_names_that_are_no_text_beside_the_films(tmp_path):
    root = write(tmp_path / "r")
    expected = read_release(root).films
    Path(os.fsdecode(os.fsencode(root) + b"/images/\xff.png")).touch()
    assert read_release(root).films.equals(expected)


def test_no_box_list_is_noted(tmp_path):
    release = read_release(write(tmp_path / "r", boxes=None))
    assert len(release.boxes) == 0 and list(release.boxes.columns) == list(BOX_COLUMNS)
    assert release.boxes["x1"].dtype == float
    assert "no boxes" in kinds(release)
    assert len(film_boxes(release.boxes, 224)) == 0 and len(task_boxes(release.boxes, "binary")) == 0


def test_the_box_list_is_found_whatever_its_case(tmp_path):
    root = write(tmp_path / "r")
    (root / "BBox_List_2017.csv").rename(root / "BBox_list_2017.csv")
    assert len(read_release(root).boxes) == 2


def test_nothing_is_opened_or_changed(tmp_path):
    root = write(tmp_path / "r")
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    read_release(root)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))


# ---- validation split


def random_release(root: Path, n_patients: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    prevalence = rng.dirichlet(np.full(15, 0.3))
    entries = []
    for patient in range(1, n_patients + 1):
        for visit in range(1 + rng.geometric(0.4)):
            labels = sorted(set(rng.choice(15, rng.integers(1, 4), p=prevalence).tolist()) - {10})
            entries.append(entry(patient, visit, "|".join(CLASSES[i] for i in labels) or "No Finding"))
    cut = next(i for i, line in enumerate(entries) if f",{n_patients - 1}," in line)
    return write(root, entries, [image_of(e) for e in entries[:cut]], [image_of(e) for e in entries[cut:]], None)


@pytest.mark.parametrize("seed", range(6))
def test_validation_is_drawn_by_patient_and_keeps_every_class_on_both_sides(tmp_path, seed):
    release = read_release(random_release(tmp_path / "r", 120, seed), validation_fraction=0.2, seed=seed)
    films = release.films
    assert (films.groupby("patient")["split"].nunique() == 1).all()
    pool = films["split"] != "test"
    share = (films["split"] == "val").sum() / pool.sum()
    assert 0.15 <= share <= 0.25
    for column in range(15):
        having = films["patient"][pool & (release.targets[:, column] == 1)].nunique()
        in_split = {split: release.targets[films["split"] == split, column].sum() for split in ("train", "val")}
        if having >= 1:
            assert in_split["train"] > 0
        if having >= 4:  # with fewer, another class of the same patients may stand in the way
            assert in_split["val"] > 0


def test_validation_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path):
    root = random_release(tmp_path / "r", 60, 0)
    first, again, other = (read_release(root, seed=seed).films.set_index("image")["split"] for seed in (3, 3, 4))
    assert first.equals(again) and not first.equals(other)
    lines = (root / "Data_Entry_2017.csv").read_text().splitlines()
    (root / "Data_Entry_2017.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert read_release(root, seed=3).films.set_index("image")["split"].loc[first.index].equals(first)


def test_one_patient_cannot_be_divided(tmp_path):
    root = write(tmp_path / "r", train_val=TRAIN_VAL[:2])
    with pytest.raises(ReleaseError, match="val split is empty.*more than one patient"):
        read_release(root)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_validation_fraction_is_checked(tmp_path, fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        read_release(tmp_path, validation_fraction=fraction)


# ---- what is missing


def test_missing_films(tmp_path):
    root = write(tmp_path / "r")
    gone = [TRAIN_VAL[0], TRAIN_VAL[3], TEST[0]]
    for name in gone:
        (root / "images" / name).unlink()
    with pytest.raises(ReleaseError, match=r"3 of 20 films.*00000001_000\.png.*on_missing='skip'"):
        read_release(root)
    release = read_release(root, on_missing="skip")
    assert len(release.films) == 17 and not set(gone) & set(release.films["image"])
    assert release.problems.query("kind == 'film missing'")["item"].tolist() == gone
    assert release.problems.query("kind == 'box left out'")["item"].tolist() == ["00000009_000.png"]
    assert len(release.boxes) == 1


def test_all_films_missing_leaves_no_split(tmp_path):
    root = write(tmp_path / "r")
    for film in (root / "images").iterdir():
        film.unlink()
    for choice in ("error", "skip"):
        with pytest.raises(ReleaseError, match="20 of 20 films are missing from images under .*cannot help where all"):
            read_release(root, on_missing=choice)
    (root / "images" / TRAIN_VAL[0]).touch()
    with pytest.raises(ReleaseError, match="split is empty"):
        read_release(root, on_missing="skip")


def test_lists_of_another_release(tmp_path):
    root = write(tmp_path / "r", train_val=["a.png", "b.png"], test=["c.png"])
    with pytest.raises(ReleaseError, match="3 films.*no row in.*a.png, b.png, c.png.*cannot help where all"):
        read_release(root, on_missing="skip")


def test_a_listed_film_without_a_row(tmp_path):
    root = write(tmp_path / "r", train_val=[*TRAIN_VAL, "00009999_000.png"])
    with pytest.raises(ReleaseError, match="1 films.*no row.*00009999_000.png"):
        read_release(root)
    assert "listed film without a row" in kinds(read_release(root, on_missing="skip"))


def test_a_film_in_no_list_is_left_out(tmp_path):
    release = read_release(write(tmp_path / "r", train_val=TRAIN_VAL[1:]))
    assert len(release.films) == 19
    assert release.problems.query("kind == 'film in no list'")["item"].tolist() == TRAIN_VAL[:1]


@pytest.mark.parametrize("file", ["train_val_list.txt", "test_list.txt", "Data_Entry_2017.csv"])
def test_missing_and_empty_files(tmp_path, file):
    root = write(tmp_path / "r")
    (root / file).write_text("")
    with pytest.raises(ReleaseError, match=f"{file} (is empty|has no rows)"):
        read_release(root)
    (root / file).unlink()
    with pytest.raises(ReleaseError, match="missing|holds no"):
        read_release(root)


def test_no_root_two_csvs_no_folder(tmp_path):
    with pytest.raises(ReleaseError, match="is not a folder"):
        read_release(tmp_path / "nowhere")
    root = write(tmp_path / "r")
    (root / "Data_Entry_2017_v2020.csv").write_text(ENTRY_2020)
    with pytest.raises(ReleaseError, match="2 files.*keep exactly one"):
        read_release(root)
    (root / "Data_Entry_2017_v2020.csv").unlink()
    (root / "images").rename(root / "films")
    with pytest.raises(ReleaseError, match="no folder of films"):
        read_release(root)


# ---- what is wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (entry(1, 0, "Effusion|Broken Rib"), r"row 2: unknown label 'Broken Rib' of 00000001_000\.png"),
        (entry(1, 0, ""), "row 2: unknown label ''"),
        (entry(1, 0, "No Finding|Mass"), "row 2.*'No Finding' and a finding at once"),
        ("images/" + entry(1, 0, "Mass"), "row 2.*path in it; write the bare file name"),
        ("..\\" + entry(1, 0, "Mass"), "row 2.*path in it"),
        (entry(1, 0, "Mass").replace(".png", ".dcm"), "row 2.*not the name of a .png"),
        (ENTRIES[4], "row 6: 00000003_000.png is there already, in row 2"),
        ("00000001_000.png,Mass,0", "row 2 has 3 cells"),
        (ENTRIES[4].replace(".png", ".PNG"), r"row 6: 00000003_000.png is there already, in row 2 \(in capitals"),
        (entry(1, 0, "Effusion") + ",more", "row 2 has 12 cells, but the first line 11"),
        (entry(1, 0, "a\tb").replace("00000001", "a\tb"), r"row 2: Image Index 'a\\tb_000.png' is not the name"),
        (entry(1, 0, "y" * 900), "row 2: unknown label 'y{78}… of 00000001_000.png"),
        (entry(1, 0, "Mass").replace(",0,1,", ",x,1,"), "row 2.*Follow-up # 'x'"),
        (entry(1, 0, "Mass").replace(",0,1,", ",\u00b2,1,"), "row 2.*Follow-up # '\u00b2' of .* is not a number"),
        (entry(1, 0, "Mass").replace(",0,1,", ",1.5,1,"), "row 2.*Follow-up # '1.5'"),
        (entry(1, 0, "Mass").replace(",0,1,", f",{10**19},1,"), "row 2.*Follow-up # '1000"),
        (entry(1, 0, "Mass").replace(",0,1,", ",0,,"), "row 2.*no Patient ID"),
    ],
)
def test_wrong_rows_of_data_entry(tmp_path, line, message):
    root = write(tmp_path / "r", entries=[line, *ENTRIES[1:]], films=[image_of(e) for e in ENTRIES])
    with pytest.raises(ReleaseError, match=message) as caught:
        read_release(root)
    assert "Data_Entry_2017.csv" in str(caught.value) and "Correct or remove" in str(caught.value)


def test_several_wrong_rows_are_named_at_once(tmp_path):
    entries = [line.replace("Mass", "Lump") for line in ENTRIES]
    with pytest.raises(ReleaseError, match=r"row \d+.*; row \d+.*and \d more"):
        read_release(write(tmp_path / "r", entries=entries))


@pytest.mark.parametrize("file", ["Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"])
def test_lists_are_regular_files(tmp_path, file):
    path = write(tmp_path / "r") / file
    for make, message in (
        (path.mkdir, "a folder, a pipe or a device"),
        (lambda: os.mkfifo(path), "a folder, a pipe or a device"),
        (lambda: path.symlink_to("/dev/zero"), "a folder, a pipe or a device"),
        (lambda: path.symlink_to(path), "cannot be read .*symbolic links"),
        (lambda: path.symlink_to("nowhere"), "is missing"),
        (lambda: (path.touch(), os.truncate(path, 2**33)), "8,589,934,592 bytes long"),
    ):
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        make()
        with pytest.raises(ReleaseError, match=f"{file} .*{message}"):
            read_release(path.parent)


def put(path: Path, row: int, line: bytes) -> None:
    """Another line in the place of a row of a list, counted from 1."""
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[: row - 1], line, *lines[row:]]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'00000001_001.png,"Mass,1,1,58,M,PA', "a quote is not closed in its row"),
        (b'00000001_001.png,"Mass"x,1,1,58,M,PA', "',' expected after"),
        (b"00000001_001.png,P\xe4,1,1,58,M,PA", "a character that is not utf-8 or cannot be seen"),
        (b"00000001_001.png,Mass\0,1,1,58,M,PA", "a character that is not utf-8 or cannot be seen"),
        (b"00000001_001.png,Mass,1,1\xe2\x80\x8b,58,M,PA", r"cannot be seen \('1\\u200b'\)"),
        (b"\x1b]0;title\x07.png,Mass,1,1,58,M,PA", r"cannot be seen \('\\x1b]0;title"),
        (b"00000001_001.png," + b"y" * 1001 + b",1,1,58,M,PA", "a cell has 1,001 characters"),
        (b"00000001_001.png," + b"y" * 10**7 + b",1,1,58,M,PA", "larger than field limit"),
    ],
)
def test_a_broken_row_is_named(tmp_path, line, message):
    path = write(tmp_path / "r") / "Data_Entry_2017.csv"
    put(path, 3, line)
    put(path, 5, b'00000002_001.png,"Mass",1,2,58,M,PA')  # a quote must not be closed by a later one
    with pytest.raises(ReleaseError, match=f"Data_Entry_2017.csv is not a readable csv in utf-8, row 3: .*{message}"):
        read_release(path.parent)


def test_messages_are_one_short_line_whatever_the_data_hold(tmp_path):
    long = [line.replace("Mass", "y" * 900) for line in ENTRIES]
    for i, (change, value) in enumerate(
        [("entries", long), ("header", ENTRY_2020.replace("Patient ID", "z" * 900)), ("train_val", ["w" * 900])]
    ):
        root = tmp_path / f"r\n\x1b[2J{i}"
        with pytest.raises(ReleaseError) as caught:
            read_release(write(root, **{change: value}))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
        assert rf"r\n\x1b[2J{i}" in str(caught.value)
    problems = data.problem_frame([("film left out", "\udcff\x1b[2J.png", "a\nb")])
    assert problems.iloc[0].tolist() == ["film left out", r"\udcff\x1b[2J.png", r"a\nb"]


@pytest.mark.parametrize("root", ["a\0b", "~nobody of this name/x", "/" + "x" * 5000, "r\udcff", "loop", "file"])
def test_a_root_that_is_none(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    os.mkdir(os.fsencode(tmp_path) + b"/r\xff")
    with pytest.raises(ReleaseError, match="is not a folder.*give the folder that holds Data_Entry") as caught:
        read_release(root)
    assert len(str(caught.value)) < 1000


def test_folders_that_cannot_be_listed_or_named(tmp_path, monkeypatch):
    root = write(tmp_path / "r")
    os.mkdir(os.fsencode(root) + b"/images_\xff")
    with pytest.raises(ReleaseError, match=r"images_\\udcff has a character in its name that cannot be seen; rename"):
        read_release(root)
    scandir = os.scandir

    def refuse(folder):
        if str(folder) == refused:
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(reading.os, "scandir", refuse)
    for refused in (str(root), str(root / "images")):
        with pytest.raises(ReleaseError, match=f"{refused} cannot be listed .Permission denied.; mend"):
            read_release(root)


def test_missing_columns(tmp_path):
    with pytest.raises(ReleaseError, match="lacks the columns Patient ID in its first line"):
        read_release(write(tmp_path / "r", header=ENTRY_2020.replace("Patient ID", "Person")))
    with pytest.raises(ReleaseError, match="not a readable csv in utf-8"):
        root = write(tmp_path / "s")
        (root / "Data_Entry_2017.csv").write_bytes(ENTRY_2020.encode("utf-16"))
        read_release(root)
    with pytest.raises(ReleaseError, match="not a readable csv in utf-8, row 1"):
        (root / "Data_Entry_2017.csv").write_bytes(ENTRY_2020.encode("utf-16-le"))
        read_release(root)
    with pytest.raises(ReleaseError, match="has the columns Patient Gender twice in its first line"):
        read_release(write(tmp_path / "t", header=ENTRY_2020.replace("View", "Patient Sex,View")))
    with pytest.raises(ReleaseError, match="it has Image Index;Finding Labels;.*commas between its cells"):
        read_release(write(tmp_path / "u", header=ENTRY_2020.replace(",", ";")))


def test_repaired_labels_are_noted(tmp_path):
    entries = [entry(1, 0, "Infiltrate|Mass|Mass"), *ENTRIES[1:]]
    release = read_release(write(tmp_path / "r", entries=entries))
    assert release.films["labels"][0] == "Infiltration|Mass"
    assert {"label alias", "label repeated"} <= kinds(release)


def test_patients_on_both_sides(tmp_path):
    root = write(tmp_path / "r", train_val=[*TRAIN_VAL, TEST[0]], test=TEST[1:])
    with pytest.raises(ReleaseError, match=r"1 patients are on both sides.*patient 9.*00000009_000\.png"):
        read_release(root)


def own_release(root: Path, ids: dict[int, str], name="film{:02d}.png") -> Path:
    """A release whose films are not named as NIH's: two films of each of ten patients, but `ids` of some rows."""
    names = [name.format(i) for i in range(20)]
    rows = [f'{names[i]},Mass,{i % 2},"{ids.get(i, f"P{i // 2}")}",58,M,PA' for i in range(20)]
    lists = {"train_val": names[:16], "test": names[16:]}
    return write(root, rows, **lists, boxes=None, header=ENTRY_2020.split(",Orig")[0])


@pytest.mark.parametrize("other", ["00000001", "1.0", "01.0"])
def test_a_number_in_another_spelling_is_the_same_patient(tmp_path, other):
    with pytest.raises(ReleaseError, match="1 patients are on both sides.*patient 1;.*film00.png, film16.png"):
        read_release(own_release(tmp_path / "r", {0: "1", 16: other}))
    release = read_release(own_release(tmp_path / "s", {0: "1", 1: other}))
    assert release.films["patient"].tolist() == ["1", "1", *[f"P{i // 2}" for i in range(2, 20)]]


@pytest.mark.parametrize(("one", "other"), [("P1", "p1"), ("\u00e91", "e\u03011"), ("A1", "\uff211"), ("12e0", "12E0")])
def test_one_patient_in_two_spellings_is_refused(tmp_path, one, other):
    message = f"row 18: Patient ID {other!a} of film16.png and {one!a} in row 2 are one in two spellings"
    with pytest.raises(ReleaseError, match=re.escape(message)):
        read_release(own_release(tmp_path / "r", {0: one, 16: other}))


@pytest.mark.parametrize(
    "patient", ["\u00b2", "\uff11", "\u0663", "+1", "1.00", "1,0", "1e+2", "1.2E+02", "inf", "-Infinity"]
)
def test_a_number_as_patient_is_written_in_plain_digits(tmp_path, patient):
    message = f"row 2: Patient ID {patient!r} of film00.png is a number, but not written with the digits 0 to 9 alone"
    with pytest.raises(ReleaseError, match=re.escape(message)):
        read_release(own_release(tmp_path / "r", {0: patient}))


@pytest.mark.parametrize("patient", ["nan", "NaN", "None", "null", "NA", "N/A", "#N/A", "<NA>"])
def test_nobody_is_no_patient(tmp_path, patient):
    with pytest.raises(ReleaseError, match=re.escape(f"row 2: film00.png has no Patient ID ({patient!r})")):
        read_release(own_release(tmp_path / "r", {0: patient}))


@pytest.mark.parametrize(("patient", "said"), [("2.0", "2"), ("12", "12"), ("0", "0"), ("P1", "P1")])
def test_the_patient_is_the_one_of_a_film_named_as_nih_names_them(tmp_path, patient, said):
    entries = [ENTRIES[0].replace(",0,1,", f",0,{patient},"), *ENTRIES[1:]]
    with pytest.raises(
        ReleaseError, match=f"row 2: Patient ID '{said}' of 00000001_000.png is not the 1 that its name"
    ):
        read_release(write(tmp_path / "r", entries=entries))


@pytest.mark.parametrize(
    "name", ["201901{:02d}_001.png", "film {:02d}.png", "$(x) {:02d};'.png", "000000{:02d}_00.png"]
)
def test_other_names_say_nothing_of_patients(tmp_path, name):
    ids = {0: "1234e567", 1: "1234e567", 2: "1.2.840.1", 3: "1.2.840.1", 4: "007", 5: "7"}
    films = read_release(own_release(tmp_path / "r", ids, name)).films
    assert films["patient"].tolist()[:7] == ["1234e567", "1234e567", "1.2.840.1", "1.2.840.1", "7", "7", "P3"]
    assert films["image"].tolist() == [name.format(i) for i in range(20)]


def test_hints_at_two_persons_under_one_id_are_noted(tmp_path):
    entries = [ENTRIES[0].replace(",M,", ",F,"), ENTRIES[1], ENTRIES[2].replace(",58,", ",70,"), *ENTRIES[3:]]
    entries[4] = entries[4].replace(",58,", ",59,")  # a year less is rounding
    notes = read_release(write(tmp_path / "r", entries=entries)).problems
    assert notes[notes["kind"].isin(["patient of two sexes", "age falls"])]["item"].tolist() == ["1", "2"]


def test_lists(tmp_path):
    with pytest.raises(ReleaseError, match="1 films are in train_val_list.txt and in test_list.txt"):
        read_release(write(tmp_path / "a", test=[*TEST, TRAIN_VAL[0]]))
    with pytest.raises(ReleaseError, match="train_val_list.txt: row 1.*path in it"):
        read_release(write(tmp_path / "b", train_val=["images/" + name for name in TRAIN_VAL]))
    assert "line repeated" in kinds(read_release(write(tmp_path / "c", test=[*TEST, "", TEST[0]])))
    with pytest.raises(ReleaseError, match="test_list.txt: row 1 has more than a film name: '00000009_001.png'"):
        read_release(write(tmp_path / "d", test=[",".join(TEST[:2]), *TEST[2:]]))
    assert "test larger than train" in kinds(
        read_release(write(tmp_path / "e", train_val=TRAIN_VAL[:8], test=TRAIN_VAL[8:] + TEST))
    )


def test_a_list_of_names_with_labels_behind_them(tmp_path):
    path = tmp_path / "train_list.txt"
    rows = ["\ufeff00000001_000.png 0 1 0", "", " images/00000002_001.png\t1", "a-b.dcm,1,0", "00000001_000.png", ""]
    path.write_bytes("\r\n".join(rows).encode())
    assert read_names(str(path), ["a-b.dcm"]) == {"00000001_000.png", "00000002_001.png", "a-b.dcm"}
    message = "names no film of this release; it begins with '00000001_000.png', the release has 'b.png'"
    with pytest.raises(ReleaseError, match=f"train_list.txt {message}"):
        read_names(path, ["c.png", "b.png"])
    for content, message in (
        (b"a.png 1\n,1\n", "train_list.txt: row 2 does not begin with a film name"),
        (b" \n\n", "train_list.txt is empty"),
        (b"a.png\n\xff\n", "train_list.txt is not a readable csv in utf-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ReleaseError, match=message):
            read_names(path, ["a.png"])
    with pytest.raises(ReleaseError, match="nowhere.txt is missing"):
        read_names(tmp_path / "nowhere.txt", ["a.png"])
    path.write_bytes(b"C:\\films\\a.png 1\nfilms/b c.png\nb c.png 0/1\n")
    assert {"a.png", "b c.png"} <= read_names(path, ["a.png", "b c.png"])
    path.write_bytes(b'"a.png\nb.png\n')
    with pytest.raises(ReleaseError, match="row 1: a quote is not closed"):
        read_names(path, ["a.png"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00000009_000.png,Lump,1,1,5,5", "row 2: unknown label 'Lump'"),
        ("00000009_000.png,No Finding,1,1,5,5", "row 2: unknown label 'No Finding'"),
        ("00009999_000.png,Mass,1,1,5,5", "row 2: 00009999_000.png is not in Data_Entry"),
        ("images/00000009_000.png,Mass,1,1,5,5", "row 2.*path in it"),
        ("00000009_000.png,Mass,1,1,0,5", "row 2.*no area"),
        ("00000009_000.png,Mass,1,1,5,-5", "row 2.*no area"),
        ("00000009_000.png,Mass,nan,1,5,5", "row 2.*no area"),
        ("00000009_000.png,Mass,1024,1,5,5", "row 2.*outside its film"),
        ("00000009_000.png,Mass,-5,1,5,5", "row 2.*outside its film"),
        ("00000009_000.png,Mass,1,1,5,1e-300", "row 2.*no area"),
        ("00000009_000.png,Mass,1,1,1e308,5", "row 2.*larger than two films"),
        ("00000009_000.png,Mass,1,1,5,2049", "row 2.*larger than two films"),
        ("00000009_000.png,Mass,1,1,1_0,5", "row 2 is not a film, a label and four numbers"),
        ("00000009_000.png,Mass,1,1,\uff15,5", "row 2 is not a film, a label and four numbers"),
        ("00000009_000.png,Mass,1,1,5,5,7", "row 2 is not a film, a label and four numbers"),
        ("00000009_000.png,Mass,1,1,5,", "row 2 is not a film, a label and four numbers"),
        ("00000009_000.png,Mass", "row 2 is not a film, a label and four numbers"),
    ],
)
def test_wrong_boxes(tmp_path, line, message):
    with pytest.raises(ReleaseError, match=message) as caught:
        read_release(write(tmp_path / "r", boxes=[line]))
    assert "BBox_List_2017.csv" in str(caught.value)


def test_boxes_that_are_repaired(tmp_path):
    inside = "00000009_000.png,Mass,5,5,9,9"
    boxes = ["00000009_000.png,Mass,1000,-10,100,30,,,", inside, inside, "00009999_000.png,Mass,5,5,9,9"]
    release = read_release(write(tmp_path / "r", boxes=boxes), on_missing="skip")
    assert release.boxes[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == [[1000, 0, 1024, 20], [5, 5, 14, 14]]
    assert {"box clipped", "box repeated", "box left out"} <= kinds(release)


def test_a_box_without_its_label_is_noted(tmp_path):
    root = write(tmp_path / "r", boxes=["00000010_000.png,Hernia,1,1,5,5"])
    assert "box without its label" in kinds(read_release(root))


def test_a_box_list_that_is_none(tmp_path):
    root = write(tmp_path / "r")
    (root / "BBox_List_2017.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ReleaseError, match="must begin with"):
        read_release(root)
    (root / "BBox_List_2017.csv").write_text("")
    with pytest.raises(ReleaseError, match="is empty"):
        read_release(root)
    (root / "BBox_List_2017.csv").write_text(BOX_HEADER)
    assert len(read_release(root).boxes) == 0
    assert "no boxes" in kinds(read_release(root))


def test_classes_without_positives_are_noted(tmp_path):
    release = read_release(write(tmp_path / "r"))
    notes = release.problems.query("kind == 'class without positives'")
    for split in ("train", "val", "test"):
        positives = release.targets[release.films["split"] == split].sum(0)
        absent = {name for name, n in zip(CLASSES, positives, strict=True) if n == 0}
        assert set(notes["item"][notes["detail"].str.contains(split)]) == absent


# ---- pure functions


def test_without(tmp_path):
    release = read_release(write(tmp_path / "r"))
    smaller = release.without([TEST[0]], "truncated")
    assert len(smaller.films) == 19 and smaller.films.index.tolist() == list(range(19)) and len(smaller.boxes) == 1
    assert smaller.problems.iloc[-1].tolist() == ["film left out", TEST[0], "truncated"]
    assert len(release.films) == 20 and len(smaller.targets) == 19
    with pytest.raises(ReleaseError, match="test split is empty"):
        release.without(TEST)


def test_tasks():
    targets = np.eye(15, dtype=np.uint8)
    full, names = task_targets(targets, "multilabel")
    assert (full == targets).all() and names == list(CLASSES)
    fourteen, names = task_targets(targets, "multilabel", no_finding=False)
    assert names == list(FINDINGS) and fourteen.shape == (15, 14) and (fourteen.sum(1) == (np.arange(15) != 10)).all()
    binary, names = task_targets(targets, "binary")
    assert names == ["Unhealthy"] and binary.shape == (15, 1) and binary.dtype == np.uint8
    assert (binary[:, 0] == (np.arange(15) != 10)).all()
    with pytest.raises(ValueError, match="task is 'ternary'"):
        task_targets(targets, "ternary")
    with pytest.raises(ValueError, match="task is"):
        task_boxes(pd.DataFrame(), "ternary")


def test_boxes_of_tasks_and_film_sizes(tmp_path):
    boxes = read_release(write(tmp_path / "r")).boxes
    assert task_boxes(boxes, "multilabel").equals(boxes)
    assert set(task_boxes(boxes, "binary")["class"]) == {"Unhealthy"}
    assert boxes["class"].tolist() == ["Mass", "Infiltration"]
    assert film_boxes(boxes, 1024).equals(boxes)
    scaled = film_boxes(boxes, 224)
    assert scaled.iloc[1][["x1", "y1", "x2", "y2"]].tolist() == [0, 0, 224, 224]
    assert scaled["x1"][0] == pytest.approx(100.5 * 224 / 1024) and boxes["x1"][0] == 100.5


# ---- the real sample


@pytest.mark.skipif("NIH_SAMPLE" not in os.environ, reason="set NIH_SAMPLE to the folder of the real NIH sample")
def test_the_real_sample():
    release = read_release(os.environ["NIH_SAMPLE"])
    assert len(release.films) == 529 and release.films["patient"].nunique() == 402
    assert (release.films["split"] == "test").sum() == 251
    assert release.boxes["image"].nunique() == 452
    assert kinds(release) == {"label alias"}
    corners = release.boxes[["x1", "y1", "x2", "y2"]].to_numpy()
    assert corners.min() >= 0 and corners.max() <= 1024


def test_shuffled_targets_are_the_same_sets_on_other_films():
    targets = np.random.default_rng(0).integers(0, 2, (40, 5)).astype(np.uint8)
    rows = np.arange(5, 35)
    dealt = shuffled_targets(targets, rows, seed=3)
    assert sorted(map(bytes, dealt[rows])) == sorted(map(bytes, targets[rows]))
    assert (dealt[rows] != targets[rows]).any(axis=1).mean() > 0.5
    np.testing.assert_array_equal(np.delete(dealt, rows, 0), np.delete(targets, rows, 0))
    np.testing.assert_array_equal(dealt, shuffled_targets(targets, rows, seed=3))
    assert (dealt != shuffled_targets(targets, rows, seed=4)).any()
