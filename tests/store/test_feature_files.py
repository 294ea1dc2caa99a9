"""Files of features of every form give the rows that were written, in any order, and run no code."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from apecache.errors import DataError
from apecache.store.feature_files.open_file import open_features
from apecache.store.feature_files.opened import natural_order
from apecache.store.feature_files.rows import (
    ArrayRows,
    ChunkedRows,
    StreamRows,
    is_ascending,
    spooled,
)

N_ROWS = 23
DIM = 5
WANTED = np.random.default_rng(0).standard_normal((N_ROWS, DIM)).astype(np.float32)
KEYS = [f"photos/{row:03d} é.jpg" for row in range(N_ROWS)]


def write_npy(path: Path, values: NDArray[Any]) -> None:
    np.save(path.with_suffix(".npy"), values)


def write_npz(path: Path, values: NDArray[Any]) -> None:
    np.savez(path.with_suffix(".npz"), features=values, keys=np.array(KEYS[: len(values)]))


def write_packed_npz(path: Path, values: NDArray[Any]) -> None:
    np.savez_compressed(path.with_suffix(".npz"), features=values)


def write_fortran(path: Path, values: NDArray[Any]) -> None:
    np.save(path.with_suffix(".npy"), np.asfortranarray(values))


def write_big_endian(path: Path, values: NDArray[Any]) -> None:
    np.save(path.with_suffix(".npy"), values.astype(">f4"))


def write_safetensors(path: Path, values: NDArray[Any]) -> None:
    from safetensors.numpy import save_file

    save_file({"aaa": np.arange(3), "features": values.copy()}, path.with_suffix(".safetensors"))


def write_pt(path: Path, values: NDArray[Any]) -> None:
    import torch

    keys = KEYS[: len(values)]
    torch.save({"features": torch.from_numpy(values), "keys": keys}, path.with_suffix(".pt"))


def write_bare_pt(path: Path, values: NDArray[Any]) -> None:
    import torch

    torch.save(torch.from_numpy(values), path.with_suffix(".pt"))


def write_h5(path: Path, values: NDArray[Any]) -> None:
    import h5py

    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("group/features", data=values, chunks=(4, values.shape[1]))
        file.create_dataset("keys", data=KEYS[: len(values)])


def write_parquet(path: Path, values: NDArray[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.array(list(values), type=pa.list_(pa.float32()))
    table = pa.table({"path": KEYS[: len(values)], "features": lists})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=7)


def write_fixed_parquet(path: Path, values: NDArray[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    pq.write_table(pa.table({"features": lists}), path.with_suffix(".parquet"), row_group_size=10)


def write_feather(path: Path, values: NDArray[Any]) -> None:
    import pyarrow as pa
    from pyarrow import feather

    lists = pa.array(list(values), type=pa.list_(pa.float32()))
    feather.write_feather(pa.table({"features": lists}), path.with_suffix(".feather"), chunksize=6)


def write_arrow_stream(path: Path, values: NDArray[Any]) -> None:
    import pyarrow as pa

    lists = pa.array(list(values), type=pa.list_(pa.float32()))
    table = pa.table({"features": lists})
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=6)


WRITERS: list[Callable[[Path, NDArray[Any]], None]] = [
    write_npy,
    write_npz,
    write_packed_npz,
    write_fortran,
    write_big_endian,
    write_safetensors,
    write_pt,
    write_bare_pt,
    write_h5,
    write_parquet,
    write_fixed_parquet,
    write_feather,
    write_arrow_stream,
]


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_form_gives_its_rows_in_any_order(
    write: Callable[[Path, NDArray[Any]], None],
    tmp_path: Path,
) -> None:
    write(tmp_path / "f", WANTED)
    opened = open_features(the_file(tmp_path))
    (rows,) = opened.features.values()
    assert (rows.n_rows, rows.row_shape, rows.dtype) == (N_ROWS, (DIM,), np.float32)
    orders = [
        np.arange(N_ROWS),
        np.arange(3, 9),
        np.array([22, 0, 7, 7, 3]),
        np.array([4]),
        np.empty(0, np.int64),
    ]
    for order in orders:
        assert np.array_equal(rows.read(order), WANTED[order]), order


@pytest.mark.parametrize(
    "write",
    [write_npz, write_pt, write_h5, write_parquet],
    ids=lambda write: write.__name__,
)
def test_keys_in_a_file_are_a_column_of_it(
    write: Callable[[Path, NDArray[Any]], None],
    tmp_path: Path,
) -> None:
    write(tmp_path / "f", WANTED)
    opened = open_features(the_file(tmp_path))
    column = opened.column(("keys", "path"), N_ROWS)
    assert column is not None
    assert column.tolist() == KEYS


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_float16_stays_and_wider_numbers_become_float32(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", WANTED.astype(dtype))
    (rows,) = open_features(tmp_path / "f.npy").features.values()
    assert rows.dtype == ("float16" if dtype == "float16" else "float32")
    assert np.array_equal(rows.read(np.arange(4)), WANTED.astype(dtype)[:4].astype(rows.dtype))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bfloat16_is_read_exactly(suffix: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensor = torch.from_numpy(WANTED).to(torch.bfloat16)
    path = tmp_path / f"f{suffix}"
    if suffix == ".pt":
        torch.save({"x": tensor}, path)
    else:
        save_file({"x": tensor}, path)
    (rows,) = open_features(path).features.values()
    for order in (np.arange(N_ROWS), np.array([9, 2])):
        assert np.array_equal(rows.read(order), tensor.float().numpy()[order])


class Trap:
    """An object whose unpickling runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["npy", "npz", "pt", "pkl"])
