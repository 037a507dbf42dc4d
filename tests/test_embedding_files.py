"""Reading embeddings: every format gives the same rows; messages name the bad file, its row and a remedy."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from vultus.errors import UserError
from vultus.sampling.embedding_files import open_embeddings

FACENET = {"id": "facenet-vggface2", "dim": 512}


def unit_rows(count: int, dim: int = 512) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def read(source: str | Path) -> torch.Tensor:
    embeddings = open_embeddings(source)
    embeddings.check()
    rows = torch.cat(list(embeddings.chunks()))
    assert len(rows) == embeddings.count
    return rows


def write_parquet(path: Path, rows: np.ndarray, kind: str = "fixed", row_group_size: int = 700) -> None:
    values = pa.array(rows.ravel())
    if kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    else:
        column = pa.ListArray.from_arrays(np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32), values)
    table = pa.table({"name": [str(index) for index in range(len(rows))], "embedding": column})
    pq.write_table(table, path, row_group_size=row_group_size)


def write_csv(path: Path, rows: np.ndarray, names: Iterable[object] | None) -> None:
    """With a line of names a key and the size of the photo stand before the vector, and a remark after it."""
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        if names is not None:
            lines.writerow(["width", "key", *names, "remark"])
        for number, row in enumerate(rows.tolist()):
            lines.writerow(row if names is None else [160, f"{number:04}.jpg", *row, "none"])


def test_every_format_gives_the_same_rows(tmp_path: Path, tiny_dataset: Callable[..., Path]) -> None:
    rows = unit_rows(2100)  # more than two chunks
    np.save(tmp_path / "c.npy", rows)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(rows))
    np.save(tmp_path / "big_endian.npy", rows.astype(">f8"))
    np.savez(tmp_path / "plain.npz", rows)
    np.savez_compressed(tmp_path / "two.npz", other=np.zeros(3), mine=rows)
    np.savez(tmp_path / "fortran.npz", x=np.asfortranarray(rows))
    safetensors.torch.save_file(
        {"embeddings": torch.from_numpy(rows), "a": torch.zeros(2)}, tmp_path / "named.safetensors"
    )
    write_parquet(tmp_path / "fixed.parquet", rows)
    write_parquet(tmp_path / "lists.parquet", rows, "lists")
    write_parquet(tmp_path / "double.parquet", rows.astype(np.float64), "lists")
    folder = tiny_dataset(embeddings=torch.from_numpy(rows[:24]), people={"train": 5, "test": 3})
    names = "c.npy fortran.npy big_endian.npy plain.npz two.npz:mine fortran.npz named.safetensors"
    names += " named.safetensors:embeddings fixed.parquet lists.parquet double.parquet:embedding"
    for name in names.split():
        torch.testing.assert_close(read(f"{tmp_path}/{name}"), torch.from_numpy(rows), msg=name)
    torch.testing.assert_close(read(folder), torch.from_numpy(rows[:24]))
    torch.testing.assert_close(read(f"{folder}:test"), torch.from_numpy(rows[15:24]))


def test_half_precision_one_row_and_colons(tmp_path: Path) -> None:
    rows = unit_rows(3)
    np.save(tmp_path / "half.npy", rows.astype(np.float16))
    safetensors.torch.save_file({"x": torch.from_numpy(rows).bfloat16()}, tmp_path / "b.safetensors")
    np.save(tmp_path / "one.npy", rows[1])
    np.save(tmp_path / "a:b.npy", rows)
    torch.testing.assert_close(read(tmp_path / "half.npy"), torch.from_numpy(rows), atol=1e-4, rtol=0)
    torch.testing.assert_close(read(tmp_path / "b.safetensors"), torch.from_numpy(rows), atol=1e-3, rtol=0)
    torch.testing.assert_close(read(tmp_path / "one.npy"), torch.from_numpy(rows[1:2]))
    torch.testing.assert_close(read(tmp_path / "a:b.npy"), torch.from_numpy(rows))
    torch.testing.assert_close(open_embeddings(tmp_path / "half.npy").row(2), read(tmp_path / "half.npy")[2])
    with pytest.raises(UserError, match=r"no row 3; its rows are 0 to 2"):
        open_embeddings(tmp_path / "half.npy").row(3)


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """With a byte order mark, a number as the key, and a column of text between key and vector."""
    (tmp_path / "c.csv").write_text("\ufeffkey,person,a,b\n0001,Ann,3,4\n0002,Bo,0,-1\n", encoding="utf-8")
    rows = torch.cat(list(open_embeddings(tmp_path / "c.csv", 2).chunks()))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_csv_with_and_without_names(tmp_path: Path) -> None:
    rows = unit_rows(50)
    write_csv(tmp_path / "key.csv", rows, [f"e{number}" for number in range(512)])
    write_csv(tmp_path / "pandas.csv", rows, range(512))
    write_csv(tmp_path / "plain.csv", rows, None)
    for name in ("key.csv", "pandas.csv", "plain.csv"):
        torch.testing.assert_close(read(tmp_path / name), torch.from_numpy(rows), msg=name)


def test_json_of_the_page_and_of_the_api(tmp_path: Path) -> None:
    row, other = unit_rows(2).tolist()
    path = tmp_path / "c.json"
    for value, count in (
        ({"embedding": row, "encoder": "facenet-vggface2"}, 1),  # as the page saves it
        ({"embedding": row, "encoder": None}, 1),
        ({"embeddings": [row, other]}, 2),
        ({"model": "m", "faces": [{"index": 0, "embedding": row}, {"index": 1, "embedding": other}], "note": None}, 2),
        (row, 1),
    ):
        path.write_text(json.dumps(value))
        embeddings = open_embeddings(path, encoder=FACENET)
        assert embeddings.count == count
        torch.testing.assert_close(embeddings.row(count - 1), torch.tensor([row, other][count - 1]))
    path.write_text(json.dumps({"embedding": row[:128], "encoder": "dlib"}))
    message = r"c\.json: holds embeddings of dlib \(\? numbers\) instead of facenet-vggface2 \(512 numbers\), on which"
    with pytest.raises(UserError, match=message):
        open_embeddings(path, encoder=FACENET)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1, 2", "not valid JSON"),
        ("a.json", "[]", "holds no embeddings"),
        ("a.json", '{"vector": [1]}', "holds no embedding; a list"),
        ("a.json", '{"faces": [{"key": "a"}]}', "holds no embedding; a list"),
        ("a.json", '{"vultus": {"format": 1}, "embedding": [1, 2, 3]}', "its header 'vultus' is truncated"),
        ("a.json", "[[1, 2, 3], [1, 2]]", "row 1 holds 2 values, not 3"),
        ("a.json", "[[1, 2, 3], [1, null, 2]]", "row 1 is no list of numbers"),
        ("a.json", "[[true, 2, 3]]", "row 0 is no list of numbers"),
        ("a.json", f"[[1, 2, 3], [1, 2, {10**400}]]", "row 1 holds infinity"),
        ("a.json", "[1, 2, 3, 4]", "4-dimensional"),
        ("a.csv", "", "holds no embeddings"),
        ("a.csv", "key,a,b,c\n", "holds no embeddings"),
        ("a.csv", "key,a,b,c\nx,1,,3\n", "row 0 holds NaN"),
        ("a.csv", "1,2,3\n4,inf,6\n", "row 1 holds infinity"),
        ("a.csv", "1,2,3\n4,5\n", "not a readable .csv file"),
        ("a.csv", "1,2,3\n4,five,6\n", "not a readable .csv file"),
        ("a.csv", "x,1,2\ny,3,4\n", "2-dimensional"),
        ("a.csv", "key\nx\n", "no columns of numbers"),
        ("a.csv", "\0\1\2\3", "a.csv"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_embeddings(tmp_path / name, 3).check()
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_other_norms_are_noted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = unit_rows(1500)
    np.save(tmp_path / "long.npy", rows.astype(np.float64) * np.logspace(-200, 200, 1500)[:, None])
    torch.testing.assert_close(read(tmp_path / "long.npy"), torch.from_numpy(rows))
    note = capsys.readouterr().err
    assert note.count("long.npy") == note.count("\n") == 1
    assert "normalised" in note
    np.save(tmp_path / "unit.npy", rows)
    read(tmp_path / "unit.npy")
    assert capsys.readouterr().err == ""


def with_value(value: float, row: int) -> np.ndarray:
    rows = unit_rows(1200)
    rows[row, 7] = value
    return rows


def with_zero(row: int) -> np.ndarray:
    rows = unit_rows(1200)
    rows[row] = 0
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (unit_rows(5, 128), r"128-dimensional embeddings .*takes 512; compute them with FaceNet"),
        (unit_rows(1, 128)[0], r"128-dimensional"),
        (with_value(np.nan, 1100), r"row 1100 holds NaN; leave it out"),
        (with_value(-np.inf, 3), r"row 3 holds infinity"),
        (with_zero(1030), r"row 1030 is all zeros"),
        (unit_rows(0), r"holds no embeddings"),
        (np.zeros((2, 3, 512), np.float32), r"shape \[2, 3, 512\]; an array \[N, 512\] is needed"),
        (np.float32(1), r"shape \[\]"),
        (np.array([["a"] * 512]), r"not numbers"),
        (np.array([None, {}]), r"pickled Python objects, which are refused"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    np.save(tmp_path / "bad.npy", rows)
    np.savez(tmp_path / "bad.npz", rows)
    for name in ("bad.npy", "bad.npz"):
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_bad_parquet_rows_are_named(tmp_path: Path) -> None:
    rows = [list(map(float, row)) for row in unit_rows(1500)]
    cases = {
        "short": ([*rows[:1200], rows[0][:100], *rows[1200:]], "row 1200 holds 100 values, not 512"),
        "missing": ([*rows[:1200], None, *rows[1200:]], "row 1200 holds no embedding"),
        "hole": ([*rows[:1200], [None, *rows[0][1:]], *rows[1200:]], "row 1200 has a missing value"),
        "narrow": ([row[:128] for row in rows], "128-dimensional"),
        "first": ([None, *rows], "row 0 holds no embedding"),
        "text": ([["x"] * 512], "lists of string"),
        "flat": ([1.0, 2.0], "a column of lists of floats is needed"),
        "empty": (rows[:0], "holds"),
    }
    for name, (column, message) in cases.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"embedding": column}), path)
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_wrong_name_lists_the_names_in_the_file(tmp_path: Path, tiny_dataset: Callable[..., Path]) -> None:
    rows = unit_rows(2)
    np.savez(tmp_path / "a.npz", one=rows, two=rows)
    safetensors.torch.save_file({"one": torch.from_numpy(rows)}, tmp_path / "a.safetensors")
    pq.write_table(pa.table({"face": list(rows), "name": ["x", "y"]}), tmp_path / "a.parquet")
    folder = tiny_dataset()
    for source, message in {
        f"{tmp_path}/a.npz:three": "no array 'three'; it has one, two",
        f"{tmp_path}/a.safetensors:two": "no tensor 'two'; it has one",
        f"{tmp_path}/a.parquet": "no column 'embedding'; it has face, name",
        f"{folder}:valid": "no split 'valid'; it has train, test",
        f"{tmp_path}/none.npy": "no such file",
        str(tmp_path): "not a prepared data set",
    }.items():
        with pytest.raises(UserError, match=message):
            read(source)
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(UserError, match=r"use \.npy, \.npz"):
        read(tmp_path / "a.txt")


def test_truncated_and_damaged_files_are_named(tmp_path: Path, tiny_dataset: Callable[..., Path]) -> None:
    rows = unit_rows(1500)
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "a.npz", rows)
    np.savez_compressed(tmp_path / "b.npz", rows)
    safetensors.torch.save_file({"x": torch.from_numpy(rows)}, tmp_path / "a.safetensors")
    write_parquet(tmp_path / "a.parquet", rows)
    for name in ("a.npy", "a.npz", "b.npz", "a.safetensors", "a.parquet"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError, match=name) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)
    # A flipped byte is detected only where the format has a checksum.
    np.savez_compressed(tmp_path / "b.npz", rows)
    whole = bytearray((tmp_path / "b.npz").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / "b.npz").write_bytes(whole)
    with pytest.raises(UserError, match=r"b\.npz"):
        read(tmp_path / "b.npz")
    folder = tiny_dataset()
    shard = folder / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"shard-00000\.arrow"):
        read(folder)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """30,000 embeddings are 61 MB; reading them may take no more than 20 MB above what reading 1,500 takes."""
    program = """
import json, resource, sys
from vultus.sampling.embedding_files import open_embeddings
peaks = {}
for path in sys.argv[1:]:
    embeddings = open_embeddings(path)
    embeddings.check()
    assert sum(len(chunk) for chunk in embeddings.chunks()) == embeddings.count
    peaks[path] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(peaks))
"""
    paths = []
    for count in (1500, 30_000):
        rows = np.repeat(unit_rows(1500), count // 1500, axis=0)
        paths += [str(tmp_path / f"{count}.{kind}") for kind in ("npy", "npz", "safetensors", "parquet")]
        np.save(paths[-4], rows)
        np.savez(paths[-3], rows)
        safetensors.torch.save_file({"x": torch.from_numpy(rows)}, paths[-2])
        write_parquet(Path(paths[-1]), rows, row_group_size=100_000)
    result = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    peaks = json.loads(result.stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    grown = {path: (peaks[path] - peaks[paths[3]]) * unit for path in paths[4:]}
    assert max(grown.values()) < 20 * 2**20, grown
