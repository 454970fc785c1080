# SPDX-License-Identifier: Apache-2.0
"""Read one case, whatever it is stored as."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from monai.config import KeysCollection, PathLike
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader, PILReader
from monai.transforms import MapTransform
from monai.utils import ensure_tuple
from PIL import Image
from PIL.ImageOps import exif_transpose
from PIL.TiffImagePlugin import TiffImageFile
from pydicom.errors import InvalidDicomError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")

# What the transforms need. All else stays in the file: a DICOM header holds names, dates and numbers of patients.
_META_KEYS = ("affine", "original_affine", "spatial_shape", "space", "original_channel_dim")
# How a picture is stored says little about what it shows: palettes, bitmaps and transparency become grey or colour.
_PLAIN_MODES = {"1": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
_OTHER_COLOURS = ("LAB", "HSV")  # Pillow opens them and has no colours for them without a profile
_SUBFILE_TYPE, _SMALLER_COPY = 254, 1  # TIFF 6.0, NewSubfileType: bit 0 marks a smaller copy of another page
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF 6.0, PhotometricInterpretation
_CHUNK = 2**20  # bytes
FILE_AXES = "file_axes"  # how many spatial axes the file has
_OTHER_UNITS = {1: "meter", 3: "micron"}  # of NIfTI's xyzt_units; 2 is mm, and 0 says nothing


class CaseReader(ImageReader):
    """Read a NIfTI file, a 2D picture, or one DICOM series given as its sorted files or as a folder.

    Pass it to `LoadImaged` as ``reader=CaseReader()``. A list of files is one volume, slice by slice in the order
    given; rescale slope and intercept are applied and the affine is that of MONAI's `ITKReader`. A DICOM file alone,
    without a position in space, is a picture as a PNG is. Pictures are bright where they are to be shown bright
    (DICOM's MONOCHROME1, TIFF's WhiteIsZero) and turned as their EXIF data says; colours are RGB. A TIFF must have a
    single page; smaller copies of it do not count. Of the metadata only geometry is kept, so that nothing that names
    a patient travels with the image. ITK is imported when DICOM is read.

    Example:
        >>> from monai.transforms import LoadImaged
        >>> load = LoadImaged(keys="image", reader=CaseReader())
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Accept every file: what cannot be read raises on reading."""
        return True

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[ImageReader, Any]:
        """Open the file, folder or list of slices with the reader that fits it."""
        files = [str(name) for name in ensure_tuple(data)]
        reader = _reader_for(files, self.plain_picture)
        return reader, reader.read(files[0] if len(files) == 1 else files, **kwargs)

    def get_data(self, img: tuple[ImageReader, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the array and its geometry."""
        reader, image = img
        array, meta = reader.get_data(image)
        return array, {key: meta[key] for key in _META_KEYS if key in meta}

    def plain_picture(self, page: Image.Image) -> Image.Image:
        """Return a 2D picture as grey values or colours, upright, bright where it is to be shown bright."""
        upright = exif_transpose(page)
        return _plain_mode(_inverted(upright) if _low_is_bright(page) else upright)


class LabelReader(CaseReader):
    """Read maps of labels: as `CaseReader`, but a palette counts as the numbers of its colours."""

    def plain_picture(self, page: Image.Image) -> Image.Image:
        """Return a 2D picture as numbers, upright."""
        upright = exif_transpose(page)
        return upright if upright.mode == "P" else _plain_mode(upright)