def test_nothing_is_unpickled(form: str, tmp_path: Path) -> None:
    import torch

    trap = Trap(tmp_path / "sprung")
    path = tmp_path / f"f.{form}"
    objects = np.array([trap, trap], dtype=object)
    match form:
        case "npy":
            np.save(path, objects, allow_pickle=True)
        case "npz":
            np.savez(path, features=objects, allow_pickle=True)
        case "pt":
            torch.save({"features": trap}, path)
        case _:
            path.write_bytes(pickle.dumps(trap))
    with pytest.raises(DataError, match="pickle"):
        open_features(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_file_that_is_cut_off_is_refused(
    write: Callable[[Path, NDArray[Any]], None],
    tmp_path: Path,
) -> None:
    write(tmp_path / "f", WANTED)
    path = the_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])

    def read_all() -> None:
        rows = next(iter(open_features(path).features.values()))
        rows.read(np.arange(N_ROWS))

    with pytest.raises(DataError, match=r"f\."):
        read_all()


@pytest.mark.parametrize("dtype", ["int64", "uint8", "complex64"])
def test_numbers_that_are_no_features_are_refused(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.ones((4, 3), dtype))
    with pytest.raises(DataError, match=f"float16, bfloat16.*found {dtype}"):
        open_features(tmp_path / "f.npy")


def test_files_of_a_folder_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1, 0):
        np.save(tmp_path / f"part_{number}.npy", np.full((2, 3), number, np.float32))
    (rows,) = open_features(tmp_path).features.values()
    assert rows.read(np.arange(8))[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 10, 10]
    (by_pattern,) = open_features(tmp_path / "part_1*.npy").features.values()
    assert by_pattern.read(np.arange(4))[:, 0].tolist() == [1, 1, 10, 10]


def test_a_folder_of_several_arrays_is_not_guessed(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", WANTED)
    np.save(tmp_path / "val.npy", WANTED)
    with pytest.raises(DataError, match=r"several arrays \(train.npy, val.npy\).*--image"):
        open_features(tmp_path)


def test_parts_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "part_0.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "part_1.npy", np.ones((2, 4), np.float32))
    with pytest.raises(DataError, match=r"part_1.npy has rows of 4, .*part_0.npy of 3"):
        open_features(tmp_path)


@given(st.lists(st.text(st.characters(codec="ascii"), min_size=1), unique=True))
def test_natural_order_is_an_order(names: list[str]) -> None:
    ordered = sorted(names, key=natural_order)
    backwards = list(reversed(ordered))
    assert sorted(backwards, key=natural_order) == ordered


def test_natural_order_compares_numbers_by_value() -> None:
    names = ["a10", "a9", "a1b2", "a1b10", "b"]
    assert sorted(names, key=natural_order) == ["a1b2", "a1b10", "a9", "a10", "b"]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    order=st.lists(st.integers(0, 100), max_size=12),
)
def test_chunks_and_streams_give_any_rows(sizes: list[int], order: list[int]) -> None:
    values = np.arange(sum(sizes) * 2, dtype=np.float32).reshape(-1, 2)
    ends = np.cumsum(sizes)
    blocks = np.split(values, ends[:-1])
    rows = np.array([row % len(values) for row in order], np.int64)
    parts = [ArrayRows(values=block, stored=block.dtype, origin="x") for block in blocks]
    chunked = ChunkedRows(chunks=parts)
    stream = StreamRows(
        n_rows=len(values),
        row_shape=(2,),
        dtype=values.dtype,
        blocks=lambda: iter(blocks),
    )
    assert np.array_equal(chunked.read(rows), values[rows])
    assert np.array_equal(stream.read(rows), values[rows])
    assert np.array_equal(spooled(stream).read(rows), values[rows])
    assert is_ascending(rows) == (sorted(set(rows.tolist())) == rows.tolist())


def test_one_pass_over_a_stream_serves_rows_in_order() -> None:
    n_passes = 0

    def blocks() -> Any:
        nonlocal n_passes
        n_passes += 1
        return iter(np.split(WANTED, 1))

    stream = StreamRows(n_rows=N_ROWS, row_shape=(DIM,), dtype=WANTED.dtype, blocks=blocks)
    for first in range(0, N_ROWS, 4):
        stream.read(np.arange(first, min(first + 4, N_ROWS)))
    assert n_passes == 1


