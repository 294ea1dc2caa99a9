"""Read features of NumPy's files: `.npy`, and `.npz` without unpacking what is not compressed."""

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from apecache.errors import DataError, one_line
from apecache.store.feature_files.opened import (
    Column,
    FeatureFile,
    ReadColumn,
    as_strings,
    unreadable,
    with_lengths,
)
from apecache.store.feature_files.rows import FeatureRows, RawRows, ScratchFolder, SpooledRows

LOCAL_HEADER_BYTES = 30
"""Fixed part of a member's header in a zip file; its name and its extra field follow."""


@dataclass(frozen=True, kw_only=True)
class NpyHeader:
    """Hold what the header of a `.npy` says."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    n_bytes: int
    """Length of the header: the data begin there."""


def open_npy(path: Path) -> FeatureFile:
    """Open a `.npy` of features; it is read in place.

    Raises:
        DataError: It is damaged, holds pickled objects, or is not an array of features.
    """
    with path.open("rb") as file:
        header = _read_header(file, str(path))
    name = path.stem
    if _is_column(header):
        columns: Mapping[str, ReadColumn] = {name: partial(_load_npy, path)}
        return FeatureFile(origin=str(path), paths=(path,), features={}, columns=columns)
    rows = RawRows(
        path=path,
        offset=header.n_bytes,
        stored=header.dtype,
        shape=header.shape,
        fortran_order=header.fortran_order,
    )
    return FeatureFile(origin=str(path), paths=(path,), features={name: rows})


def open_npz(path: Path) -> FeatureFile:
    """Open a `.npz`: arrays that are not compressed are read in place, others are unpacked.

    Raises:
        DataError: It is damaged, or holds pickled objects.
    """
    features: dict[str, FeatureRows] = {}
    columns: dict[str, ReadColumn] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    header = _read_header(member, f"{path}: {name}")
                if _is_column(header):
                    columns[name] = partial(_load_member, path, name)
                elif header.dtype.kind == "f":
                    features[name] = _member_rows(archive, info, path, header)
    except (zipfile.BadZipFile, EOFError) as error:
        raise unreadable(path, error, "write it again with numpy.savez") from None
    features = with_lengths(features, columns, str(path))
    return FeatureFile(origin=str(path), paths=(path,), features=features, columns=columns)


def _is_column(header: NpyHeader) -> bool:
    return len(header.shape) == 1


def _read_header(file: BinaryIO | Any, origin: str) -> NpyHeader:
    try:
        version = np.lib.format.read_magic(file)
        match version:
            case (1, 0):
                described = np.lib.format.read_array_header_1_0(file)
            case (2, 0) | (3, 0):
                # Version 3 differs in the encoding of field names, which features do not have.
                described = np.lib.format.read_array_header_2_0(file)
            case _:
                raise ValueError(f"its version is {version}")
    except ValueError as error:
        raise DataError(
            f"{origin} is not a .npy array: {one_line(error)}; write it with numpy.save"
        ) from None
    shape, fortran_order, dtype = described
    if dtype.hasobject:
        raise DataError(
            f"{origin} holds pickled Python objects, and nothing is unpickled; save a float array, "
            "e.g. numpy.save(path, numpy.stack(list_of_vectors))"
        )
    return NpyHeader(
        shape=shape,
        fortran_order=fortran_order and len(shape) > 1,
        dtype=dtype,
        n_bytes=file.tell(),
    )


def _member_rows(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    path: Path,
    header: NpyHeader,
) -> FeatureRows:
    """Return the rows of a member, in the archive itself where it is not compressed."""
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(info.header_offset)
            local_header = file.read(LOCAL_HEADER_BYTES)
        # The local header's extra field may differ in length from that of the directory.
        n_name_bytes = int.from_bytes(local_header[26:28], "little")
        n_extra_bytes = int.from_bytes(local_header[28:30], "little")
        first_byte = info.header_offset + LOCAL_HEADER_BYTES + n_name_bytes + n_extra_bytes
        return RawRows(
            path=path,
            offset=first_byte + header.n_bytes,
            stored=header.dtype,
            shape=header.shape,
            fortran_order=header.fortran_order,
        )
    # Compressed: rows in the middle can be reached only by unpacking those before them.
    scratch = ScratchFolder()
    unpacked = scratch.path / "member.npy"
    with archive.open(info) as member, unpacked.open("wb") as file:
        shutil.copyfileobj(member, file, 1 << 20)
    return SpooledRows(
        path=unpacked,
        offset=header.n_bytes,
        stored=header.dtype,
        shape=header.shape,
        fortran_order=header.fortran_order,
        scratch=scratch,
    )


def _load_npy(path: Path) -> Column:
    return as_strings(np.load(path, allow_pickle=False))


def _load_member(path: Path, name: str) -> Column:
    with np.load(path, allow_pickle=False) as archive:
        return as_strings(archive[name])
