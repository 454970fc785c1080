# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from monai.transforms import EnsureChannelFirst, LoadImage
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from ahm_transforms.io import BadCasesError, CaseReader, LoadCased, load_cases, load_image
from ahm_transforms.io.reader import LabelReader
from tests.fixtures_data import write_nifti, write_series


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6), (5, 6, 7, 2)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_read_as_monai_reads_it(tmp_path: Path, shape: tuple, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_nifti(path, shape, np.array([[0, -2.0, 0, 3], [1, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]]))
    ours, monai = load_image(path), LoadImage(reader="NibabelReader")(path)
    assert ours.dtype == monai.dtype
    np.testing.assert_array_equal(ours.numpy(), monai.numpy())
    np.testing.assert_array_equal(ours.affine, monai.affine)
    assert EnsureChannelFirst()(ours).shape == EnsureChannelFirst()(monai).shape


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        *(("L", ".png", 1), ("L", ".tif", 1), ("L", ".jpg", 1), ("RGB", ".png", 3), ("RGB", ".tiff", 3)),
        *(("RGBA", ".png", 3), ("LA", ".png", 1), ("P", ".png", 3), ("1", ".png", 1), ("I;16", ".png", 1)),
    ],
)
def test_pictures_are_grey_or_colour_however_they_are_stored(
    tmp_path: Path, mode: str, suffix: str, channels: int
) -> None:
    path = tmp_path / f"a{suffix}"
    if mode == "I;16":
        Image.fromarray(np.full((6, 4), 40_000, np.uint16)).save(path)
    else:
        Image.new("RGB", (4, 6), (255, 255, 255)).convert(mode).save(path)
    image = EnsureChannelFirst()(load_image(path))
    assert image.shape == (channels, 4, 6)  # width comes first, as in all of MONAI's readers
    assert image.min() == (40_000 if mode == "I;16" else 255)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("reader", [CaseReader(), LabelReader()], ids=["image", "label"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_pictures_lie_as_viewers_show_them(
    tmp_path: Path, suffix: str, reader: CaseReader, orientation: int, turns: int
) -> None:
    values = np.zeros((16, 32), np.uint8)
    values[:8, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if suffix == ".tif" else {}
    Image.fromarray(values).save(tmp_path / f"a{suffix}", exif=exif, **options)
    image = load_image(tmp_path / f"a{suffix}", reader=reader)
    shown = np.rot90(values, turns).T  # width first
    assert image.meta["spatial_shape"].tolist() == list(shown.shape)
    np.testing.assert_allclose(image.numpy(), shown, atol=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", [1, 3])
def test_a_tiff_is_bright_where_it_is_shown_bright(tmp_path: Path, dtype: type, orientation: int) -> None:
    values = np.arange(24).reshape(6, 4).astype(dtype)
    white_is_zero = values if dtype is np.uint8 else 65_535 - values  # Pillow turns 8 bits around as it writes
    Image.fromarray(values).save(tmp_path / "black.tif", tiffinfo={262: 1, 274: orientation})
    Image.fromarray(white_is_zero).save(tmp_path / "white.tif", tiffinfo={262: 0, 274: orientation})
    for name in ("black.tif", "white.tif"):
        image = load_image(tmp_path / name).numpy()
        np.testing.assert_array_equal(image, (values if orientation == 1 else values[::-1, ::-1]).T)


def test_numbers_of_labels_are_not_turned(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 4), 2, np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert (load_image(tmp_path / "a.tif", reader=LabelReader()) == 2).all()


@pytest.mark.parametrize("reader", [CaseReader(), LabelReader()], ids=["image", "label"])
def test_colours_that_are_no_rgb_are_refused(tmp_path: Path, reader: CaseReader) -> None:
    Image.new("LAB", (4, 6)).save(tmp_path / "a.tif")
    with pytest.raises(OSError, match=r"a\.tif cannot be read: ValueError: holds LAB colours, expected grey values"):
        load_image(tmp_path / "a.tif", reader=reader)


def write_pages(path: Path, count: int, **options: object) -> None:
    pages = [Image.fromarray(np.full((6, 4), 50 * page, np.uint8)) for page in range(count)]
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)


@pytest.mark.parametrize("reader", [CaseReader(), LabelReader()], ids=["image", "label"])
def test_a_picture_of_several_pages_is_refused(tmp_path: Path, reader: CaseReader) -> None:
    write_pages(tmp_path / "a.TIF", 4, format="TIFF")
    with pytest.raises(OSError, match=r"cannot be read: ValueError: a\.TIF has 4 pages, expected one"):
        load_image(tmp_path / "a.TIF", reader=reader)
    write_pages(tmp_path / "one.tif", 1)
    assert load_image(tmp_path / "one.tif", reader=reader).shape == (4, 6)


def test_previews_in_a_photograph_are_no_pages(tmp_path: Path) -> None:
    write_pages(tmp_path / "a.jpg", 2, format="MPO")
    assert load_image(tmp_path / "a.jpg").shape == (4, 6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 1)])
def test_thumbnails_in_a_tiff_are_no_pages(tmp_path: Path, order: tuple[int, ...]) -> None:
    with AppendingTiffWriter(str(tmp_path / "a.tif"), True) as writer:
        for smaller in order:
            side = 4 if smaller else 8
            Image.fromarray(np.full((side, side), 10 * side, np.uint8)).save(writer, "TIFF", tiffinfo={254: smaller})
            writer.newFrame()
    image = load_image(tmp_path / "a.tif")
    assert image.shape == (8, 8) and image.unique().tolist() == [80.0]


def test_a_picture_of_several_pages_is_a_bad_case(tmp_path: Path) -> None:
    write_pages(tmp_path / "stack.tif", 3)
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4)).save(tmp_path / "one.tif")
    with pytest.raises(BadCasesError, match=r"stack\.tif: cannot be read: ValueError: stack\.tif has 3 pages"):
        load_cases(tmp_path, spatial_dims=2)