def test_null_rows_of_parquet_are_nan_and_lists_of_another_length_are_refused(
    tmp_path: Path,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "f.parquet"
    kind = pa.list_(pa.float32())
    pq.write_table(pa.table({"emb": pa.array([[1.0, 2.0], None, [3.0, 4.0]], kind)}), path)
    (rows,) = open_features(path).features.values()
    assert np.array_equal(
        rows.read(np.arange(3)),
        [[1, 2], [np.nan, np.nan], [3, 4]],
        equal_nan=True,
    )
    pq.write_table(pa.table({"emb": pa.array([[1.0, 2.0], [3.0]], kind)}), path)
    (rows,) = open_features(path).features.values()
    with pytest.raises(DataError, match="a list of 1 numbers, the first has 2"):
        rows.read(np.arange(2))


RAGGED = [np.full((n, 3), n, np.float32) for n in (2, 4, 1)]
PADDED = np.zeros((3, 4, 3), np.float32)
for number, tokens in enumerate(RAGGED):
    PADDED[number, : len(tokens)] = tokens


def write_ragged(form: str, path: Path) -> None:
    """Write the same tokens in a form."""
    lengths = np.array([2, 4, 1])
    match form:
        case "flat":
            np.savez(path.with_suffix(".npz"), x=np.concatenate(RAGGED), lengths=lengths)
        case "padded":
            np.savez(path.with_suffix(".npz"), x=PADDED, x_length=lengths)
        case "h5":
            import h5py

            with h5py.File(path.with_suffix(".h5"), "w") as file:
                file["x"] = np.concatenate(RAGGED)
                file["lengths"] = lengths
        case _:
            import pyarrow as pa
            import pyarrow.parquet as pq

            lists = pa.array(
                [tokens.tolist() for tokens in RAGGED],
                pa.list_(pa.list_(pa.float32())),
            )
            pq.write_table(pa.table({"x": lists}), path.with_suffix(".parquet"))


@pytest.mark.parametrize("form", ["flat", "padded", "h5", "parquet"])
def test_tokens_of_rows_that_differ_in_their_number(form: str, tmp_path: Path) -> None:
    write_ragged(form, tmp_path / "f")
    (rows,) = open_features(the_file(tmp_path)).features.values()
    assert rows.row_shape == (4, 3)
    assert rows.lengths is not None
    assert rows.lengths.tolist() == [2, 4, 1]
    assert np.array_equal(rows.read(np.arange(3)), PADDED)
    assert np.array_equal(rows.read(np.array([2, 0])), PADDED[[2, 0]])


def test_lengths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.ones((6, 3), np.float32), x_length=np.array([2, 3]))
    with pytest.raises(DataError, match="2 counts that add to 5 do not fit 6 rows"):
        open_features(tmp_path / "f.npz")


@pytest.mark.parametrize("form", ["h5", "pt", "safetensors"])
def test_one_vector_under_each_key(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"f.{form}"
    vectors = {key.replace("/", "-"): WANTED[row] for row, key in enumerate(KEYS)}
    match form:
        case "h5":
            import h5py

            with h5py.File(path, "w") as file:
                for key, vector in vectors.items():
                    file[key] = vector
        case "pt":
            import torch

            torch.save({key: torch.from_numpy(value) for key, value in vectors.items()}, path)
        case _:
            from safetensors.numpy import save_file

            save_file({key: value.copy() for key, value in vectors.items()}, path)
    opened = open_features(path)
    (rows,) = opened.features.values()
    keys = opened.column(("key",), N_ROWS)
    assert keys is not None
    order = [keys.tolist().index(key) for key in vectors]
    assert np.array_equal(rows.read(np.array(order)), WANTED)


@pytest.mark.parametrize("name", ["file_names.txt", "keys.txt"])
def test_keys_stand_beside_the_file(name: str, tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", WANTED)
    (tmp_path / name).write_text("\n".join(KEYS) + "\n", encoding="utf-8")
    for path in (tmp_path, tmp_path / "features.npy"):
        column = open_features(path).column(("key",), N_ROWS)
        assert column is not None
        assert column.tolist() == KEYS
    (tmp_path / name).write_text("one\n")
    with pytest.raises(DataError, match=r"has 1 lines, .* 23 rows"):
        open_features(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("f.npy", b"not an array", "not a .npy array"),
        ("f.npz", b"not a zip", "cannot be read"),
        ("f.safetensors", b"\xff" * 40, "cannot be read"),
        ("f.safetensors", (2).to_bytes(8, "little") + b"[]", "cannot be read"),
        (
            "f.safetensors",
            (lambda h: len(h).to_bytes(8, "little") + h)(
                json.dumps(
                    {"x": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}
                ).encode()
            ),
            "cut off",
        ),
        ("f.pt", b"not a tensor", "f.pt"),
        ("f.h5", b"not hdf5", "cannot be read"),
        ("f.parquet", b"not parquet", "cannot be read"),
        ("f.csv", b"1,2\n", "expected a folder, or a file that ends in"),
    ],
)
def test_what_is_no_file_of_features_is_refused_with_its_name(
    name: str,
    data: bytes,
    message: str,
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_features(tmp_path / name)
