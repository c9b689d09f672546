"""Metadata files and sidecar files: what they say, and every way they can be wrong."""

import tracemalloc
from collections.abc import Iterator

import pytest

from ctune.errors import DataError
from ctune.metadata import MetadataRow, Values, read_metadata, sidecar_values


def rows(text: str | bytes, path: str = "train/metadata.csv") -> list[MetadataRow]:
    data = text.encode() if isinstance(text, str) else text
    pieces = [data[at : at + 7] for at in range(0, len(data), 7)]
    return list(read_metadata(path, pieces))


def fault(text: str | bytes, path: str = "metadata.csv") -> str:
    with pytest.raises(DataError) as caught:
        rows(text, path)
    assert caught.value.error_code == "invalid_metadata"
    assert caught.value.message.startswith(path)
    return caught.value.message


def test_csv() -> None:
    header = "\ufefffile_name,label,split,text,n\r\n"
    text = header + 'a.jpg,cat,Train,"two\nlines, one",1\r\nx/b.jpg,,,é,\r\n'
    first = Values("cat", "train", {"text": "two\nlines, one", "n": "1"})
    assert rows(text) == [
        MetadataRow("train/a.jpg", 3, first),
        MetadataRow("train/x/b.jpg", 4, Values(None, None, {"text": "é", "n": ""})),
    ]


def test_jsonl() -> None:
    text = '{"file_name": "a.jpg", "label": 7, "boxes": [1, {"x": 2}], "path": "p"}\n\n'
    expected = Values("7", None, {"boxes": [1, {"x": 2}], "metadata_path": "p"})
    assert rows(text, "metadata.jsonl") == [MetadataRow("a.jpg", 1, expected)]


def test_names_are_normalised() -> None:
    (row,) = rows("file_name,label\n./e\u0301.jpg,e\u0301\n")
    assert (row.path, row.values.label) == ("train/\u00e9.jpg", "\u00e9")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "needs a column file_name"),
        ("label\ncat\n", "needs a column file_name"),
        ("file_name,a,a\nx,1,2\n", "no name twice"),
        ("file_name,label\na.jpg\n", "row 2: 1 cells for 2 columns"),
        ("file_name,label\na.jpg,cat,dog\n", "row 2: 3 cells"),
        ("file_name,label\n,cat\n", "row 2: no file_name"),
        ("file_name,label\n../a.jpg,cat\n", "row 2: file_name '../a.jpg' is not a path"),
        ("file_name,label\n/etc/a.jpg,cat\n", "is not a path"),
        ("file_name,label\nb\\a.jpg,cat\n", "is not a path"),
        ("file_name,split\na.jpg,dev\n", "row 2: split 'dev' is not train, val or test"),
        ("file_name,label\na.jpg,c\x07t\n", "unprintable"),
        ("file_name,label\na.jpg,  \n", "is empty"),
        ("file_name,label\na.jpg," + "x" * 300 + "\n", "too long"),
        ("file_name,text\na.jpg," + "x" * 70_000 + "\n", "more than 65536 bytes"),
        ('file_name,text\na.jpg,"never closed\n', "unexpected end of data"),
        (b"file_name,text\na.jpg,\xff\xfe\n", "decode"),
        ("file_name,text\na.jpg," + "x" * 2_000_000, "longer than 1048576"),
    ],
)
def test_bad_csv(text: str | bytes, reason: str) -> None:
    assert reason in fault(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"file_name": "a.jpg"', "row 1: not JSON"),
        ("[1]", "row 1: not a JSON object"),
        ('{"label": "a"}', "row 1: no file_name"),
        ('{"file_name": 3}', "row 1: no file_name"),
        ('{"file_name": "a", "label": [1]}', "neither a text nor an integer"),
        ('{"file_name": "a", "label": true}', "neither a text nor an integer"),
        ('{"file_name": "a", "label": 1.5}', "neither a text nor an integer"),
        ('{"file_name": "a", "split": 1}', "split 1 is not"),
        ('{"file_name": "a", "x": NaN}', "NaN is not JSON"),
        ('{"file_name": "a", "x": "\\ud800"}', "cannot be stored"),
        ('{"file_name": "a", "x": ' + "[" * 100_000, "not JSON"),
    ],
)
def test_bad_jsonl(text: str, reason: str) -> None:
    assert reason in fault(text, "metadata.jsonl")


def test_all_bad_rows_are_named_up_to_twenty() -> None:
    message = fault("file_name,split\n" + "a.jpg,x\n" * 30)
    assert "row 2:" in message
    assert "row 21:" in message
    assert "row 22:" not in message


def test_a_large_file_takes_little_memory() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"file_name,label\n"
        for n in range(400):
            yield b"".join(b"%d/%d.jpg,cat\n" % (n, m) for m in range(50))

    tracemalloc.start()
    assert sum(1 for _ in read_metadata("metadata.csv", chunks())) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_sidecars() -> None:
    assert sidecar_values("a.cls", b" 12 \n") == Values("12")
    assert sidecar_values("a.TXT", "ein Bär\n".encode()) == Values(columns={"text": "ein Bär"})
    content = b'{"cls": 3, "split": "val", "sha256": "s", "k": null}'
    assert sidecar_values("a.json", content) == Values(
        "3", "val", {"metadata_sha256": "s", "k": None}
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.cls", b""), ("a.cls", b"a\nb"), ("a.txt", b"\xff"), ("a.json", b"{"), ("a.json", b"[]")],
)
def test_bad_sidecars(name: str, content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        sidecar_values(name, content)
    assert caught.value.error_code == "invalid_metadata"