class LoadCased(MapTransform):
    """Load images with `CaseReader` as float32 `MetaTensor`, channels still where the file has them.

    Where `LoadImaged` tries every reader it knows, this one uses the reader that fits and names the file that fails;
    the voxels keep the order in memory that they have on disk, which saves a transposition.

    Args:
        keys: entries that hold a path, or the sorted files of one DICOM series.
        pictures: whether volumes of one slice are pictures, as for `load_image`.
        allow_missing_keys: whether an absent entry is passed over.

    Raises:
        OSError: on call, when an image cannot be read.
    """

    def __init__(self, keys: KeysCollection, *, pictures: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.pictures = pictures

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with images in the place of paths."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = load_image(result[key], pictures=self.pictures)
        return result


def load_image(
    image: Sequence[PathLike] | PathLike, *, reader: CaseReader | None = None, pictures: bool = False
) -> MetaTensor:
    """Return one image as float32, with its geometry as metadata.

    Args:
        image: path of a file or folder, or the sorted files of one DICOM series.
        reader: `CaseReader` unless told otherwise.
        pictures: whether a NIfTI file of one slice, [X, Y, 1], is a picture [X, Y].

    Raises:
        OSError: it cannot be read.
    """
    reader = reader or CaseReader()
    name = str(ensure_tuple(image)[0])
    if not name:
        raise FileNotFoundError("expected the path of an image, got an empty one: is the id of the image right?")
    try:
        array, meta = reader.get_data(reader.read(image))
        values = torch.from_numpy(np.array(array, dtype=np.float32, order="K"))
    except Exception as error:  # every format has its own errors for damaged files
        raise OSError(f"{name} cannot be read: {type(error).__name__}: {error}") from error
    axes = len(meta["spatial_shape"])
    if pictures and has_suffix(name, NIFTI_SUFFIXES) and axes == 3 and meta["spatial_shape"][2] == 1:
        values, meta = values.squeeze(2), {**meta, "spatial_shape": meta["spatial_shape"][:2]}
    return MetaTensor(values, meta={**meta, "filename_or_obj": name, FILE_AXES: axes})


class _NiftiReader(NibabelReader):
    """Refuse what `NibabelReader` would read as something else.

    A compressed file is read to its end, where `NibabelReader` stops before the checksum of what was read.
    """

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        image = super().read(data, **kwargs)
        if problem := _nifti_problem(image):
            raise ValueError(problem)
        return image

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        if not has_suffix(img.get_filename(), [".gz"]):
            return super().get_data(img)
        with gzip.open(img.get_filename()) as stream:
            img.dataobj.file_like = stream  # nibabel would open the file, and close it after the last voxel
            array, meta = super().get_data(img)
            while stream.read(_CHUNK):
                pass
        return array, meta


def _nifti_problem(image: Any) -> str:
    """Return what is wrong with the header of a NIfTI file that nibabel accepts, or an empty text."""
    unit = _OTHER_UNITS.get(int(image.header["xyzt_units"]) % 8)
    if unit is not None:
        return f"spacing is in {unit}, expected mm"
    if image.get_data_dtype().kind == "c":
        return "holds complex values, expected real ones: save their magnitude"
    if image.get_data_dtype().kind == "V":
        return "holds RGB colours, expected numbers: save grey values, or the colours as a fourth axis"
    # of 2D files the plane in space does not matter
    if not np.isfinite(image.affine).all() or (image.ndim > 2 and np.linalg.matrix_rank(image.affine[:3, :3]) < 3):
        return "the affine is singular or not finite, expected one that says where the voxels lie"
    return ""


class _SeriesReader(ITKReader):
    """Take a list of files as the slices of one volume, where `ITKReader` would stack them as channels.

    Grey values are read as float32: ITK would press all slices into the type of the first one, unsigned integers for
    instance, where slices may differ in bits, sign and rescale slope.
    """

    def read(self, data: Sequence[PathLike], **kwargs: Any) -> Any:
        import itk  # slow to import, and needed for DICOM alone

        files = [str(name) for name in data]
        first = itk.ImageIOFactory.CreateImageIO(files[0], itk.CommonEnums.IOFileMode_ReadMode)
        if first is not None:  # else imread says what is wrong
            first.SetFileName(files[0])
            first.ReadImageInformation()
        grey = first is not None and first.GetNumberOfComponents() == 1
        return itk.imread(files, **{"pixel_type": itk.F if grey else None, **self.kwargs, **kwargs})


class _SingleReader(ITKReader):
    """Read one DICOM file: without a position in space it is a picture, else a volume of one slice.

    A picture has the form of a PNG: ``[columns, rows]``, or with colours at the end. ITK turns values of which low ones
    are to be shown bright (MONOCHROME1).
    """

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        try:
            header = pydicom.dcmread(str(data), specific_tags=["ImagePositionPatient"], stop_before_pixels=True)
            self.placed = bool(header.get("ImagePositionPatient"))
        except InvalidDicomError:  # ITK reads other formats, too
            self.placed = True
        return super().read(data, **kwargs)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        array, meta = super().get_data(img)
        if self.placed or array.shape[2] != 1:
            return array, meta
        picture = array[:, :, 0]
        channel_dim = float("nan") if picture.ndim == 2 else -1
        return picture, {"spatial_shape": np.asarray(picture.shape[:2]), "original_channel_dim": channel_dim}


def is_nifti_or_picture(path: PathLike) -> bool:
    """Return whether a file is one by its name; what is not may be DICOM."""
    return has_suffix(path, NIFTI_SUFFIXES + IMAGE_SUFFIXES)


def has_suffix(path: PathLike, suffixes: Sequence[str]) -> bool:
    """Return whether the file name ends in one of ``suffixes``, capital letters or not."""
    return str(path).lower().endswith(tuple(suffixes))


def _plain_mode(picture: Image.Image) -> Image.Image:
    if picture.mode in _OTHER_COLOURS:
        raise ValueError(f"holds {picture.mode} colours, expected grey values or RGB: save it as one of these")
    return picture.convert(_PLAIN_MODES[picture.mode]) if picture.mode in _PLAIN_MODES else picture


def _low_is_bright(page: Image.Image) -> bool:
    """Return whether low values of a TIFF are to be shown bright: Pillow turns 8 bits around by itself, 16 not."""
    if not isinstance(page, TiffImageFile) or not page.mode.startswith("I;16"):
        return False
    return bool(page.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _inverted(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.iinfo(np.uint16).max - np.asarray(picture, np.uint16))


def _only_page(picture: Image.Image) -> Image.Image:
    if not isinstance(picture, TiffImageFile):  # a JPEG may hold previews of itself
        return picture
    pages = []
    for page in range(picture.n_frames):
        picture.seek(page)
        if not picture.tag_v2.get(_SUBFILE_TYPE, 0) & _SMALLER_COPY:
            pages.append(page)
    if len(pages) != 1:
        name = Path(getattr(picture, "filename", "")).name
        raise ValueError(f"{name} has {len(pages)} pages, expected one: save a file per page, or a volume as NIfTI.")
    picture.seek(pages[0])
    return picture


def _reader_for(files: Sequence[str], plain_picture: Callable[[Image.Image], Image.Image]) -> ImageReader:
    if len(files) > 1:
        return _SeriesReader()
    if has_suffix(files[0], NIFTI_SUFFIXES) and not Path(files[0]).is_dir():
        return _NiftiReader()
    if has_suffix(files[0], IMAGE_SUFFIXES):
        return PILReader(converter=lambda picture: plain_picture(_only_page(picture)))
    return ITKReader() if Path(files[0]).is_dir() else _SingleReader()