def test_a_folder_is_one_series(tmp_path: Path) -> None:
    stored = write_series(tmp_path)
    np.testing.assert_array_equal(load_image(tmp_path).numpy(), stored.transpose(2, 1, 0))


def test_files_of_other_kinds_are_stacked(tmp_path: Path) -> None:
    volumes = [write_nifti(tmp_path / f"{name}.nii.gz") for name in "ab"]
    image = load_image([str(tmp_path / f"{name}.nii.gz") for name in "ab"])
    np.testing.assert_array_equal(image.numpy(), np.stack(volumes, axis=-1))


def test_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    write_nifti(path, (20, 20, 20))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match=r"a\.nii\.gz cannot be read"):
        LoadCased("image")({"image": str(path)})


def test_a_flipped_bit_in_a_compressed_file_is_an_error(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (20, 20, 20))
    content = (tmp_path / "a.nii.gz").read_bytes()
    for place in range(2000, len(content), 1000):
        (tmp_path / "a.nii.gz").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(OSError, match=r"a\.nii\.gz cannot be read"):
            load_image(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes(content[:-8] + bytes(8))
    with pytest.raises(OSError, match=r"a\.nii\.gz cannot be read: BadGzipFile: CRC check failed"):
        load_image(tmp_path / "a.nii.gz")


def test_dictionary_form_leaves_the_input_and_other_entries_alone(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    case = {"image": str(tmp_path / "a.nii.gz"), "image_path": "x"}
    loaded = LoadCased(["image", "label"], allow_missing_keys=True)(case)
    assert loaded["image_path"] == "x" and isinstance(case["image"], str)
    with pytest.raises(KeyError, match="label"):
        LoadCased(["image", "label"])(case)
    assert CaseReader().verify_suffix("anything")
